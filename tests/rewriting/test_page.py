"""The page of a rewritten network: its facts, and that it is complete in itself and inert."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from enginery.network import Network
from enginery.rewriting import PatternRewriter, RewritePatternManager, Var
from enginery.rewriting.lineage import Lineage
from enginery.rewriting.page import page
from enginery.rewriting.page.facts import OUTSIDE, WHOLE, equation, page_facts

HOSTILE = "</script><script>document.body.dataset.pwned=1</script><img src=x onerror=alert(1)>&amp;\"'"


class Mlp(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(8, 16)
        self.down = torch.nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(8)
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Model(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return torch.tanh(x)


class SiluByHand(PatternRewriter):
    """silu(x) = x · sigmoid(x)

    More words, which the page leaves out.
    """

    pattern = F.silu(Var("x"))

    def rewrite(self, x: Any) -> Any:
        return x * torch.sigmoid(x)


class SigmoidOfTanh(PatternRewriter):
    """sigmoid(x) = (1 + tanh(x / 2)) / 2"""

    pattern = torch.sigmoid(Var("x"))

    def rewrite(self, x: Any) -> Any:
        return torch.tanh(x * 0.5) * 0.5 + 0.5


Rewritten = tuple[Network, Network, list]


def rewritten(network: Network, *rules: tuple[str, PatternRewriter]) -> Rewritten:
    before, phases = network.copy(), []
    for label, rule in rules:
        manager = RewritePatternManager()
        manager.add(label, rule)
        phases.append((f"phase of {label}", manager.rewrite(network)))
    return before, network, phases


@pytest.fixture(scope="module")
def model() -> Rewritten:
    network = Network.from_module(Model(3), (torch.randn(4, 8),))
    return rewritten(network, ("SiluByHand", SiluByHand()), ("SigmoidOfTanh", SigmoidOfTanh()))


def names(side: dict) -> list[str]:
    return [layer["name"] for layer in side["layers"]]


def test_blocks_that_look_alike_are_one_part(model: Rewritten) -> None:
    facts = page_facts(*model, title="m")
    block, rest = facts["parts"]
    assert (block["name"], block["blocks"]) == ("layers.0", ["layers.0", "layers.1", "layers.2"])
    assert names(block["before"]) == [
        "layers.0.norm.layer_norm", "layers.0.mlp.up.linear", "layers.0.mlp.silu", "layers.0.mlp.down.linear",
        "layers.0.add",
    ]  # fmt: skip
    assert len(block["after"]["layers"]) == 9
    assert (rest["name"], names(rest["before"]), names(rest["after"])) == (OUTSIDE, ["tanh"], ["tanh"])
    assert block["before"]["total"] == 16


def test_a_layer_shows_its_whole_call(model: Rewritten) -> None:
    block = page_facts(*model, title="m")["parts"][0]["before"]
    norm, up, *_ = block["layers"]
    assert [arg["name"] for arg in norm["args"]] == [
        "input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable",
    ]  # fmt: skip
    assert norm["args"][0]["value"] == [{"tensor": "x"}]
    assert norm["args"][1] == {"name": "normalized_shape", "value": ["[8]"], "omitted": False}
    assert norm["args"][5]["omitted"]
    assert up["outputs"][0]["type"] == "float32[4, 16]"
    assert up["outputs"][0]["readers"] == ["layers.0.mlp.silu"]
    assert block["outside"]["x"] == {"type": "float32[4, 8]", "kind": "input"}
    assert block["outside"]["layers.0.mlp.up.bias"] == {"type": "float32[16]", "kind": "constant"}


def test_provenance_goes_back_to_the_import_and_forward_from_it(model: Rewritten) -> None:
    block = page_facts(*model, title="m")["parts"][0]
    silu = block["before"]["layers"][2]
    assert silu["gone"] == {"phase": "phase of SiluByHand", "rule": "SiluByHand"}
    made = {layer["name"]: layer for layer in block["after"]["layers"] if layer["history"]}
    assert set(silu["heirs"]) == set(made)
    tanh = made["layers.0.mlp.tanh"]
    assert [step["rule"] for step in tanh["history"]] == ["SigmoidOfTanh", "SiluByHand"]
    assert tanh["origins"] == ["layers.0.mlp.silu"]
    untouched = block["before"]["layers"][1]
    assert (untouched["gone"], untouched["heirs"], untouched["history"]) == (None, [], [])


def test_lineage_of_layers_that_are_in_neither_network(model: Rewritten) -> None:
    lineage = Lineage(model[2])
    sigmoid = lineage.made("layers.1.mlp.sigmoid")
    assert sigmoid is not None
    assert sigmoid.application.rule == "SiluByHand"
    gone = lineage.gone("layers.1.mlp.sigmoid")
    assert gone is not None
    assert gone.phase == "phase of SigmoidOfTanh"
    assert lineage.origins("never.there") == ["never.there"]
    assert lineage.history("never.there") == []


def test_phases_and_rules_are_counted(model: Rewritten) -> None:
    facts = page_facts(*model, title="m")
    assert [(p["name"], p["before"], p["after"]) for p in facts["phases"]] == [
        ("phase of SiluByHand", 16, 19),
        ("phase of SigmoidOfTanh", 19, 28),
    ]
    assert facts["phases"][0]["rules"][0]["applied"] == 3
    assert [rule["label"] for rule in facts["rules"]] == ["SiluByHand", "SigmoidOfTanh"]
    assert facts["rules"][0]["equation"] == "silu(x) = x · sigmoid(x)"
    assert re.search(r"test_page\.py:\d+$", facts["rules"][0]["location"])


@pytest.mark.parametrize("location", ["?", "/no/such/file.py:3", f"{__file__}x:1"])
def test_a_rule_without_a_file_has_no_equation(location: str) -> None:
    assert equation(location) == ""


def test_a_network_without_repeated_layers_is_one_part() -> None:
    network = Network.from_module(Mlp(), (torch.randn(2, 8),))
    (part,) = page_facts(*rewritten(network), title="m")["parts"]
    assert (part["name"], part["blocks"]) == (WHOLE, [])


def test_the_page_loads_nothing_and_its_policy_names_its_script(model: Rewritten) -> None:
    text = page(*model, title="a <b> & c")
    assert "<title>a &lt;b&gt; &amp; c: rewriting</title>" in text
    assert not re.search(r"(?:src|href)\s*=|@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text
    assert "eval(" not in script
    assert "innerHTML" not in script
    assert page(*model, title="a <b> & c") == text


def hostile() -> Rewritten:
    network = Network()
    x = network.add_input(f"x{HOSTILE}", (4, 8), torch.float32)
    for block in range(2):
        with network.inserting_before(None, module_path=f"layers.{block}.{HOSTILE}"):
            x = network.call(torch.ops.aten.silu.default, x, name=f"layers.{block}.{HOSTILE}.silu")
            x = network.call(torch.ops.aten.neg.default, x)
    network.set_output(HOSTILE, x)
    return rewritten(network, (HOSTILE, SiluByHand()))


def test_names_are_data_and_never_markup() -> None:
    text = page(*hostile(), title=HOSTILE)
    assert "<script>document" not in text
    assert "<img" not in text
    assert len(re.findall(r"<script", text)) == 2
    (data,) = re.findall(r'<script type="application/json" id="facts">(.*?)</script>', text, flags=re.DOTALL)
    facts = json.loads(data)
    assert facts["title"] == HOSTILE
    assert facts["rules"][0]["label"] == HOSTILE
    assert HOSTILE in facts["parts"][0]["before"]["layers"][0]["path"]
