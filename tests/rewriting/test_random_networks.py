"""All phases over random decoders: the structure holds, and a paged batch computes what the network computed before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enginery.network import Network
from enginery.rewriting import RewritePatternManager
from enginery.rewriting.numerics import sample_values
from enginery.rewriting.pipeline import PHASES, PipelineConfig, run_phases
from network.strategies import inputs_for, networks
from rewriting.decoders import decoders, decoders_with_more_outputs

BLOCK = 4
"""tokens of one KV block: small, so that sequences have several"""
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-4}
"""as a share of the largest element; logits are compared in float32, whatever they are"""
GROWTH = 4.0
"""how far the error of bfloat16 may grow: rewriting rounds elsewhere, as often"""
OPTIONAL = tuple(rule for phase in PHASES for rule in phase.optional)

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
thorough = settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))

Constants = Mapping[str, torch.Tensor]
Batch = list[tuple[int, int]]
"""per sequence: its length, and how many of its tokens the first of two steps computes"""
batches = st.lists(
    st.integers(1, 11).flatmap(lambda length: st.tuples(st.just(length), st.integers(0, length))),
    min_size=1,
    max_size=3,
)
devices = st.sampled_from(["cpu", "cuda"])
"""whose rules run; the references of the operators run on the CPU"""
rule_sets = st.lists(st.sampled_from(OPTIONAL), unique=True) if OPTIONAL else st.just([])


class Expected:
    """What a network computes, and how far from it a rewritten one may be.

    In bfloat16 one rounding is 0.4 %, so networks of bfloat16 are held against the same network in float64: the error
    after the phases against the error before them.
    """

    def __init__(self, network: Network, constants: Constants, inputs: Sequence[Sequence[torch.Tensor]]) -> None:
        before = [network.run(given, constants) for given in inputs]
        self.rough = any(tensor.dtype == torch.bfloat16 for tensor in network.constants)
        self.single = any(tensor.dtype == torch.float32 for tensor in network.constants)
        self.values = before
        if self.rough:
            exact = widened(network)
            wide = {name: value.to(exact.tensor(name).dtype) for name, value in constants.items()}
            self.values = [exact.run(given, wide) for given in inputs]
        self.errors = [
            [largest(one.double() - other.double()) for one, other in zip(*pair, strict=True)]
            for pair in zip(before, self.values, strict=True)
        ]

    def check(self, found: Sequence[Sequence[torch.Tensor]]) -> None:
        """`found`: per set of inputs the outputs."""
        share = TOLERANCE[torch.float32 if self.single else torch.float64]
        for outputs, wanted, errors in zip(found, self.values, self.errors, strict=True):
            for one, other, error in zip(outputs, wanted, errors, strict=True):
                size = largest(other)
                allowed = GROWTH * error + torch.finfo(torch.bfloat16).eps * size if self.rough else share * size
                torch.testing.assert_close(
                    one.double(), other.double(), rtol=0.0, atol=max(allowed, 1e-30), equal_nan=True
                )


def largest(x: torch.Tensor) -> float:
    return x.double().abs().nan_to_num(0.0, 0.0, 0.0).max().item() if x.numel() else 0.0


def widened(network: Network) -> Network:
    """The same network with float64 for bfloat16."""
    wide = Network.parse(str(network).replace("bfloat16", "float64"))
    wide.values.update({name: value.to(wide.tensor(name).dtype) for name, value in network.values.items()})
    return wide


def reread(network: Network) -> None:
    """The rewritten network is sound, and so is its text."""
    network.verify()
    text = str(network)
    assert str(Network.parse(text)) == text


def still_there(network: Network, constants: Constants) -> Constants:
    names = {tensor.name for tensor in network.constants}
    return {name: value for name, value in constants.items() if name in names}


class Paged:
    """A rewritten network with its KV pools, and sequences whose blocks lie in a random order."""

    def __init__(self, network: Network, constants: Constants, sequences: Sequence[torch.Tensor]) -> None:
        self.network, self.constants, self.sequences = network, still_there(network, constants), sequences
        counts = [-(-len(tokens) // BLOCK) for tokens in sequences]
        self.tables = shuffled(sum(counts)).to(torch.int32).split(counts)
        self.pools = {
            tensor.name: torch.zeros(
                [n if isinstance(n, int) else sum(counts) for n in tensor.shape], dtype=tensor.dtype
            )
            for tensor in network.inputs
            if tensor.name.startswith(("key_cache", "value_cache"))
        }

    def step(self, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
        """Logits of the tokens begin:end of each sequence; sequences with none are not in the batch."""
        chosen = [i for i, (begin, end) in enumerate(spans) if begin < end]
        places = {i: torch.arange(*spans[i]) for i in chosen}
        counts = [len(place) for place in places.values()]
        tables = torch.nn.utils.rnn.pad_sequence([self.tables[i] for i in chosen], batch_first=True)
        slots = [self.tables[i][place // BLOCK] * BLOCK + place % BLOCK for i, place in places.items()]
        order = shuffled(sum(counts))
        inputs = self.pools | {
            "token_ids": torch.cat([self.sequences[i][place] for i, place in places.items()]),
            "positions": torch.cat(list(places.values())),
            "slot_mapping": torch.cat(slots).long(),
            "block_tables": tables,
            "query_start": torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            "seq_lens": torch.tensor([spans[i][1] for i in chosen], dtype=torch.int32),
            "logits_indices": torch.cat([order, order[-1:].expand(3)]),  # as in a padded step
        }
        (logits,) = self.network.run([inputs[tensor.name] for tensor in self.network.inputs], self.constants)
        logits = logits.float()
        parts = dict(zip(chosen, logits[: len(order)][order.argsort()].split(counts), strict=True))
        return [parts.get(i, logits[:0]) for i in range(len(spans))]


def shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))


def check_pipeline(network: Network, batch: Batch, rules: Sequence[type], device: str) -> None:
    before = network.copy()
    run_phases(network, PipelineConfig(rules=tuple(rule() for rule in rules), block_size=BLOCK, device=device))
    run_batch(before, network, batch)


def run_batch(before: Network, after: Network, batch: Batch) -> None:
    """Each sequence alone, before; all sequences together in two steps over a paged cache, after."""
    vocabulary = before.outputs[0].shape[-1]
    sequences = [some_tokens(length, vocabulary) for length, _ in batch]
    constants = sample_values(before).constants
    expected = Expected(before, constants, sequences)
    reread(after)
    paged = Paged(after, constants, [tokens for tokens, _ in sequences])
    steps = [[(0, done) for _, done in batch], [(done, length) for length, done in batch]]
    found = [paged.step(spans) for spans in steps if any(begin < end for begin, end in spans)]
    expected.check([[torch.cat(parts)] for parts in zip(*found, strict=True)])


def check_without_cache(network: Network, inputs: Sequence[torch.Tensor], rules: Sequence[type]) -> None:
    """The phases that leave a network's borders as they are: any outputs, the same inputs."""
    constants = sample_values(network).constants
    expected = Expected(network, constants, [inputs])
    types = [(tensor.shape, tensor.dtype) for tensor in network.outputs]
    for phase in PHASES:
        if phase.prepare is None:
            chosen = (*phase.rules, *(rule for rule in phase.optional if rule in rules))
            RewritePatternManager(*(rule() for rule in chosen)).rewrite(network)
    reread(network)
    assert [(tensor.shape, tensor.dtype) for tensor in network.outputs] == types
    expected.check([network.run(inputs, still_there(network, constants))])


def some_tokens(count: int, vocabulary: int = 11) -> list[torch.Tensor]:
    """token_ids and positions of one sequence."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, vocabulary, (count,), generator=generator), torch.arange(count)]


@quick
@given(decoders(), batches, rule_sets, devices)
def test_decoders_through_all_phases(network: Network, batch: Batch, rules: list[type], device: str) -> None:
    check_pipeline(network, batch, rules, device)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(decoders(), batches, rule_sets, devices)
def test_a_thousand_decoders_through_all_phases(network: Network, batch: Batch, rules: list[type], device: str) -> None:
    check_pipeline(network, batch, rules, device)


def check_repeated(network: Network, batch: Batch, rules: Sequence[type]) -> None:
    """What pure rules said of one layer is repeated in its likes, and that is what they say where each is asked."""
    config = PipelineConfig(block_size=BLOCK)
    fast, plain = network.copy(), network.copy()
    for phase in PHASES:
        chosen = (*phase.rules, *(rule for rule in phase.optional if rule in rules))
        reports = []
        for subject, remember in ((fast, True), (plain, False)):
            if phase.prepare is not None:
                phase.prepare(subject, config)
            reports.append(RewritePatternManager(*(rule() for rule in chosen)).rewrite(subject, remember=remember))
        assert reports[0].applications == reports[1].applications
        assert str(fast) == str(plain)
    run_batch(network, fast, batch)


deep = decoders(layers=(3, 4, 6))


@settings(quick, max_examples=20)
@given(deep, batches, rule_sets)
def test_repeated_layers(network: Network, batch: Batch, rules: list[type]) -> None:
    check_repeated(network, batch, rules)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(deep, batches, rule_sets)
def test_a_thousand_decoders_of_repeated_layers(network: Network, batch: Batch, rules: list[type]) -> None:
    check_repeated(network, batch, rules)


inner = st.integers(1, 9)
"""tokens of the one sequence"""


@quick
@given(decoders_with_more_outputs(), inner, rule_sets)
def test_inner_values_that_are_outputs(network: Network, count: int, rules: list[type]) -> None:
    check_without_cache(network, some_tokens(count), rules)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(decoders_with_more_outputs(), inner, rule_sets)
def test_a_thousand_networks_with_inner_outputs(network: Network, count: int, rules: list[type]) -> None:
    check_without_cache(network, some_tokens(count), rules)


@quick
@given(networks(), rule_sets)
def test_networks_that_are_no_decoders(network: Network, rules: list[type]) -> None:
    check_without_cache(network, inputs_for(network)[0], rules)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@thorough
@given(networks(max_layers=20), rule_sets)
def test_a_thousand_networks_that_are_no_decoders(network: Network, rules: list[type]) -> None:
    check_without_cache(network, inputs_for(network)[0], rules)
