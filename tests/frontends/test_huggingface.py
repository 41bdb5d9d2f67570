"""What an import gives, and in which words it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tests.system.tiny_models import CONFIGS, LLAMA, load, make_checkpoint

from enginery import ops
from enginery.checkpoint import Checkpoint
from enginery.errors import CheckpointError, EngineryError, EngineryWarning, UnsupportedError
from enginery.frontends.huggingface import Imported, import_checkpoint
from enginery.rewriting.pipeline import run_phases

IDS = torch.tensor([5, 17, 3, 80, 44, 9, 61])


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return directory


def edit_config(directory: Path, **change: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return directory


def logits(imported: Imported, directory: Path) -> torch.Tensor:
    checkpoint, network = Checkpoint.open(directory), imported.network
    weights = {
        tensor.name: checkpoint.read(tensor.name).to(tensor.dtype)
        for tensor in network.constants
        if tensor.name not in network.values
    }
    (found,) = network.run([IDS, torch.arange(len(IDS))], weights)
    return found


def expected(directory: Path) -> torch.Tensor:
    with torch.no_grad():
        return load(directory, torch.float32)(input_ids=IDS[None], position_ids=torch.arange(len(IDS))[None]).logits[0]


def test_the_form_of_a_network(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    imported = import_checkpoint(Checkpoint.open(directory))
    network, facts = imported.network, imported.facts
    network.verify()
    assert [(tensor.name, str(tensor.shape), tensor.dtype) for tensor in network.inputs] == [
        ("token_ids", "(tokens,)", torch.int64), ("positions", "(tokens,)", torch.int64)
    ]  # fmt: skip
    assert network.output_names == ("logits",)
    assert str(network.outputs[0].shape) == "(tokens, 96)"
    names = {tensor.name for tensor in network.constants}
    assert names - set(network.values) == set(Checkpoint.open(directory).tensors)
    assert set(network.values) == {"model.rotary_emb.inv_freq"}
    attentions = [layer for layer in network if layer.op is ops.attention]
    assert [layer.module_path for layer in attentions] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert str(attentions[0].arguments["query"].shape) == "(tokens, 4, 8)"
    assert str(attentions[0].arguments["key"].shape) == "(tokens, 2, 8)"
    assert (facts.architecture, facts.model_type, facts.vocab_size) == ("LlamaForCausalLM", "llama", 96)
    assert (facts.num_layers, facts.hidden_size, facts.max_position_embeddings) == (2, 32, 256)
    assert (facts.num_attention_heads, facts.num_key_value_heads) == (4, 2)
    assert facts.dtype == torch.float32
    assert facts.eos_token_ids == (2,)


def test_a_dtype_of_choice(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    imported = import_checkpoint(Checkpoint.open(directory), dtype=torch.bfloat16)
    assert imported.facts.dtype == torch.bfloat16
    assert imported.network.tensor("lm_head.weight").dtype == torch.bfloat16
    assert imported.network.values["model.rotary_emb.inv_freq"].dtype == torch.float32
    edit_config(directory, dtype="float16")
    assert import_checkpoint(Checkpoint.open(directory)).facts.dtype == torch.float16
    edit_config(directory, dtype=None)
    assert import_checkpoint(Checkpoint.open(directory)).facts.dtype == torch.float32  # that of its tensors


def test_parameters_that_stay_wide(tmp_path: Path) -> None:
    network = import_checkpoint(Checkpoint.open(make_checkpoint("deepseek_v3", tmp_path)), dtype=torch.bfloat16).network
    wide = [
        tensor.name
        for tensor in network.constants
        if tensor.dtype == torch.float32 and tensor.name not in network.values
    ]
    assert wide == ["model.layers.1.mlp.gate.e_score_correction_bias"]


def test_a_tied_head_is_one_constant(tmp_path: Path) -> None:
    directory = make_checkpoint("llama_tied", tmp_path)
    imported = import_checkpoint(Checkpoint.open(directory))
    weight = imported.network.tensor("model.embed_tokens.weight")
    assert {layer.op._opname for layer in weight.users} == {"embedding", "linear"}
    assert "lm_head.weight" not in {tensor.name for tensor in imported.network.constants}
    torch.testing.assert_close(logits(imported, directory), expected(directory))


def test_a_tied_head_that_is_stored_under_its_own_name(tmp_path: Path) -> None:
    directory = make_checkpoint("llama_tied", tmp_path)
    edit_weights(
        directory, lambda state: {key.replace("model.embed_tokens", "lm_head"): value for key, value in state.items()}
    )
    imported = import_checkpoint(Checkpoint.open(directory))
    assert {layer.op._opname for layer in imported.network.tensor("lm_head.weight").users} == {"embedding", "linear"}
    torch.testing.assert_close(logits(imported, directory), expected(directory))


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_is_stored_twice(tmp_path: Path, same: bool) -> None:
    directory = make_checkpoint("llama_tied", tmp_path)

    def twice(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = state["model.embed_tokens.weight"]
        return state | {"lm_head.weight": head.clone() if same else head.flip(0).contiguous()}

    imported = import_checkpoint(Checkpoint.open(edit_weights(directory, twice)))
    assert ("lm_head.weight" in {tensor.name for tensor in imported.network.constants}) != same
    torch.testing.assert_close(logits(imported, directory), expected(directory))


def test_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    directory = make_checkpoint("gpt2", tmp_path)
    edit_weights(directory, lambda state: {key.removeprefix("transformer."): value for key, value in state.items()})
    imported = import_checkpoint(Checkpoint.open(directory))
    assert "h.0.attn.c_attn.weight" in {tensor.name for tensor in imported.network.constants}
    torch.testing.assert_close(logits(imported, directory), expected(directory))


def test_experts_are_stacked_from_the_checkpoints_tensors(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path)
    checkpoint = Checkpoint.open(directory)
    assert any("experts.3.w1" in name for name in checkpoint.tensors)
    imported = import_checkpoint(checkpoint)
    network = imported.network
    assert {tensor.name for tensor in network.constants} - set(network.values) == set(checkpoint.tensors)
    expert_layers = [layer for layer in network if layer.op is ops.expert_linear]
    assert len(expert_layers) == 4
    assert all(layer.arguments["weight"].is_constant for layer in expert_layers)
    torch.testing.assert_close(logits(imported, directory), expected(directory))


def test_tensors_that_no_layer_needs_are_left_out(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    edit_weights(directory, lambda state: state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    imported = import_checkpoint(Checkpoint.open(directory))
    assert not any("self_attn.rotary_emb" in tensor.name for tensor in imported.network.constants)


@pytest.mark.parametrize("longest", [64, 256])
def test_longrope_takes_the_frequencies_of_the_longest_sequence(tmp_path: Path, longest: int) -> None:
    scaling = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    config = hf.Phi3Config(**LLAMA, pad_token_id=0, rope_scaling=scaling, original_max_position_embeddings=64)
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    imported = import_checkpoint(Checkpoint.open(tmp_path), max_length=longest)
    factors = torch.tensor(scaling["short_factor"] if longest == 64 else scaling["long_factor"])
    expected_frequencies = 1.0 / (factors * 10000.0 ** (torch.arange(0, 8, 2) / 8))
    torch.testing.assert_close(imported.network.values["model.rotary_emb.inv_freq"], expected_frequencies)
    if longest == 64:
        torch.testing.assert_close(logits(imported, tmp_path), expected(tmp_path))


def refuse(directory: Path, kind: type[EngineryError], *messages: str) -> None:
    with pytest.raises(kind) as caught:
        run_phases(import_checkpoint(Checkpoint.open(directory)).network)
    text = str(caught.value)
    assert all(message in text for message in messages), text
    assert "\n" not in text
    assert caught.value.exit_code == 3


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    missing = "model.layers.1.mlp.up_proj.weight"
    edit_weights(directory, lambda state: {key: value for key, value in state.items() if key != missing})
    refuse(directory, CheckpointError, f"no tensor for the parameter {missing}", "Is a shard missing?")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    directory = make_checkpoint("mixtral", tmp_path)
    edit_weights(
        directory,
        lambda state: {key: value for key, value in state.items() if "0.block_sparse_moe.experts.2.w2" not in key},
    )
    refuse(directory, CheckpointError, "experts", "needs [4, 32, 64]")


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    directory = edit_config(make_checkpoint("llama", tmp_path), intermediate_size=80)
    refuse(directory, CheckpointError, "model.layers.0.mlp.gate_proj.weight", "[64, 32]", "[80, 32]", "another model")


def test_unknown_architectures(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    edit_config(directory, model_type="llama9", architectures=["Llama9ForCausalLM"])
    refuse(directory, UnsupportedError, "does not know Llama9ForCausalLM (llama9)", "newer transformers")


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    directory = make_checkpoint("llama", tmp_path)
    (tmp_path / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    import_checkpoint(Checkpoint.open(directory))
    edit_config(directory, model_type="evil")
    refuse(directory, UnsupportedError, "never run")
    assert not (tmp_path / "ran").exists()


def other(directory: Path, config: hf.PreTrainedConfig) -> Path:
    config.save_pretrained(directory)
    kind = hf.AutoModelForCausalLM if type(config) in hf.MODEL_FOR_CAUSAL_LM_MAPPING else hf.AutoModel
    kind.from_config(config).save_pretrained(directory)
    return directory


def test_encoders_and_decoders_that_are_none(tmp_path: Path) -> None:
    config = hf.T5Config(vocab_size=96, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    refuse(other(tmp_path / "t5", config), UnsupportedError, "t5 cannot be imported: it is no causal language model")
    config = hf.BertConfig(
        vocab_size=96, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    refuse(other(tmp_path / "bert", config), UnsupportedError, "both directions")


def test_recurrences(tmp_path: Path) -> None:
    config = hf.MambaConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1)
    refuse(other(tmp_path, config), UnsupportedError, "mamba cannot be imported", "unrolled over the tokens")


def test_control_flow_that_depends_on_data(tmp_path: Path) -> None:
    attention = {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}
    experts = {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}
    config = hf.DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, max_seq_len=64, vocab_size=96, attn_config=attention, ffn_config=experts
    )
    refuse(other(tmp_path, config), UnsupportedError, "dbrx cannot be imported", "depends on data", "modeling_dbrx.py:")


def test_attention_in_chunks(tmp_path: Path) -> None:
    config = hf.Llama4TextConfig(**LLAMA, intermediate_size_mlp=64, num_local_experts=4, head_dim=8)
    refuse(other(tmp_path, config), UnsupportedError, "llama4_text cannot be imported", "chunks of 8192 tokens")


def test_convolutions_along_the_sequence(tmp_path: Path) -> None:
    config = hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"])
    refuse(other(tmp_path, config), UnsupportedError, "conv")


def test_every_architecture_of_the_system_test_has_a_name() -> None:
    assert len(CONFIGS) >= 30


def test_tensors_without_a_place_are_told(tmp_path: Path) -> None:
    directory = edit_config(make_checkpoint("llama", tmp_path), num_hidden_layers=1)
    with pytest.warns(EngineryWarning, match=r"no place for 9 tensors, such as model\.layers\.1\."):
        import_checkpoint(Checkpoint.open(directory))


def test_buffers_that_older_versions_stored_are_not(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    directory = make_checkpoint("llama", tmp_path)
    edit_weights(directory, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    import_checkpoint(Checkpoint.open(directory))
    assert not [warning for warning in recwarn if warning.category is EngineryWarning]


def test_more_layers_than_tensors_are_refused_before_any_is_made(tmp_path: Path) -> None:
    directory = edit_config(make_checkpoint("llama", tmp_path), num_hidden_layers=4000)
    with pytest.raises(CheckpointError, match=r"config.json names 4000 layers, but there are [0-9]+ tensors in all"):
        import_checkpoint(Checkpoint.open(directory))
