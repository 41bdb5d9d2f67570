"""`enginery explain [MODEL] [RULE]`: what the phases did to the network, and why a rule did not fire."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.cli.options import EngineOptions, Json, parse_options, takes
from enginery.cli.output import print_json, print_note, print_table, print_warning, write_atomically
from enginery.errors import UsageError

if TYPE_CHECKING:
    from enginery.llm import Rewriting
    from enginery.rewriting.alike import Group
    from enginery.rewriting.comparison import Comparison
    from enginery.rewriting.report import Report

Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[MODEL] [RULE]", help="A model, a rule of its phases, or both.", show_default=False),
]
Html = Annotated[Path | None, typer.Option("--html", help="Write one page: a layer before and after, by rule.")]
Against = Annotated[str | None, typer.Option(help="The options to compare with by --diff (default: none).")]


@takes(EngineOptions)
def explain(
    options: EngineOptions,
    words: Words = None,
    html: Html = None,
    diff: Annotated[bool, typer.Option("--diff", help="What these options change, in phases and network.")] = False,
    against: Against = None,
    text: Annotated[bool, typer.Option("--text", help="Print the rewritten network itself.")] = False,
    as_json: Json = False,
) -> None:
    """Show phases, rules, counts, milliseconds, layers; with RULE, each application or the nearest miss."""
    from enginery.llm import rewriting_of

    if text and as_json:
        raise UsageError("--text prints a network, --json the report", "Give one of them")
    arguments = options.arguments()
    base = parse_options(against or "", "--against").arguments() if diff or against is not None else None
    model, rule = split_words(words or [], arguments["rules"])
    arguments["rules"] = switched_on(arguments["rules"], rule)
    if html is not None and not html.parent.is_dir():
        raise UsageError(f"--html {html}: {html.parent} is no directory", "Make it, or give another file")
    found = rewriting_of(model, **arguments)
    if html is not None:
        write_page(html, found, rule)
    elif base is not None:
        show_difference(rewriting_of(model, **base), found, as_json=as_json)
    elif rule is not None:
        show_rule(found, rule, as_json=as_json)
    elif text:
        print(found.network)
    elif as_json:
        print_json(found.report.to_json())
    else:
        show_phases(found)
    if found.obstacle:
        print_warning(f"no engine can run this network: {found.obstacle}")


def split_words(words: list[str], rules: Iterable[Any]) -> tuple[str | None, str | None]:
    """MODEL and RULE. A single word is a rule if one has that name, or if it looks like one and is no path."""
    from enginery.rewriting.pipeline import check_rule_name, rule_names

    if len(words) > 2:
        raise UsageError(f"{len(words)} arguments given", "enginery explain [MODEL] [RULE]")
    known = (*rule_names(), *(type(rule).__name__ for rule in rules))
    is_rule = len(words) == 1 and (words[0] in known or (_is_class_name(words[0]) and not Path(words[0]).exists()))
    model, rule = (None, words[0]) if is_rule else (*words, None, None)[:2]
    if rule is not None:
        check_rule_name(rule, known)
    return model, rule


def switched_on(rules: tuple[Any, ...], name: str | None) -> tuple[Any, ...]:
    """The user's rules, and the rule that is asked about if it is one that is off by default."""
    from enginery.rewriting.pipeline import optional_rules

    asked = optional_rules().get(name or "")
    if asked is None or any(type(rule) is asked for rule in rules):
        return rules
    print_note(f"{name} is off by default; this is what it would do")
    return (*rules, asked())


def _is_class_name(word: str) -> bool:
    return word.isidentifier() and word[:1].isupper()


def write_page(file: Path, found: Rewriting, rule: str | None) -> None:
    from enginery.rewriting.page import page

    write_atomically(file, page(found.imported, found.network, found.report.phases, title=found.title), "--html")
    print(f"{file}#q={rule}" if rule else file)


def show_phases(found: Rewriting) -> None:
    rows = []
    for name, phase in found.report.phases:
        rows.append((name, "", f"{phase.milliseconds:.1f}", f"{phase.layers_before} → {phase.layers_after}"))
        rows += [
            (f"└ {rule.label}", str(rule.rewritten), f"{rule.milliseconds:.1f}", "")
            for rule in phase.rules.values()
            if rule.rewritten or rule.matched
        ]
    print_table("", ("phase, rule", "applied", "ms", "layers"), rows)


# One rule


def show_rule(found: Rewriting, rule: str, *, as_json: bool) -> None:
    """Each application in each phase; where there is none, the nearest miss and its reason."""
    phases = [(name, phase) for name, phase in found.report.phases if rule in phase.rules]
    applied = any(phase.rules[rule].rewritten for _, phase in phases)
    miss = found.nearest_miss(rule) if phases and not applied else None
    if as_json:
        print_json(
            {
                "rule": rule,
                "phases": [_rule_json(*phase, rule) for phase in phases],
                "nearest_miss": miss and asdict(miss),
            }
        )
        return
    if not phases:
        print(f"{rule} is not among the rules of this configuration: switched off, or of another device")
    for name, phase in phases:
        facts = phase.rules[rule]
        counts = f"tried {facts.tried}, matched {facts.matched}, applied {facts.rewritten}"
        print(f"{name}: {rule} {counts} ({facts.location})")
        show_applications(phase, rule)
        for reason, count in facts.declined.most_common():
            print(f"  declined {count}: {reason}")
    if miss is not None:
        print(miss)
    elif phases and not applied:
        print(f"{rule}: it would fit the network in front of its phase; a rule of that phase was there first")


def show_applications(phase: Report, rule: str) -> None:
    from enginery.rewriting.alike import alike

    found = [application for application in phase.applications if application.rule == rule]
    for group in alike((application.module_path, str(application)) for application in found):
        print(f"  {group.title() or 'outside the repeated layers'}")
        for line in group.lines:
            print(f"    {local(line, group)}")


def local(line: str, group: Group) -> str:
    """Without the path of the block that the group's title names."""
    return line.replace(f"{group.block}.", "") if group.block else line


def _rule_json(name: str, phase: Report, rule: str) -> dict[str, Any]:
    applications = [application.to_json() for application in phase.applications if application.rule == rule]
    return {"phase": name, **phase.rules[rule].to_json(), "applications": applications}


# Two configurations


def show_difference(base: Rewriting, found: Rewriting, *, as_json: bool) -> None:
    from enginery.rewriting.comparison import Comparison

    comparison = Comparison(base.network, base.report.phases, found.network, found.report.phases)
    if as_json:
        print_json(comparison.to_json())
        return
    rows = list(_difference_rows(comparison))
    if rows:
        print_table("", ("phase, rule", "applied", "layers"), rows)
    for group in comparison.groups():
        print(f"\n{group.title() or 'outside the repeated layers'}")
        print("\n".join(local(line, group) for line in group.lines))
    if not rows and not comparison.network:
        print("no difference")


def _difference_rows(comparison: Comparison) -> Iterable[tuple[str, ...]]:
    layers, rules = comparison.layers(), comparison.rules()
    for phase in dict.fromkeys([*layers, *rules]):
        yield phase, "", _arrow(layers.get(phase, {}).get("after"))
        for label, changes in rules.get(phase, {}).items():
            if "rewritten" in changes:
                yield f"└ {label}", _arrow(changes["rewritten"]), ""


def _arrow(pair: Any) -> str:
    if pair is None or pair[0] == pair[1]:
        return ""
    return " → ".join("none" if value is None else str(value) for value in pair)


def register(app: typer.Typer) -> None:
    app.command()(explain)
