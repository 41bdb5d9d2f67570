"""Every mistake of a rule ends in one error that names rule, layer and line, with the network as it was before.

Mistakes in the text of a network are in tests/network/test_text.py.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from enginery.errors import RewriteError, RewriteLimitError
from enginery.network import Network
from enginery.rewriting import (
    AnalysisPatternManager,
    Call,
    Const,
    PatternAnalyzer,
    PatternRewriter,
    RewritePatternManager,
    Scalar,
    Var,
    explain,
    holds,
)
from rewriting.building import network_of

aten = torch.ops.aten


def network(blocks: int = 1) -> Network:
    network = network_of(lambda x, y, w, b: x)
    x, y, w, b = (network.tensor(name) for name in "xywb")
    for number in range(blocks):
        with network.inserting_before(None, module_path=f"layers.{number}"):
            x = F.silu(F.linear(torch.exp(x), w, b)) * y
    network.set_output("out_0", x)
    return network


class Silu(PatternRewriter):
    pattern = F.silu(Var("x"))


class Raises(Silu):
    def rewrite(self, x):
        torch.exp(x)
        raise KeyError("half way")  # here


class RaisesInside(Silu):
    def rewrite(self, x):
        return self.helper(torch.exp(x))

    def helper(self, x):
        return x.shape[7]  # here


class RaisesInCheck(Silu):
    def check(self, x):
        return x.missing  # here

    def rewrite(self, x):
        return x


class RaisesInPredicate(PatternRewriter):
    pattern = F.silu(Var("x", where=lambda x: x.shape[7] == 1))  # here

    def rewrite(self, x):
        return x


class RaisesInConstraint(Silu):
    where = (holds("never", lambda x: 1 // 0, "x"),)  # here

    def rewrite(self, x):
        return x


class RaisesInMatch(PatternRewriter):
    root_layer = (aten.silu.default,)

    def match(self, layer):
        return layer.args[3]  # here

    def rewrite(self, layer):
        return None


class RaisesManyLines(Silu):
    def rewrite(self, x):
        raise ValueError("boom\nsecond line")  # here


class Leaves(Silu):
    def rewrite(self, x):
        sys.exit(3)  # here


class LeavesInCheck(Silu):
    def check(self, x):
        sys.exit(3)  # here

    def rewrite(self, x):
        return x


class DependsOnData(Silu):
    def rewrite(self, x):
        return torch.relu(x) if (x > 0) else x  # here


class DependsOnDataInCheck(Silu):
    def check(self, x):
        return x > 0

    def rewrite(self, x):  # here
        return x


class WrongShape(Silu):
    def rewrite(self, x):  # here
        return x[:, :4]


class WrongRank(Silu):
    def rewrite(self, x):  # here
        return x.sum(-1)


class WrongDtype(Silu):
    def rewrite(self, x):  # here
        return F.silu(x).double()


class NoTensor(Silu):
    def rewrite(self, x):  # here
        return "tanh"


class TooMany(Silu):
    def rewrite(self, x):  # here
        return x, x


class UnknownArgumentOfReplace(Silu):
    def rewrite(self, root, x):
        return root.replace(slope=2.0)  # here


class UnknownArgumentOfCall(Silu):
    def rewrite(self, network, x):
        return network.call(aten.silu.default, x, inplace=True)  # here


class ArgumentsThatDoNotFit(Silu):
    def rewrite(self, x):
        return x + x[:, :3]  # here


class Replaces(Silu):
    def rewrite(self, root, x):
        root.output.replace_all_uses_with(x)  # here
        return x


class Erases(Silu):
    def rewrite(self, network, root, x):
        network.erase(root)  # here


class SetsArgument(Silu):
    def rewrite(self, root, x):
        root.set_argument("self", x)  # here


class SetsOutput(Silu):
    def rewrite(self, network, x):
        network.set_output("out_0", x)  # here


class Renames(Silu):
    def rewrite(self, network, x):
        network.rename_output("out_0", "other")  # here


class RemovesConstant(Silu):
    def rewrite(self, network, x):
        network.remove_constant(network.tensor("b"))  # here


class Prunes(Silu):
    def rewrite(self, network, x):
        torch.exp(x)
        network.prune()  # here


class FarSilu(Silu):
    """Nothing of another network may be returned."""

    def rewrite(self, x):  # here
        return network().layers[0].output


BROKEN = (
    Raises, RaisesInside, RaisesInCheck, RaisesInPredicate, RaisesInConstraint, RaisesInMatch, RaisesManyLines,
    Leaves, LeavesInCheck, DependsOnData, DependsOnDataInCheck, WrongShape, WrongRank,
    WrongDtype, NoTensor, TooMany, UnknownArgumentOfReplace, UnknownArgumentOfCall, ArgumentsThatDoNotFit, Replaces,
    Erases, SetsArgument, SetsOutput, Renames, RemovesConstant, Prunes, FarSilu,
)  # fmt: skip


def marked_line(rule: type) -> int:
    """The line of this file that is marked in the body of a rule."""
    lines = Path(__file__).read_text().splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"class {rule.__name__}(")))
    return next(i for i, line in enumerate(lines[start:], start + 1) if line.endswith("# here"))


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_a_rule_that_breaks_its_contract(rule, blocks):
    """Under a recording too, where four blocks are equal."""
    rule = type(rule.__name__, (rule,), {"pure": True})
    subject = network(blocks)
    before, names = str(subject), set(subject._layers)
    with pytest.raises(RewriteError) as caught:
        RewritePatternManager(rule()).rewrite(subject, remember=True)
    assert (caught.value.rule, caught.value.layer) == (rule.__name__, "layers.0.silu")
    assert f"rule {rule.__name__} " in str(caught.value)
    assert f"(at layer layers.0.silu; {__file__}:{marked_line(rule)})" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(subject) == before
    assert set(subject._layers) == names
    subject.verify()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (RaisesManyLines, "raised ValueError: boom (at layer layers.0.silu; "),
        (Leaves, "raised SystemExit: 3 (at layer layers.0.silu; "),
        (DependsOnData, "raised a tensor of a network is neither true nor false: it has no value yet (at layer "),
    ],
)
def test_what_a_rule_raised_is_said_in_one_line(rule, said):
    with pytest.raises(RewriteError) as caught:
        RewritePatternManager(rule()).rewrite(network())
    assert str(caught.value).startswith(f"rule {rule.__name__} {said}")


def test_the_fix_of_an_error_stays_with_it():
    with pytest.raises(RewriteError, match=r"Choose by torch\.where, or test its shape"):
        RewritePatternManager(DependsOnData()).rewrite(network())


def test_an_explanation_names_an_exit_and_stays_one_line():
    for rule, said in ((Leaves, "it raises SystemExit: 3"), (RaisesManyLines, "it raises ValueError: boom")):
        assert explain(network(), rule()).reason == said


class Collects(PatternAnalyzer):
    pattern = F.silu(Var("x"))

    def analyze(self, x):
        sys.exit("two\nlines")


def test_an_analyzer_that_leaves():
    manager = AnalysisPatternManager()
    manager.add("Collects", Collects())
    with pytest.raises(RewriteError, match=r"analyzer Collects raised SystemExit: two \(at layer layers\.0\.silu\)"):
        manager.analyze(network())


def test_what_earlier_rules_did_stays():
    subject = network()
    good = type("Good", (PatternRewriter,), {"pattern": torch.exp(Var("x")), "rewrite": lambda self, x: torch.tanh(x)})
    with pytest.raises(RewriteError, match="Raises"):
        RewritePatternManager(good(), Raises()).rewrite(subject)
    assert [layer.op._opname for layer in subject] == ["tanh", "linear", "silu", "mul"]
    subject.verify()


class Again(Silu):
    def rewrite(self, x):  # here
        return F.silu(x)


class Grows(Silu):
    def rewrite(self, x):  # here
        return F.silu(x) + 0 * F.silu(x)


@pytest.mark.parametrize("rule", [Again, Grows], ids=lambda rule: rule.__name__)
def test_a_rule_that_hangs_in_its_own_output(rule):
    subject = network()
    before = str(subject)
    with pytest.raises(RewriteLimitError, match=rf"{rule.__name__} \d+ times") as caught:
        RewritePatternManager(rule()).rewrite(subject, limit=100)
    assert caught.value.rule == rule.__name__
    assert re.search(
        rf"now at layer layers\.0\.silu_\d+; {re.escape(__file__)}:{marked_line(rule)}\)", str(caught.value)
    )
    assert str(subject) == before
    subject.verify()


class NoRoot(PatternRewriter):
    pattern = Var("x")

    def rewrite(self, x):  # here
        return x


class NoRootScalar(PatternRewriter):
    pattern = Scalar("x")

    def rewrite(self, x):  # here
        return x


class UnknownCapture(Silu):
    def rewrite(self, y):  # here
        return y


class UnknownConstraint(Silu):
    where = (holds("never", lambda z: True, "z"),)

    def rewrite(self, x):  # here
        return x


class NoRewrite(PatternRewriter):  # here
    pattern = F.silu(Var("x"))


class Nothing(PatternRewriter):  # here
    pass


class Apart(PatternRewriter):
    pattern = (F.silu(Var("x")), Call(F.linear, Var("y"), Const("w"), ...))

    def rewrite(self, x, y, w):  # here
        return None


@pytest.mark.parametrize(
    ("rule", "cause"),
    [
        (NoRoot, "the pattern binds no root"),
        (NoRootScalar, "the pattern binds no root"),
        (UnknownCapture, "rewrite asks for 'y', which the pattern does not bind"),
        (UnknownConstraint, "a constraint names 'z', which the pattern does not bind"),
        (NoRewrite, "it has a pattern but no rewrite"),
        (Nothing, "it has no pattern and no match_and_rewrite"),
        (Apart, "the roots of the pattern share no value"),
    ],
)
def test_a_rule_that_cannot_run_is_refused_before_any_network(rule, cause):
    with pytest.raises(RewriteError) as caught:
        RewritePatternManager(rule())
    assert caught.value.rule == rule.__name__
    assert f"rule {rule.__name__}: {cause} ({__file__}:{marked_line(rule)})" in str(caught.value)


def test_a_pattern_of_the_wrong_operator_matches_nothing_and_says_so():
    class Gelu(PatternRewriter):
        pattern = F.gelu(Var("x"))

        def rewrite(self, x):
            return x

    subject = network()
    before, manager = str(subject), RewritePatternManager(Gelu())
    report = manager.rewrite(subject)
    assert (report["Gelu"].tried, report["Gelu"].rewritten, str(subject)) == (0, 0, before)
    assert "the network has no aten.gelu" in str(manager.explain(subject)["Gelu"])


def test_two_rules_with_one_label():
    manager = RewritePatternManager(Raises())
    with pytest.raises(RewriteError, match=r"two rules are labelled Raises. Give one of them another label") as caught:
        manager.add(Raises())
    assert caught.value.rule == "Raises"
    assert manager.labels == ("Raises",)
    with pytest.raises(RewriteError, match="no rule is given for the label Other"):
        manager.add("Other")
