"""What the manager promises."""

from __future__ import annotations

import json
import threading
from types import MappingProxyType

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import RewriteError, RewriteLimitError
from enginery.network import LayerKind, Network
from enginery.rewriting import Const, MatchFailure, PatternRewriter, RewritePatternManager, Var
from rewriting.building import network_of, ops_of

aten = torch.ops.aten


class FoldBias(PatternRewriter):
    """linear(x, w) + b  ->  linear(x, w, b)"""

    pattern = F.linear(Var("x"), Const("w")) + Const("b", rank=1)

    def rewrite(self, x, w, b):
        return F.linear(x, w, b)


class SiluByHand(PatternRewriter):
    pattern = F.silu(Var("x"))

    def rewrite(self, x):
        return x * torch.sigmoid(x)


def test_golden_before_and_after():
    network = network_of(lambda x, w, b: F.silu(F.linear(x, w) + b))
    assert str(network) == (
        "network 1\n"
        "input %x: float32[tokens, 8]\n"
        "constant %w: float32[8, 8]\n"
        "constant %b: float32[8]\n"
        "%linear: float32[tokens, 8] = aten.linear(%x, %w)\n"
        "%add: float32[tokens, 8] = aten.add.Tensor(%linear, %b)\n"
        "%silu: float32[tokens, 8] = aten.silu(%add)\n"
        "output out_0 = %silu\n"
    )
    RewritePatternManager(FoldBias()).rewrite(network)
    assert str(network) == (
        "network 1\n"
        "input %x: float32[tokens, 8]\n"
        "constant %w: float32[8, 8]\n"
        "constant %b: float32[8]\n"
        "%linear_1: float32[tokens, 8] = aten.linear(%x, %w, bias=%b) <- FoldBias(add, linear)\n"
        "%silu: float32[tokens, 8] = aten.silu(%linear_1)\n"
        "output out_0 = %silu\n"
    )


def test_three_forms_of_a_rule_do_the_same():
    class Imperative(PatternRewriter):
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            (x,) = layer.inputs
            return x * torch.sigmoid(x)

    class Split(PatternRewriter):
        root_layer = (LayerKind.ACTIVATION, "aten.silu")

        def match(self, layer):
            return layer.op is aten.silu.default

        def rewrite(self, layer):
            (x,) = layer.inputs
            return x * torch.sigmoid(x)

    for rule in (SiluByHand(), Imperative(), Split()):
        network = network_of(lambda x: F.silu(x) + 1)
        report = RewritePatternManager(rule).rewrite(network)
        assert ops_of(network) == ["sigmoid", "mul", "add"]
        assert report[type(rule).__name__].rewritten == 1


def test_split_match_is_asked_once_per_layer():
    calls = []

    class Split(PatternRewriter):
        root_layer = (aten.silu,)

        def match(self, layer):
            calls.append(("match", layer.name))
            return True

        def rewrite(self, layer):
            calls.append(("rewrite", layer.name))
            return torch.relu(layer.inputs[0])

    RewritePatternManager(Split()).rewrite(network_of(lambda x: F.silu(x)))
    assert calls == [("match", "silu"), ("rewrite", "silu")]


def test_captures_arrive_by_name_with_root_network_and_args():
    seen = {}

    class Rule(PatternRewriter):
        pattern = F.silu(Var("x"))
        args = MappingProxyType({"own": 1, "both": 1})

        def check(self, args, x):
            seen["args"] = dict(args)
            return True

        def rewrite(self, network, *, root, x, more=5):
            seen.update(network=network, root=root, x=x, more=more)

    network = network_of(lambda x: F.silu(x))
    RewritePatternManager(Rule()).rewrite(network, args={"both": 2, "given": 3})
    assert seen == {
        "args": {"own": 1, "both": 2, "given": 3},
        "network": network, "root": network.layer("silu"), "x": network.tensor("x"), "more": 5,
    }  # fmt: skip


def test_each_layer_is_offered_once_when_nothing_changes():
    class Never(PatternRewriter):
        pattern = F.relu(Var("x")) + Var("y")

        def rewrite(self, x, y):
            return None

    network = network_of(lambda x, y: sum(F.relu(x) + y for _ in range(10)))
    report = RewritePatternManager(Never()).rewrite(network)
    assert report["Never"].tried == sum(op == "add" for op in ops_of(network))


def test_higher_benefit_first_then_registration():
    order = []

    def rule(name, benefit):
        def rewrite(self, x):
            order.append(name)

        return type(name, (PatternRewriter,), {"pattern": F.silu(Var("x")), "benefit": benefit, "rewrite": rewrite})()

    manager = RewritePatternManager(rule("low", 0), rule("first", 5), rule("second", 5))
    manager.add("raised", rule("raised", 0), benefit=9)
    manager.rewrite(network_of(lambda x: F.silu(x)))
    assert order == ["raised", "first", "second", "low"]


def test_results_may_be_a_tensor_a_tuple_or_a_dictionary():
    class Halves(PatternRewriter):
        pattern = torch.split(Var("x"), [4, 4], dim=-1)

        def rewrite(self, x):
            return x[:, :4], x[:, 4:]

    class ByRoot(Halves):
        def rewrite(self, root, x):
            return {root: (x[:, :4], x[:, 4:])}

    class ByTensor(Halves):
        def rewrite(self, root, x):
            return {root.outputs[1]: x[:, 4:], root.outputs[0]: x[:, :4]}

    for rule in (Halves(), ByRoot(), ByTensor()):
        network = network_of(lambda x: tuple(torch.split(x, [4, 4], dim=-1)))
        report = RewritePatternManager(rule).rewrite(network, verify=True)
        assert ops_of(network) == ["slice", "slice"]
        assert report.verified


def test_an_output_that_nobody_reads_needs_no_replacement():
    class First(PatternRewriter):
        pattern = torch.split(Var("x"), [4, 4], dim=-1)

        def rewrite(self, x):
            return x[:, :4], None

    network = network_of(lambda x: torch.split(x, [4, 4], dim=-1)[0])
    RewritePatternManager(First()).rewrite(network)
    assert ops_of(network) == ["slice"]


def test_rules_may_use_layers_and_root_replace():
    class Transposed(PatternRewriter):
        pattern = F.softmax(Var("x"), dim=-1)

        def rewrite(self, root, x):
            return root.replace(dim=1)

    network = network_of(lambda x: F.softmax(x, dim=-1))
    RewritePatternManager(Transposed()).rewrite(network, verify=True)
    assert network.layers[0].arguments["dim"] == 1


def test_replaced_layers_are_erased_with_what_only_they_needed():
    network = network_of(lambda x, y: (F.silu(torch.exp(x)), torch.tanh(y)))

    class Drop(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, network, x):
            return network.tensor("y")

    report = RewritePatternManager(Drop()).rewrite(network)
    assert ops_of(network) == ["tanh"]
    assert network.outputs[0] is network.tensor("y")
    assert (report.layers_before, report.layers_after) == (3, 1)


def test_provenance_and_module_path_of_new_layers():
    network = network_of(lambda x, w, b: F.linear(x, w) + b)
    network.layer("add").module_path = "model.layers.3.mlp"
    RewritePatternManager(FoldBias()).rewrite(network)
    (layer,) = network
    assert layer.provenance.rule == "FoldBias"
    assert layer.provenance.replaced == ("add", "linear")
    assert layer.module_path == "model.layers.3.mlp"


def test_the_report():
    network = network_of(lambda x, w, b, y: (F.linear(x, w) + b, F.linear(x, w) + y))
    report = RewritePatternManager(FoldBias()).rewrite(network)
    fact = report["FoldBias"]
    assert (fact.tried, fact.matched, fact.rewritten, dict(fact.declined)) == (2, 1, 1, {})
    assert fact.milliseconds > 0
    file, _, line = fact.location.rpartition(":")
    assert file == __file__
    assert int(line) == FoldBias.rewrite.__code__.co_firstlineno
    assert report.applications[0].replaced == ("add", "linear")
    assert "FoldBias" in str(report)
    assert "4 layers → 3" in str(report)
    assert json.loads(json.dumps(report.to_json()))["rules"]["FoldBias"]["rewritten"] == 1
    assert report.diff(report) == ""
    other = RewritePatternManager(FoldBias()).rewrite(network)
    assert "rewritten 1 → 0" in report.diff(other)


def test_every_decline_has_a_reason():
    class Picky(PatternRewriter):
        pattern = F.silu(Var("x"))

        def check(self, x):
            if x.name == "y":
                raise MatchFailure("y is not wanted")
            return x.name != "z"

        def rewrite(self, x):
            if x.name == "u":
                raise MatchFailure("too late for u")
            return

    report = RewritePatternManager(Picky()).rewrite(
        network_of(lambda x, y, z, u: (F.silu(x), F.silu(y), F.silu(z), F.silu(u)))
    )
    assert report["Picky"].declined == {
        "y is not wanted": 1, "check returned False": 1, "too late for u": 1, "rewrite returned None": 1,
    }  # fmt: skip


def test_layers_that_a_declining_rule_appended_are_gone():
    class Late(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, network, x):
            torch.exp(x) + network.add_constant("extra", (8,), torch.float32, torch.ones(8))
            raise MatchFailure("changed my mind")

    network = network_of(lambda x: F.silu(x))
    before = str(network)
    RewritePatternManager(Late()).rewrite(network)
    assert str(network) == before
    assert network.values == {}


def test_an_exception_leaves_the_network_as_before_that_rule():
    class Raises(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            torch.exp(torch.exp(x))
            raise ValueError("half way")

    network = network_of(lambda x, w, b: F.silu(F.linear(x, w) + b))
    copy = network.copy()
    RewritePatternManager(FoldBias()).rewrite(copy)
    with pytest.raises(RewriteError, match="Raises raised ValueError: half way") as caught:
        RewritePatternManager(FoldBias(), Raises()).rewrite(network)
    assert (caught.value.rule, caught.value.layer) == ("Raises", "silu")
    assert str(network) in (str(copy), str(network_of(lambda x, w, b: F.silu(F.linear(x, w) + b))))
    network.verify()


@pytest.mark.parametrize("wrong", [lambda x: x.sum(-1), lambda x: x.double(), lambda x: x[:, :1]])
def test_a_wrong_type_is_an_error_with_rule_and_layer(wrong):
    class Wrong(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return wrong(x)

    network = network_of(lambda x: F.silu(x))
    before = str(network)
    with pytest.raises(RewriteError, match="declare changes_dtype or changes_shape") as caught:
        RewritePatternManager(Wrong()).rewrite(network)
    assert (caught.value.rule, caught.value.layer) == ("Wrong", "silu")
    assert str(network) == before


def test_declared_changes_of_type_reach_the_layers_behind():
    class Wide(PatternRewriter):
        pattern = F.silu(Var("x", dtype=torch.float32))
        changes_dtype = True

        def rewrite(self, x):
            return F.silu(x.double())

    network = network_of(lambda x: F.relu(F.silu(x)) * 2)
    RewritePatternManager(Wide()).rewrite(network)
    assert network.outputs[0].dtype == torch.float64
    network.verify()


@pytest.mark.parametrize("result", [1, "text", True, [], (None,), {"silu": None}, object()])
def test_a_result_of_the_wrong_form_is_an_error(result):
    class Odd(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return result

    network = network_of(lambda x: F.silu(x))
    before = str(network)
    with pytest.raises(RewriteError) as caught:
        RewritePatternManager(Odd()).rewrite(network)
    assert caught.value.rule == "Odd"
    assert str(network) == before


def test_a_value_of_another_network_is_refused():
    foreign = network_of(lambda x: F.relu(x)).outputs[0]

    class Foreign(PatternRewriter):
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return foreign

    with pytest.raises(RewriteError, match="not in this network"):
        RewritePatternManager(Foreign()).rewrite(network_of(lambda x: F.silu(x)))


@pytest.mark.parametrize(
    "mutation",
    [
        lambda network, root, x: root.output.replace_all_uses_with(x),
        lambda network, root, x: network.erase(root),
        lambda network, root, x: root.set_argument("self", network.tensor("x")),
        lambda network, root, x: root.replace_input(x, network.tensor("x")),
        lambda network, root, x: network.set_output("out_0", x),
        lambda network, root, x: network.move_before(root, network.layers[0]),
    ],
)
def test_a_rule_cannot_change_the_network_itself(mutation):
    class Mutates(PatternRewriter):
        pattern = F.silu(Var("e"))

        def rewrite(self, network, root, e):
            mutation(network, root, e)
            return e

    network = network_of(lambda x: F.silu(torch.exp(x)))
    before = str(network)
    with pytest.raises(RewriteError, match="only be appended to") as caught:
        RewritePatternManager(Mutates()).rewrite(network)
    assert caught.value.rule == "Mutates"
    assert str(network) == before


def test_the_limit_names_the_rules_that_keep_firing_and_restores_the_network():
    class Ping(PatternRewriter):
        pattern = F.relu(Var("x"))

        def rewrite(self, x):
            return torch.sigmoid(x)

    class Pong(PatternRewriter):
        pattern = torch.sigmoid(Var("x"))

        def rewrite(self, x):
            return F.relu(x)

    network = network_of(lambda x, w, b: F.relu(F.linear(x, w) + b))
    before = str(network)
    with pytest.raises(
        RewriteLimitError, match=r"Ping \d+ times, Pong \d+ times|Pong \d+ times, Ping \d+ times"
    ) as caught:
        RewritePatternManager(FoldBias(), Ping(), Pong()).rewrite(network, limit=50)
    assert caught.value.rule in ("Ping", "Pong")
    assert str(network) == before
    network.verify()


def test_a_rule_that_hangs_in_its_own_output_ends_at_the_default_limit():
    class Twice(PatternRewriter):
        pattern = F.relu(Var("x"))

        def rewrite(self, x):
            return F.relu(x)

    with pytest.raises(RewriteLimitError, match="Twice"):
        RewritePatternManager(Twice()).rewrite(network_of(lambda x: F.relu(x)))


def test_verification_takes_back_the_rule_that_changes_results():
    class Wrong(PatternRewriter):
        pattern = torch.sigmoid(Var("x"))

        def rewrite(self, x):
            return torch.tanh(x)

    network = network_of(lambda x, w, b: torch.sigmoid(F.silu(F.linear(x, w) + b)))
    report = RewritePatternManager(FoldBias(), SiluByHand(), Wrong()).rewrite(network, verify=True)
    assert report.verified
    assert "differs by" in report["Wrong"].rolled_back
    assert report["FoldBias"].rewritten == 1
    assert "tanh" not in ops_of(network)
    assert "sigmoid" in ops_of(network)


def test_verification_on_given_inputs():
    class OnlyForPositive(PatternRewriter):
        pattern = F.relu(Var("x"))

        def rewrite(self, x):
            return torch.abs(x)

    positive = torch.rand(5, 8)
    network = network_of(lambda x: F.relu(x))
    assert (
        not RewritePatternManager(OnlyForPositive()).rewrite(network, verify=[positive])["OnlyForPositive"].rolled_back
    )
    network = network_of(lambda x: F.relu(x))
    assert (
        RewritePatternManager(OnlyForPositive())
        .rewrite(network, verify={"x": -positive})["OnlyForPositive"]
        .rolled_back
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"pattern": Var("x"), "rewrite": lambda self, x: x}, "binds no root"),
        ({"pattern": F.relu(Var("x")), "rewrite": lambda self, y: y}, "asks for 'y'"),
        ({"pattern": F.relu(Var("x")), "check": lambda self, z: z, "rewrite": lambda self, x: x}, "asks for 'z'"),
        ({"pattern": F.relu(Var("x"))}, "no rewrite"),
        ({"pattern": "relu", "rewrite": lambda self: None}, "is no pattern"),
        ({}, "no pattern and no match_and_rewrite"),
        ({"pattern": (F.relu(Var("x")), F.relu(Var("y"))), "rewrite": lambda self: None}, "share no value"),
    ],
)
def test_a_rule_that_cannot_run_is_refused_when_added(body, message):
    with pytest.raises(RewriteError, match=message) as caught:
        RewritePatternManager(type("Broken", (PatternRewriter,), body)())
    assert caught.value.rule == "Broken"


def test_two_rules_with_one_label():
    with pytest.raises(RewriteError, match="two rules are labelled FoldBias"):
        RewritePatternManager(FoldBias(), FoldBias())
    manager = RewritePatternManager(FoldBias())
    manager.add("again", FoldBias())
    assert manager.labels == ("FoldBias", "again")
    assert manager.get("again") is not manager.get("FoldBias")


def test_a_rule_that_matches_nothing_is_only_reported():
    network = network_of(lambda x: F.relu(x))
    report = RewritePatternManager(FoldBias()).rewrite(network)
    assert (report["FoldBias"].tried, report["FoldBias"].rewritten) == (0, 0)


def test_threads_with_two_networks_and_one_manager():
    manager = RewritePatternManager(FoldBias(), SiluByHand())
    networks = [network_of(lambda x, w, b: sum(F.silu(F.linear(x, w) + b) for _ in range(30))) for _ in range(4)]
    wanted = networks[0].copy()
    manager.rewrite(wanted)
    failures = []

    def work(network: Network) -> None:
        try:
            report = manager.rewrite(network)
            assert report["FoldBias"].rewritten == 30
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(network,)) for network in networks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(str(network) == str(wanted) for network in networks)


def test_verification_asks_a_rule_again_only_where_an_output_changed():
    class Counts(PatternRewriter):
        pattern = F.silu(Var("x"))

        def __init__(self):
            self.asked = 0

        def rewrite(self, x):
            self.asked += 1
            return x * torch.sigmoid(x)

    class Wrong(PatternRewriter):
        pattern = torch.exp(Var("x"))

        def rewrite(self, x):
            return torch.tanh(x)

    sound, unsound = Counts(), Counts()
    RewritePatternManager(sound).rewrite(network_of(lambda x: F.silu(torch.exp(x))), verify=True)
    RewritePatternManager(unsound, Wrong()).rewrite(network_of(lambda x: F.silu(torch.exp(x))), verify=True)
    assert sound.asked == 1
    assert unsound.asked > 1
