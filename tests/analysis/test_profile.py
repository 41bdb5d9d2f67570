"""Totals of real rewritten networks against closed formulas, devices, and the printed table."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.system.tiny_models import CONFIGS, load, make_checkpoint

from enginery.analysis import DEVICES, Cost, Profile, Step, find_device, profile, this_device
from enginery.analysis.text import columns, si
from enginery.checkpoint import Checkpoint
from enginery.cli.profile import profile_regions
from enginery.engine.binding import split
from enginery.errors import UsageError
from enginery.frontends.huggingface import import_checkpoint
from enginery.network import Network
from enginery.rewriting.pipeline import run_phases

H200 = find_device("h200")


def step_network(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Network:
    network = import_checkpoint(Checkpoint.open(directory), dtype=dtype).network
    run_phases(network)
    return split(network).network


def llama_8b(directory: Path, layers: int) -> Path:
    """A checkpoint of Llama 3's 8B shape with `layers` of its 32 layers, whose weights are holes in a file."""
    hidden, inner, vocabulary, keys = 4096, 14336, 128256, 1024
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "dtype": "bfloat16",
    }  # fmt: skip
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden), "model.norm": (hidden,)}
    for i in range(layers):
        block = {
            "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        }  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in block.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (directory / "config.json").write_text(json.dumps(config))
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return directory


def deepened(found: Profile, layers: int) -> tuple[Cost, float]:
    """Cost and seconds of a profile by regions if its repeated block were repeated `layers` times."""
    (block,) = (part for part in found.parts if part.count > 1)
    each = found.of_part(block)
    rest = [found.of_part(part) for part in found.parts if part != block]
    cost = sum((part.cost for part in rest), Cost())
    for row in each.rows:
        cost += row.cost * (row.count // block.count * layers)
    return cost, sum(part.seconds for part in rest) + each.seconds / block.count * layers


def test_llama_8b_reads_15_gigabytes_a_step_and_computes_16_gigaflops_a_token(tmp_path: Path) -> None:
    network = step_network(llama_8b(tmp_path, 2))
    context = 2047
    cost, seconds = deepened(profile_regions(network, Step(1, 1, context), H200), 32)
    linear = 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) + 128256 * 4096
    norms, embedding, frequencies = 65 * 4096, 4096, 64
    assert linear * 2 == 15_009_316_864
    assert cost.weights == 2 * (linear + norms + embedding) + 4 * frequencies
    assert cost.kv_reads == 32 * (context + 1) * 2 * 8 * 128 * 2
    assert cost.kv_writes == 32 * 2 * 8 * 128 * 2
    products = 2 * linear + 32 * 4 * 4096 * (context + 1)
    assert products == 16_083_058_688
    assert products < cost.flops < 1.001 * products
    assert seconds == pytest.approx(cost.bytes / H200.bandwidth)  # all of it is bound by memory
    assert cost.activations < 0.001 * cost.bytes


def test_llama_8b_prefill_is_bound_by_compute(tmp_path: Path) -> None:
    network = step_network(llama_8b(tmp_path, 2))
    tokens = 4096
    found = profile_regions(network, Step(tokens), H200)
    cost, seconds = deepened(found, 32)
    linear = 2 * 32 * 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336) * tokens + 2 * 128256 * 4096
    attention = 32 * 4 * 4096 * tokens * (tokens + 1) // 2
    assert linear + attention < cost.flops < 1.001 * (linear + attention)
    assert found.bound == "compute"
    assert (linear + attention) / 790e12 < seconds < 1.1 * (linear + attention) / 790e12
    assert {row.bound for row in found.rows if row.ops == ("packed_linear",) and row.count == 2} == {"compute"}


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "falcon", "bloom"])
def test_products_of_a_dense_model_are_two_flops_for_each_weight_and_token(name: str, tmp_path: Path) -> None:
    directory = make_checkpoint(name, tmp_path)
    network = step_network(directory)
    step = Step(tokens=6, sequences=2, context=5)
    found = profile_regions(network, step, H200)
    model = load(directory, torch.float32)
    head = model.get_output_embeddings().weight
    linears = [
        weight for key, weight in model.named_parameters()
        if weight.dim() == 2 and weight is not head and not any(part in key for part in ("embed", "wte", "wpe"))
    ]  # fmt: skip
    products = sum(row.total.flops for row in found.rows if row.ops == ("packed_linear",))
    assert products == 2 * (step.tokens * sum(map(torch.numel, linears)) + step.sequences * head.numel())
    assert not found.unknown


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_cost_what_the_chosen_ones_cost(name: str, tmp_path: Path) -> None:
    network = step_network(make_checkpoint(name, tmp_path))
    found, both = (profile_regions(network, Step(tokens, tokens, 5), H200) for tokens in (1, 1000))
    config = CONFIGS[name]()
    layers = config.num_hidden_layers - getattr(config, "first_k_dense_replace", 0)
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    total = getattr(config, "n_routed_experts", None) or config.num_local_experts
    each = 3 * config.hidden_size * inner

    def expert(found: Profile) -> Cost:
        return sum((row.total for row in found.rows if row.ops == ("expert_linear",)), Cost())

    biases = 2 * inner + config.hidden_size if name == "gpt_oss" else 0
    assert expert(found).flops == 2 * layers * config.num_experts_per_tok * each
    assert expert(found).weights == 2 * layers * config.num_experts_per_tok * (each + biases)
    assert expert(both).weights == pytest.approx(2 * layers * total * (each + biases))
    assert not found.unknown


def test_layers_with_and_without_a_window_are_rows_of_their_own(tmp_path: Path) -> None:
    network = step_network(make_checkpoint("gemma3_text", tmp_path))
    found = profile_regions(network, Step(1, 1, 100), H200)
    reads = [row.cost.kv_reads for row in found.rows if row.ops == ("paged_attention",)]
    each = 2 * 2 * 16 * 2
    assert reads == [8 * each, 101 * each]


def test_regions_and_the_whole_network_agree(tmp_path: Path) -> None:
    network = step_network(make_checkpoint("llama", tmp_path))
    step = Step(7, 3, 9)
    whole, regions = profile(network, step, H200), profile_regions(network, step, H200)
    assert whole.cost.flops == regions.cost.flops
    assert (whole.cost.weights, whole.cost.kv) == (regions.cost.weights, regions.cost.kv)
    assert whole.apart == regions.apart
    assert whole.cost.bytes < regions.cost.bytes < regions.apart.bytes  # a region's results go through memory


def test_profiling_changes_nothing_and_counts_every_layer_once(tmp_path: Path) -> None:
    network = step_network(make_checkpoint("llama", tmp_path))
    before = str(network)
    found = profile(network, Step(2, 2, 3), H200)
    assert str(network) == before
    ops = Counter(op for row in found.rows for op in row.ops * row.count)
    assert ops["packed_linear"] == 9
    assert ops["paged_attention"] == 2
    assert ops["rsqrt"] == 5


def test_the_table_is_aligned_and_its_numbers_are_those_of_json() -> None:
    network = Network.parse(
        "network 1\n"
        "input %x: float32[tokens, 8]\n"
        "constant %w: float32[4, 8]\n"
        "%linear: float32[tokens, 4] = aten.linear(%x, %w)\n"
        "%relu: float32[tokens, 4] = aten.relu(%linear)\n"
        "output y = %relu\n"
    )
    found = profile(network, Step(tokens=2), find_device("bandwidth=1e6,flops=1e6"))
    assert str(found).splitlines() == [
        "step of tokens 2, sequences 1, context 0, on bandwidth=1e6,flops=1e6",
        "layer  ops     ×  FLOPs  weights  activations   KV  FLOP/B  bound by  roofline     %  saved",
        ".      linear  1    128    128 B         96 B  0 B    0.57    memory    224 µs  77.8",
        ".      relu    1      8      0 B         64 B  0 B    0.12    memory   64.0 µs  22.2",
        "",
        "FLOPs      136",
        "bytes      288 B: weights 128 B, activations 160 B, KV cache 0 B; 288 B if nothing is fused",
        "intensity  0.47 FLOPs per byte, bound by memory",
        "roofline   288 µs, 6,944 tokens/s",
        "device     bandwidth=1e6,flops=1e6: 1.00 MB/s, float32 1.00 MFLOP/s (given)",
    ]
    total = found.to_json()["total"]
    assert (total["flops"], total["bytes"], total["roofline_seconds"]) == (136, 288, 288e-6)


def test_bound_by_compute_where_arithmetic_takes_longer() -> None:
    network = Network.parse(
        "network 1\ninput %x: bfloat16[64, 64]\n%mm: bfloat16[64, 64] = aten.mm(%x, %x)\noutput y = %mm\n"
    )
    (row,) = profile(network, Step(), find_device("bandwidth=1e9,bfloat16=1e9,float32=1e3")).rows
    assert (row.bound, row.seconds) == ("compute", 2 * 64**3 / 1e9)
    (row,) = profile(network, Step(), find_device("bandwidth=1e6,bfloat16=1e9")).rows
    assert (row.bound, row.seconds) == ("memory", 2 * 64 * 64 * 2 / 1e6)


def test_devices_are_found_by_name_or_by_numbers() -> None:
    assert find_device("H200") is DEVICES[0]
    assert find_device("h200,bandwidth=4.8e12").bandwidth == 4.8e12
    assert find_device("h200,bandwidth=4.8e12").flops == DEVICES[0].flops
    given = find_device("bandwidth=1e11,bfloat16=2e12,float32=1e12")
    assert given.flops == {torch.bfloat16: 2e12, torch.float32: 1e12}
    assert find_device("h100,flops=1e12").flops[torch.bfloat16] == 1e12
    assert all(device.source for device in DEVICES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h300", "--device-spec names no device 'h300'. Give one of cpu, h200, h100, a100"),
        ("bandwidth=1e12", "has no bandwidth or no FLOPs. Give bandwidth=BYTES_PER_SECOND,flops=FLOPS_PER_SECOND"),
        ("flops=1e12", "has no bandwidth or no FLOPs"),
        ("bandwidth=fast,flops=1", "'bandwidth=fast' is not a positive number. Give numbers such as 3.35e12"),
        ("bandwidth=-1,flops=1", "'bandwidth=-1' is not a positive number"),
        ("bandwidth=inf,flops=1", "'bandwidth=inf' is not a positive number"),
        ("h100,colour=1", "does not know 'colour'. Give bandwidth=…, flops=… or a dtype"),
        ("", "names no device ''"),
    ],
)
def test_a_wrong_device_is_refused_by_its_cause(text: str, words: str) -> None:
    with pytest.raises(UsageError) as error:
        find_device(text)
    assert words in str(error.value)


def test_the_cpu_is_measured_once_or_again_and_damaged_numbers_are_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINERY_CACHE", str(tmp_path))
    monkeypatch.setattr("enginery.analysis.cpu_device.READ_BYTES", 1 << 16)
    monkeypatch.setattr("enginery.analysis.cpu_device.MATRIX", 16)
    first = this_device("cpu")
    assert this_device("cpu") == first
    assert find_device("cpu").bandwidth >= first.bandwidth
    assert first.bandwidth > 0
    assert first.flops[torch.bfloat16] >= first.flops[torch.float32] > 0
    (path,) = (tmp_path / "devices").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps({**kept, "bandwidth": 123.0}))
    assert this_device("cpu").bandwidth == 123.0
    assert find_device("cpu").bandwidth > 123.0
    path.write_text(json.dumps({**kept, "bandwidth": 1e30}))
    assert find_device("cpu").bandwidth == 1e30
    for broken in ("", "[]", {**kept, "flops": {"float32": -1}}, {**kept, "flops": {"float32": 1, "load": 1}}):
        path.write_text(broken if isinstance(broken, str) else json.dumps(broken))
        assert this_device("cpu").bandwidth > 123.0
        assert json.loads(path.read_text())["flops"]["float32"] > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7, "7"), (999, "999"), (999.7, "1.00 k"), (1000, "1.00 k"), (15.01e9, "15.0 G"), (999.6e6, "1.00 G"),
     (0.25, "250 m"), (3.52e-3, "3.52 m"), (1.5e-9, "1.50 n"), (2e18, "2000 P")],
)  # fmt: skip
def test_numbers_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert si(value) == text
    assert si(15.01e9, "B/s") == "15.0 GB/s"


def test_columns_are_aligned() -> None:
    lines = columns(("a", "bb"), [("x", "1"), ("longer", "")], left=1, gaps=True)
    assert lines == ["a       bb", "x        1", "", "longer"]
