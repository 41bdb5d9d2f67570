"""The phases that make an imported network a network that an engine runs: their order, on one page.

imported      token_ids, positions -> logits [tokens, vocabulary], attention within one packed sequence
rewritten     the batch's tables, the KV pools -> logits [logits, vocabulary] of the tokens that are asked for
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from enginery.errors import UsageError
from enginery.network import Network
from enginery.rewriting.explain import Miss, explain
from enginery.rewriting.isolation import check_tokens_apart
from enginery.rewriting.manager import RewritePatternManager
from enginery.rewriting.report import Report
from enginery.rewriting.rule import PatternRewriter
from enginery.rewriting.rules.cancel_transposes import CancelTransposes, PermuteToTranspose, SelectBeforeTranspose
from enginery.rewriting.rules.cancel_unsqueeze import CancelUnsqueeze
from enginery.rewriting.rules.common_subexpressions import CommonSubexpressions
from enginery.rewriting.rules.dead_code import DeadCode
from enginery.rewriting.rules.drop_casts import DropCasts
from enginery.rewriting.rules.drop_copies import DropCopies
from enginery.rewriting.rules.drop_identities import DropIdentities
from enginery.rewriting.rules.drop_views import DropViews
from enginery.rewriting.rules.expand_baddbmm import ExpandBaddbmm
from enginery.rewriting.rules.fuse_add_norm import FuseAddNorm
from enginery.rewriting.rules.fuse_norm_linear import FuseGate, FuseNormLinear
from enginery.rewriting.rules.fuse_rotary import FuseRotary
from enginery.rewriting.rules.fuse_silu_mul import FuseSiluMul
from enginery.rewriting.rules.gather_logits import GatherEarlier, GatherInLastLayer, gather_output
from enginery.rewriting.rules.group_repeated_heads import GroupRepeatedHeads
from enginery.rewriting.rules.linear_from_matmul import BiasIntoLinear, LinearFromMatmul
from enginery.rewriting.rules.merge_factors import MergeFactors
from enginery.rewriting.rules.merge_parallel_linears import MergeParallelLinears
from enginery.rewriting.rules.merge_reshapes import MergeReshapes
from enginery.rewriting.rules.norm_into_linear import NormIntoLinear
from enginery.rewriting.rules.pack_linears import PackLinears, PackTiedEmbedding
from enginery.rewriting.rules.page_attention import PageAttention, open_cache
from enginery.rewriting.rules.quantise_linears import QuantiseLinears
from enginery.rewriting.rules.recognise_attention import RecogniseAttention
from enginery.rewriting.rules.scalars_to_numbers import ScalarsToNumbers
from enginery.rewriting.rules.scale_before_linear import ScaleBeforeLinear
from enginery.rewriting.rules.scale_into_attention import ScaleIntoAttention
from enginery.rewriting.rules.scale_into_embedding import ScaleIntoEmbedding
from enginery.rewriting.rules.scale_into_linear import ScaleIntoLinear
from enginery.rewriting.rules.sink_transposes import SinkTransposes, TransposeOfUnsqueeze
from enginery.rewriting.rules.skinny_linears import SkinnyLinears
from enginery.rewriting.rules.view_to_reshape import ViewToReshape
from enginery.rewriting.watch import Watch


@dataclass(frozen=True)
class PipelineConfig:
    disabled_rules: tuple[str, ...] = ()
    """names of rules that are left out"""
    rules: tuple[PatternRewriter, ...] = ()
    """the user's own, run in a phase of their own before attention is paged; a rule of the library that is off by
    default is switched on by naming it here, and runs in its phase"""
    pack_linears: bool = True
    """weights in the panels of the CPU kernels; on other devices never"""
    device: str = "cpu"
    block_size: int = 16
    """tokens of one KV block"""


@dataclass(frozen=True)
class Phase:
    """Rules that are applied together until none of them fits. `prepare` changes the network's borders before them.

    `optional` rules are off by default: right, but without a measured gain, or only where their kernels are
    (`docs/rules.md`). So are `approximate` ones, which are no equalities.
    """

    name: str
    rules: tuple[type[PatternRewriter], ...] = ()
    optional: tuple[type[PatternRewriter], ...] = ()
    approximate: tuple[type[PatternRewriter], ...] = ()
    on_gpu: tuple[type[PatternRewriter], ...] = ()
    """optional rules that a GPU gains by, where they are on"""
    prepare: Callable[[Network, PipelineConfig], None] | None = None
    wanted: Callable[[PipelineConfig], bool] = lambda config: True

    @property
    def on_request(self) -> tuple[type[PatternRewriter], ...]:
        """The rules that run if one of them is given."""
        return (*self.optional, *self.approximate)


TIDY: tuple[type[PatternRewriter], ...] = (
    DeadCode, DropCasts, DropCopies, DropViews, DropIdentities, ViewToReshape, MergeReshapes, CancelUnsqueeze,
    PermuteToTranspose, CancelTransposes, SelectBeforeTranspose, SinkTransposes, TransposeOfUnsqueeze,
    CommonSubexpressions,
)  # fmt: skip
"""what leaves a network's values as they are and makes equal things look equal"""

FUSED_LINEARS: tuple[type[PatternRewriter], ...] = (
    SkinnyLinears, FuseAddNorm, FuseSiluMul, FuseNormLinear, FuseGate,
)  # fmt: skip
"""between two linears of a decoder layer nothing is left but attention, if its kernels are a GPU's"""

USER_RULES = "user rules"

PHASES: tuple[Phase, ...] = (
    Phase("canonicalise", (*TIDY, ScalarsToNumbers, LinearFromMatmul, BiasIntoLinear, ExpandBaddbmm)),
    Phase("recognise attention", (RecogniseAttention, GroupRepeatedHeads, *TIDY)),
    Phase(
        "fold factors",
        optional=(
            ScaleIntoAttention, MergeFactors, ScaleIntoEmbedding, ScaleIntoLinear, ScaleBeforeLinear, NormIntoLinear,
        ),
    ),
    Phase("merge linears", (MergeParallelLinears,)),
    Phase(USER_RULES),
    Phase("quantise", approximate=(QuantiseLinears,)),
    Phase(
        "paged attention",
        (PageAttention,),
        optional=(FuseRotary,),
        on_gpu=(FuseRotary,),
        prepare=lambda network, config: open_cache(network, config.block_size),
    ),
    Phase(
        "last-token gather",
        (GatherEarlier,),
        optional=(GatherInLastLayer,),
        on_gpu=(GatherInLastLayer,),
        prepare=lambda network, config: gather_output(network),
    ),
    Phase("fuse linears", optional=FUSED_LINEARS, on_gpu=FUSED_LINEARS),
    Phase(
        "pack",
        (PackLinears, PackTiedEmbedding),
        wanted=lambda config: config.pack_linears and config.device == "cpu",
    ),
    Phase("fold", (DeadCode, CommonSubexpressions)),
)  # fmt: skip


@dataclass
class PipelineReport:
    """What each phase did, in order."""

    phases: list[tuple[str, Report]] = field(default_factory=list)

    def __getitem__(self, name: str) -> Report:
        return dict(self.phases)[name]

    @property
    def counts(self) -> dict[str, int]:
        """How often each rule applied, over all phases."""
        counts: dict[str, int] = {}
        for _, report in self.phases:
            for label, rule in report.rules.items():
                counts[label] = counts.get(label, 0) + rule.rewritten
        return counts

    @property
    def milliseconds(self) -> float:
        return sum(report.milliseconds for _, report in self.phases)

    def __str__(self) -> str:
        return "\n\n".join(f"{name}\n{report}" for name, report in self.phases)

    def to_json(self) -> list[dict[str, Any]]:
        return [{"phase": name, **report.to_json()} for name, report in self.phases]


def run_phases(network: Network, config: PipelineConfig | None = None) -> PipelineReport:
    """Rewrites the network in place, and makes sure that an engine can run it.

    Raises as `apply_phases`, and UnsupportedError naming the layer if tokens meet outside attention.
    """
    report = apply_phases(network, config)
    check_tokens_apart(network)
    return report


def apply_phases(
    network: Network, config: PipelineConfig | None = None, *, before: str | None = None
) -> PipelineReport:
    """Rewrites the network in place. With `before`, stops in front of the first phase that has a rule of that name.

    Raises UsageError for a disabled rule that there is not, RewriteError naming rule and layer if a rule breaks its
    contract.
    """
    config = config or PipelineConfig()
    _check_names(config)
    watch = Watch.from_environment() if before is None else Watch()
    watch.show(network)
    report = PipelineReport()
    for phase in PHASES:
        if phase.wanted(config):
            if phase.prepare is not None:
                phase.prepare(network, config)
            manager = _manager(phase, config)
            if before in manager.labels:
                return report
            report.phases.append((phase.name, manager.rewrite(network)))
            watch.show(network, *report.phases[-1])
    for tensor in network.constants:
        if not tensor.users and not tensor.is_output:
            network.remove_constant(tensor)
    return report


def nearest_miss(network: Network, rule: str, config: PipelineConfig | None = None) -> Miss | None:
    """Why a rule does not fit the network as its phase finds it, or None if it does or would. Rewrites the network."""
    config = config or PipelineConfig()
    if rule in optional_rules() and all(type(given).__name__ != rule for given in config.rules):
        config = replace(config, rules=(*config.rules, optional_rules()[rule]()))
    apply_phases(network, config, before=rule)
    managers = (_manager(phase, config) for phase in PHASES)
    found = next((manager for manager in managers if rule in manager.labels), None)
    return explain(network, found.get(rule), label=rule) if found is not None else None


def rule_names() -> tuple[str, ...]:
    """The rules of all phases, each once, those that are off by default included."""
    return tuple(dict.fromkeys(rule.__name__ for phase in PHASES for rule in (*phase.rules, *phase.on_request)))


def optional_rules() -> dict[str, type[PatternRewriter]]:
    """The rules that are off by default, by name: `PipelineConfig(rules=[optional_rules()["FuseAddNorm"]()])`."""
    return {rule.__name__: rule for phase in PHASES for rule in phase.on_request}


def _check_names(config: PipelineConfig) -> None:
    known = (*rule_names(), *(type(rule).__name__ for rule in config.rules))
    for name in config.disabled_rules:
        check_rule_name(name, known)


def check_rule_name(name: str, known: Sequence[str]) -> None:
    """Raises UsageError with the nearest names if it is none of those that are known."""
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.4)
        fix = f"Near: {', '.join(near)}" if near else f"Rules: {', '.join(known)}"
        raise UsageError(f"no rule is named {name!r}", fix)


def _manager(phase: Phase, config: PipelineConfig) -> RewritePatternManager:
    rules = [*(rule() for rule in phase.rules), *_asked_for(phase, config)]
    return RewritePatternManager(*(rule for rule in rules if type(rule).__name__ not in config.disabled_rules))


def _asked_for(phase: Phase, config: PipelineConfig) -> list[PatternRewriter]:
    """Of the rules that a user gave, those that run in this phase; and those that a GPU gains by."""
    known = optional_rules().values()
    if phase.name == USER_RULES:
        return [rule for rule in config.rules if type(rule) not in known]
    given = [rule for rule in config.rules if type(rule) in phase.on_request]
    own = phase.on_gpu if config.device == "cuda" else ()
    return [*given, *(rule() for rule in own if rule not in map(type, given))]
