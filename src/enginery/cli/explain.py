"""`enginery explain [MODEL] [RULE]`: what the phases did to the network, and why a rule did not fire."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from enginery.cli.options import EngineOptions, Json, takes
from enginery.cli.output import print_json, print_table
from enginery.errors import UsageError

if TYPE_CHECKING:
    from enginery.network.network import Network
    from enginery.rewriting.pipeline import PipelineReport

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL] [RULE]", help="A model, a rule of its phases, or both.", show_default=False),
]


@takes(EngineOptions)
def explain(
    options: EngineOptions,
    words: Words = None,
    diff: Annotated[bool, typer.Option("--diff", help="What --disable-rule and --rule change in the network.")] = False,
    text: Annotated[bool, typer.Option("--text", help="Print the rewritten network itself.")] = False,
    as_json: Json = False,
) -> None:
    """Show phases, rules, counts, milliseconds, layers; with RULE, each application or the nearest miss."""
    model, rule = split_words(words or [])
    arguments = options.arguments()
    network, report = rewrite(model, **arguments)
    if rule is not None:
        explain_rule(model, rule, report, arguments)
    elif diff:
        everything, _ = rewrite(model, **{**arguments, "disabled_rules": (), "rules": ()})
        print(everything.diff(network))
    elif text:
        print(network)
    elif as_json:
        print_json(report.to_json())
    else:
        show_phases(report)


def split_words(words: list[str]) -> tuple[str | None, str | None]:
    """MODEL and RULE; a single word is a model if it is a path or a hub id, else a rule."""
    if len(words) > 2:
        raise UsageError(f"{len(words)} arguments given", "enginery explain [MODEL] [RULE]")
    if len(words) == 1 and words[0].isidentifier() and not Path(words[0]).exists():
        return None, words[0]
    return words[0] if words else None, words[1] if len(words) == 2 else None


def rewrite(model: str | None, **arguments) -> tuple[Network, PipelineReport]:
    from enginery.llm import rewritten_network

    return rewritten_network(model, **arguments)


def show_phases(report: PipelineReport) -> None:
    rows = []
    for name, phase in report.phases:
        rows.append((name, "", f"{phase.milliseconds:.1f}", f"{phase.layers_before} → {phase.layers_after}"))
        rows += [
            (f"└ {rule.label}", str(rule.rewritten), f"{rule.milliseconds:.1f}", "")
            for rule in phase.rules.values()
            if rule.rewritten or rule.matched
        ]
    print_table("", ("phase, rule", "applied", "ms", "layers"), rows)


def explain_rule(model: str | None, rule: str, report: PipelineReport, arguments: dict) -> None:
    """Each application of the rule in each phase; where there is none, the nearest miss and its reason."""
    phases = [(name, phase) for name, phase in report.phases if rule in phase.rules]
    if not phases:
        names = sorted({label for _, phase in report.phases for label in phase.rules})
        raise UsageError(f"no rule is named {rule!r}", f"Rules: {', '.join(names)}")
    for name, phase in phases:
        found = [application for application in phase.applications if application.rule == rule]
        facts = phase.rules[rule]
        print(
            f"{name}: {rule} tried {facts.tried}, matched {facts.matched}, applied {facts.rewritten} ({facts.location})"
        )
        for application in found:
            print(f"  {application.module_path or '(no module)'}: {application}")
        for reason, count in facts.declined.most_common():
            print(f"  declined {count}: {reason}")
    if not any(phase.rules[rule].rewritten for _, phase in phases):
        from enginery.llm import nearest_miss

        print(nearest_miss(model, rule, **arguments) or "  its pattern fits; see why it declines")


def register(app: typer.Typer) -> None:
    app.command()(explain)
