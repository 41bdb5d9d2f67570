"""Match one, apply to all: pure rules are asked once per distinct block, and nothing else differs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from enginery.network import Dim, Layer, Network, Tensor
from enginery.rewriting import Const, MatchFailure, PatternRewriter, RewritePatternManager, Scalar, Var
from enginery.rewriting.recording import _SeenLayer, _SeenTensor

aten = torch.ops.aten
TOKENS, WIDTH = Dim.symbol("tokens"), 8


def stack(*kinds: str) -> Network:
    """One block per string; each letter of it is a call, in the module path of the block."""
    network = Network()
    x = network.add_input("x", (TOKENS, WIDTH), torch.float32)
    scale = network.add_input("scale", (TOKENS, WIDTH), torch.float32)
    for number, kind in enumerate(kinds):
        values = [x, x]
        for place, letter in enumerate(kind):
            with network.inserting_before(None, module_path=f"model.layers.{number}.part{place % 2}"):
                values.append(CALLS[letter](network, number, place, scale, *values[-2:]))
        with network.inserting_before(None, module_path=f"model.layers.{number}"):
            x = x + values[-1]
    network.set_output("out", x)
    network.verify()
    return network


def weight(network: Network, number: int, place: int, shape: tuple[int, ...] = (WIDTH, WIDTH)) -> Tensor:
    return network.add_constant(f"model.layers.{number}.{place}", shape, torch.float32)


CALLS = {
    "l": lambda n, i, p, s, a, b: F.linear(b, weight(n, i, p)),
    "b": lambda n, i, p, s, a, b: b + weight(n, i, p, (WIDTH,)),
    "s": lambda n, i, p, s, a, b: F.silu(b),
    "m": lambda n, i, p, s, a, b: a * b,
    "g": lambda n, i, p, s, a, b: b * s,
    "t": lambda n, i, p, s, a, b: b.transpose(0, 1).transpose(0, 1),
    "v": lambda n, i, p, s, a, b: b.view(-1, 2, 4).view(-1, WIDTH),
    "2": lambda n, i, p, s, a, b: b * 2.0,
    "3": lambda n, i, p, s, a, b: b * 3.0,
    "r": lambda n, i, p, s, a, b: F.relu(b),
    "d": lambda n, i, p, s, a, b: F.dropout(b, 0.5, training=False),
}


class FoldBias(PatternRewriter):
    pure = True
    pattern = F.linear(Var("x"), Const("w")) + Const("b", rank=1)

    def rewrite(self, x, w, b):
        return F.linear(x, w, b)


class SiluByHand(PatternRewriter):
    pure = True
    pattern = F.silu(Var("x"))

    def rewrite(self, x):
        return x * torch.sigmoid(x)


class Square(PatternRewriter):
    pure = True
    pattern = Var("x") * Var("x")

    def check(self, root):
        if root.users and root.users[0].op is aten.relu.default:
            raise MatchFailure("a relu follows")

    def rewrite(self, x):
        return torch.square(x)


class MergeFactors(PatternRewriter):
    pure = True
    pattern = (Var("x") * Scalar("a", lambda a: isinstance(a, float))) * Scalar("b", lambda b: isinstance(b, float))

    def rewrite(self, x, a, b):
        return x * (a * b)


class CancelTransposes(PatternRewriter):
    pure = True
    root_layer = (aten.transpose.int,)

    def match_and_rewrite(self, layer):
        inner = layer.args[0].parent
        return (
            inner.args[0] if inner is not None and inner.op is layer.op and inner.args[1:] == layer.args[1:] else None
        )


class MergeViews(PatternRewriter):
    pure = True
    root_layer = (aten.view.default,)

    def match_and_rewrite(self, layer):
        inner = layer.args[0].parent
        if inner is None or inner.op is not layer.op:
            return None
        return inner.args[0] if inner.args[0].shape == layer.output.shape else inner.args[0].view(layer.output.shape)


class DropDropout(PatternRewriter):
    pure = True
    root_layer = ("aten.dropout",)

    def match(self, layer):
        return not layer.arguments["train"]

    def rewrite(self, layer):
        return layer.inputs[0]


class MergeLinears(PatternRewriter):
    """all linears that read one value"""

    pure = True
    root_layer = (aten.linear.default,)

    def match_and_rewrite(self, layer):
        x = layer.args[0]
        siblings = [user for user in x.users if user.op is layer.op and user.args[2] is None and user.args[0] is x]
        if len(siblings) < 2 or siblings[0] is not layer:
            return None
        weights = [sibling.args[1] for sibling in siblings]
        return dict(zip(siblings, torch.split(F.linear(x, torch.cat(weights)), WIDTH, dim=-1), strict=True))


class LateDecline(PatternRewriter):
    """appends, and thinks better of it"""

    pure = True
    root_layer = (aten.relu.default,)

    def match_and_rewrite(self, layer):
        torch.exp(layer.args[0])
        raise MatchFailure("changed my mind")


class DropDead(PatternRewriter):
    pure = True
    root_layer = None

    def match_and_rewrite(self, layer):
        return None if any(output.users or output.is_output for output in layer.outputs) else {}


class SinkNegation(PatternRewriter):
    """looks into the block before its own: the residual"""

    pure = True
    root_layer = (aten.add.Tensor,)

    def match_and_rewrite(self, layer):
        x = layer.args[0]
        if not isinstance(x, Tensor) or x.parent is None or x.parent.op is not aten.add.Tensor or x.is_output:
            return None
        if len(x.users) > 1 or layer.args[2] != 1:
            return None
        return x.parent.args[0] + (x.parent.args[1] + layer.args[1]) if x.parent.args[1].shape == x.shape else None


class CommonCalls(PatternRewriter):
    pure = True
    root_layer = None

    def match_and_rewrite(self, layer):
        for other in layer.inputs[0].users if layer.inputs else ():
            if other is layer:
                return None
            if other.op is layer.op and other.args == layer.args:
                return other.outputs
        return None


RULES = (
    FoldBias, SiluByHand, Square, MergeFactors, CancelTransposes, MergeViews, DropDropout, MergeLinears, LateDecline,
    DropDead, SinkNegation, CommonCalls,
)  # fmt: skip


def both_ways(make, rules):
    """The network and the report with and without memory; they must not differ."""
    plain, fast = make(), make()
    asked = RewritePatternManager(*(rule() for rule in rules)).rewrite(plain, remember=False)
    repeated = RewritePatternManager(*(rule() for rule in rules)).rewrite(fast, remember=True)
    assert str(fast) == str(plain)
    assert [layer.module_path for layer in fast] == [layer.module_path for layer in plain]
    assert [layer.provenance for layer in fast] == [layer.provenance for layer in plain]
    assert fast._names == plain._names
    assert asked.diff(repeated) == ""
    assert repeated.applications == asked.applications
    assert not any(fact.replayed for fact in asked.rules.values())
    for thing in (fast, *fast, *fast.inputs, *(output for layer in fast for output in layer.outputs)):
        assert type(thing) in (Network, Layer, Tensor)
    return fast, repeated


def counting(*rules):
    """The rules with a count of the calls of their code."""
    calls = []

    def counted(rule, name):
        code = getattr(rule, name)

        def wrapper(self, *args, **kwargs):
            calls.append(rule.__name__)
            return code(self, *args, **kwargs)

        return wrapper

    found = []
    for rule in rules:
        if rule.pattern is None:
            body = {"match_and_rewrite": counted(rule, "match_and_rewrite")}
        else:
            code = rule.rewrite

            def rewrite(self, x, w=None, b=None, code=code, rule=rule):
                calls.append(rule.__name__)
                return code(self, x, w, b) if w is not None else code(self, x)

            body = {"rewrite": rewrite}
        found.append(type(rule.__name__, (rule,), body))
    return calls, found


def test_the_calls_of_rules_follow_the_distinct_blocks():
    counts = []
    for depth in (5, 50, 200):
        calls, rules = counting(FoldBias, SiluByHand, CancelTransposes, MergeLinears)
        network = stack(*["lblbstm"] * depth)
        report = RewritePatternManager(*(rule() for rule in rules)).rewrite(network, remember=True)
        assert report["FoldBias"].rewritten == 2 * depth
        assert report["SiluByHand"].rewritten == depth
        assert report["CancelTransposes"].tried >= 2 * depth
        counts.append(len(calls))
    assert counts[0] == counts[1] == counts[2] < 30


def test_every_second_block_is_another_one():
    calls, rules = counting(FoldBias, SiluByHand)
    network = stack(*["lbs2", "lbs3"] * 20)
    report = RewritePatternManager(*(rule() for rule in rules)).rewrite(network, remember=True)
    assert report["FoldBias"].rewritten == 40
    assert report["FoldBias"].replayed == 38
    assert len(calls) == 4
    both_ways(lambda: stack(*["lbs2", "lbs3"] * 20), (FoldBias, SiluByHand))


def test_the_report_says_what_was_repeated():
    _, report = both_ways(lambda: stack(*["lbs"] * 12), (FoldBias, SiluByHand))
    assert (report["SiluByHand"].rewritten, report["SiluByHand"].replayed) == (12, 11)
    assert "22 of 24 repeated" in str(report)
    assert report.to_json()["rules"]["FoldBias"]["replayed"] == 11


def test_a_rule_that_is_not_pure_is_asked_everywhere():
    calls, (rule,) = counting(SiluByHand)
    rule.pure = False
    RewritePatternManager(rule()).rewrite(stack(*["lbs"] * 12), remember=True)
    assert len(calls) == 12


def test_one_that_is_not_pure_among_others_at_the_same_layers_has_all_asked():
    calls, (rule,) = counting(SiluByHand)
    watcher = type("Watcher", (PatternRewriter,), {"root_layer": None, "match_and_rewrite": lambda self, layer: None})
    RewritePatternManager(rule(), watcher()).rewrite(stack(*["lbs"] * 12), remember=True)
    assert len(calls) == 12


@pytest.mark.parametrize(
    "look",
    [
        lambda layer: layer.name,
        lambda layer: layer.module_path,
        lambda layer: layer.network.layers.index(layer),
        lambda layer: layer.outputs[0].name,
        lambda layer: len(layer.network),
        lambda layer: [other.name for other in layer.network],
    ],
)
def test_what_differs_from_block_to_block_is_asked_for_in_each(look):
    """window = number of the block, in many spellings"""
    seen = []

    class Looks(PatternRewriter):
        pure = True
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            seen.append(look(layer))
            return torch.clamp_max(layer.args[0], float(len(str(look(layer)))))

    both_ways(lambda: stack(*["lbs"] * 12), (Looks,))
    assert len(seen) == 24


def test_outside_of_the_block_is_looked_at_again():
    """the producer of the residual: the embedding, a sum, and in one place something else"""

    class Looks(PatternRewriter):
        pure = True
        root_layer = (aten.linear.default,)

        def match_and_rewrite(self, layer):
            parent = layer.args[0].parent
            if parent is None or parent.op is aten.relu.default or layer.args[2] is not None:
                return None
            return F.linear(layer.args[0], layer.args[1], torch.sum(layer.args[1], 0))

    def make():
        network = stack(*["ls"] * 10)
        layer = network.layer("model.layers.6.part0.linear")
        with network.inserting_before(layer, module_path=""):
            layer.set_argument("input", F.relu(layer.args[0]))
        return network

    _, report = both_ways(make, (Looks,))
    assert report["Looks"].rewritten == 8


@pytest.mark.parametrize("what", ["share", "output"])
def test_readers_outside_of_the_block_are_counted_again(what):
    class Alone(PatternRewriter):
        pure = True
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            x = layer.args[0]
            return torch.tanh(x) if len(x.users) == 1 and not x.is_output else None

    def make():
        network = stack(*["ls"] * 10)
        linear = network.layers.index(network.layer("model.layers.6.part0.linear"))
        return disturbed_at(network, linear, what)

    _, report = both_ways(make, (Alone,))
    assert report["Alone"].rewritten == 9


@pytest.mark.parametrize("look", [lambda x: x.user_count, lambda x: len(x.users)])
def test_what_a_rule_reads_of_its_own_calls_is_not_compared(look):
    """The linear of one block has a reader outside: as many as the rule sees elsewhere after its own call."""

    class Looks(PatternRewriter):
        pure = True
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            x = layer.args[0]
            y = torch.tanh(x)
            return y * float(look(x))

    def make():
        network = stack(*["ls"] * 10)
        linear = network.layers.index(network.layer("model.layers.6.part0.linear"))
        return disturbed_at(network, linear, "share")

    network = both_ways(make, (Looks,))[0]
    assert sorted({layer.args[1] for layer in network if layer.op is aten.mul.Tensor}) == [2.0, 3.0]


def test_a_change_from_outside_is_a_change():
    """A rule of the first layers changes what a later block reads: an operand twice instead of two."""

    class Alias(PatternRewriter):
        root_layer = (aten.exp.default,)

        def match_and_rewrite(self, layer):
            return layer.network.tensor("scale")

    class Same(PatternRewriter):
        pure = True
        benefit = -1
        root_layer = (aten.mul.Tensor,)

        def match_and_rewrite(self, layer):
            return torch.square(layer.args[0]) if layer.args[0] is layer.args[1] else None

    def make():
        network = stack(*["gg"] * 8)
        first = network.layers[0]
        with network.inserting_before(first, module_path=""):
            twin = torch.exp(network.tensor("scale"))
        for layer in network:
            if layer.name == "model.layers.5.part0.mul":
                layer.set_argument("self", twin)
            elif layer.op is aten.mul.Tensor and layer.module_path.endswith("part0"):
                layer.set_argument("self", network.tensor("x"))
        network.verify()
        return network

    _, report = both_ways(make, (Alias, Same))
    assert report["Same"].rewritten == 1


@pytest.mark.parametrize("what", ["dtype", "constness"])
def test_a_change_of_types_is_a_change(what):
    class Changes(PatternRewriter):
        benefit = 1
        changes_dtype = True
        root_layer = (aten.exp.default,)

        def match_and_rewrite(self, layer):
            x = layer.args[0]
            return torch.exp(x.double()) if what == "dtype" and x.dtype is torch.float32 else None

    class ToConstant(Changes):
        changes_dtype = False

        def match_and_rewrite(self, layer):
            return layer.network.tensor("fixed") if what == "constness" else None

    class Reads(PatternRewriter):
        pure = True
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            raise MatchFailure(f"{layer.args[0].dtype} {layer.args[0].is_constant}")

    def make():
        network = stack(*["ss"] * 8)
        network.add_constant("fixed", (TOKENS, WIDTH), torch.float32)
        with network.inserting_before(network.layers[0], module_path=""):
            scale = network.tensor("scale")
            twins = [torch.relu(torch.sin(scale) if i == 5 else torch.exp(scale)) for i in range(8)]
        for twin, layer in zip(twins, [x for x in network if x.module_path.endswith("part0")], strict=True):
            layer.set_argument("self", twin)
        return network

    _, report = both_ways(make, (Changes, ToConstant, Reads))
    assert len(report["Reads"].declined) == 2


def test_scalars_that_compare_equal_are_not_the_same():
    network = stack(*["ls"] * 16)
    layers = [layer for layer in network if layer.op is aten.silu.default]
    for layer, factor in zip(layers, (1, 1.0, True, -0.0) + (0.0, -0.0, 1.0, 1) * 3, strict=True):
        with network.inserting_before(layer, module_path=layer.module_path):
            layer.set_argument("self", network.call(aten.mul.Tensor, layer.args[0], factor))
    text = str(network)

    class Read(PatternRewriter):
        pure = True
        root_layer = (aten.mul.Tensor,)

        def match_and_rewrite(self, layer):
            raise MatchFailure(repr(layer.args[1]))

    _, report = both_ways(lambda: Network.parse(text), (Read,))
    assert dict(report["Read"].declined) == {"1": 4, "1.0": 4, "True": 1, "0.0": 3, "-0.0": 4}


def test_an_error_under_a_recording_leaves_everything_as_it_was():
    class Raises(PatternRewriter):
        pure = True
        root_layer = (aten.silu.default,)

        def match_and_rewrite(self, layer):
            torch.exp(layer.args[0])
            raise ValueError(layer.op)

    network = stack(*["ls"] * 6)
    text = str(network)
    with pytest.raises(Exception, match="Raises raised ValueError"):
        RewritePatternManager(Raises()).rewrite(network, remember=True)
    assert str(network) == text
    assert {type(layer) for layer in network} == {Layer}
    assert type(network) is Network
    network.verify()


def test_verification_and_rolling_back_work_with_repeated_answers():
    class Wrong(PatternRewriter):
        pure = True
        pattern = F.silu(Var("x"))

        def rewrite(self, x):
            return torch.tanh(x)

    network = stack(*["lbs"] * 8)
    report = RewritePatternManager(FoldBias(), Wrong()).rewrite(network, verify=True, remember=True)
    assert report["Wrong"].rolled_back
    assert (report["FoldBias"].rewritten, report["FoldBias"].replayed) == (8, 7)


def test_no_slot_is_read_unnoticed():
    for seen, plain in ((_SeenTensor, Tensor), (_SeenLayer, Layer)):
        noted = {name for name, value in vars(seen).items() if isinstance(value, property)}
        assert noted >= set(plain.__slots__) - {"network"}


letters = st.text(alphabet="".join(CALLS), min_size=1, max_size=7)


@st.composite
def stacks(draw):
    """Repeated blocks, one or two of them disturbed."""
    kinds = draw(st.lists(letters, min_size=1, max_size=2))
    blocks = kinds * draw(st.integers(3, 6))
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(blocks) - 1))
        blocks[place] = draw(letters)
    swaps = draw(st.lists(st.tuples(st.integers(0, 60), st.sampled_from("path output skip literal share")), max_size=3))
    return blocks, swaps


def disturbed_at(network, place, what):
    layer = network.layers[place % len(network)]
    if what == "path":
        layer.module_path = "elsewhere"
    elif what == "output":
        network.set_output(f"extra_{place}", layer.outputs[0])
    elif what == "skip":
        layer.set_argument(next(iter(layer.arguments)), network.tensor("scale"))
    elif what == "literal" and layer.op is aten.mul.Tensor and isinstance(layer.args[1], float):
        layer.set_argument("other", 2)
    elif what == "share":
        with network.inserting_before(None, module_path="end"):
            network.set_output(f"shared_{place}", torch.exp(layer.outputs[0]))
    return network


def disturbed(blocks, swaps):
    network = stack(*blocks)
    for place, what in swaps:
        disturbed_at(network, place, what)
    try:
        network.verify()
    except Exception:
        return stack(*blocks)
    return network


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(stacks(), st.permutations(RULES), st.integers(1, len(RULES)))
def test_random_stacks_of_blocks_come_out_the_same(stacked, order, count):
    both_ways(lambda: disturbed(*stacked), order[:count])


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
@given(stacks(), st.permutations(RULES), st.integers(1, len(RULES)))
def test_thousands_of_stacks_come_out_the_same(stacked, order, count):
    both_ways(lambda: disturbed(*stacked), order[:count])
