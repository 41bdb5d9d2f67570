"""The audit of dtypes: what is wide and why, casts that cancel, on networks by hand and on a real one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from tests.analysis.test_profile import step_network
from tests.system.tiny_models import make_checkpoint

from enginery.analysis import audit_dtypes
from enginery.analysis.dtypes import Cast, RoundTrip, Wide
from enginery.network import Network, Tensor

BF16, F32 = torch.bfloat16, torch.float32


def network_with_weight() -> tuple[Network, Tensor]:
    network = Network()
    network.add_constant("w", (64, 64), BF16)
    return network, network.add_input("x", (4, 8), BF16)


def test_a_wide_norm_says_that_it_casts_its_input() -> None:
    network, x = network_with_weight()
    for i in range(2):
        with network.inserting_before(None, module_path=f"layers.{i}.norm"):
            wide = x.float()
            x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True))).bfloat16()
    network.set_output("out", x)
    found = audit_dtypes(network)
    assert found.dtype == BF16
    assert found.casts == Counter({Cast("layers.*.norm", BF16, F32): 2, Cast("layers.*.norm", F32, BF16): 2})
    assert found.wide == (Wide("layers.*.norm", F32, frozenset({"cast in layers.*.norm"}), 10),)
    assert "layers.*.norm   float32  it casts its input      10" in str(found)
    assert str(found).startswith("weights are bfloat16; 2 casts to wider dtypes and 2 to narrower\n")


def test_a_wide_constant_is_named_and_its_trace_is_followed() -> None:
    network, x = network_with_weight()
    scale = network.add_constant("layers.0.scale", (8,), F32)
    with network.inserting_before(None, module_path="layers.0"):
        scaled = x * scale
    with network.inserting_before(None, module_path="layers.0.after"):
        network.set_output("out", torch.relu(scaled.unsqueeze(0)))
    reason = frozenset({"layers.*.scale is float32"})
    assert audit_dtypes(network).wide == (Wide("layers.*", F32, reason), Wide("layers.*.after", F32, reason))


def test_an_operator_that_widens_by_itself_is_named() -> None:
    network, x = network_with_weight()
    network.set_output("out", torch.softmax(x, -1, dtype=F32))
    (fact,) = audit_dtypes(network).wide
    assert fact.because == {"softmax gives it in the network"}


def test_casts_that_undo_each_other_are_found_through_views() -> None:
    network, x = network_with_weight()
    network.set_output("same", x.float().reshape(32).bfloat16())
    network.set_output("rounded", network.add_input("y", (4,), F32).bfloat16().unsqueeze(0).float())
    network.set_output("apart", torch.relu(x.float()).bfloat16())
    found = audit_dtypes(network)
    exact, rounded = RoundTrip("", BF16, F32), RoundTrip("", F32, BF16)
    assert found.round_trips == Counter({exact: 1, rounded: 1})
    assert exact.is_exact
    assert not rounded.is_exact
    assert ".: 1 × casts that cancel" in str(found)
    assert ".: 1 × values rounded to bfloat16 and widened again" in str(found)


def test_what_is_folded_and_integers_do_not_count() -> None:
    network, x = network_with_weight()
    weight = network.add_constant("v", (8,), BF16).float().bfloat16()
    ids = network.add_input("ids", (4,), torch.int64).int()
    network.set_output("out", x * weight)
    network.set_output("ids", ids)
    found = audit_dtypes(network)
    assert (found.casts, found.wide, found.round_trips) == (Counter(), (), Counter())


def test_weights_of_eight_bits_do_not_make_everything_wide() -> None:
    network, x = network_with_weight()
    quantised = network.add_constant("q", (256, 256), torch.float8_e4m3fn)
    network.set_output("out", torch.relu(x) + quantised.bfloat16()[0, :8])
    found = audit_dtypes(network)
    assert (found.dtype, found.wide) == (BF16, ())


def test_a_float32_network_has_nothing_wide() -> None:
    network = Network()
    x = network.add_input("x", (4, 8), F32)
    network.set_output("out", x * network.add_constant("w", (8,), F32))
    assert audit_dtypes(network).wide == ()


def test_mixtral_weighs_its_experts_in_float32_because_of_the_router(tmp_path: Path) -> None:
    found = audit_dtypes(step_network(make_checkpoint("mixtral", tmp_path)))
    (experts,) = (fact for fact in found.wide if fact.path.endswith("experts"))
    assert experts.because == {"cast in model.layers.*.mlp.gate"}
    assert experts.dtype == F32
