"""The table of all rules for `docs/rules.md`: equations of docstrings, phases of the pipeline, gains of records."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from enginery.rewriting.pipeline import PHASES, PipelineConfig
from enginery.rewriting.rule import PatternRewriter
from record import RESULTS

BEGIN, END = "<!-- begin: benchmarks/rules.py --markdown -->", "<!-- end -->"
DEVICES = ("cpu", "cuda")
ESCAPED = r"\|"
NOISE, TOGETHER = "noise", " + "
"""names of rows: a network beside itself; between rules that are switched together"""

Record = Mapping[str, Any]


def put_table(document: Path, results: Path = RESULTS) -> None:
    """Between the marks of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{document} has no lines {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


def table(results: Path = RESULTS) -> str:
    records = {device: _record(results / f"rules_{device}.json") for device in DEVICES}
    lines = [["rule", "equation", "phase", "default", *(f"gain, {name}" for name in ("CPU", "GPU"))]]
    lines.append(["---"] * len(lines[0]))
    for rule, phases, default in rules():
        gains = [_gain(records[device], rule.__name__) for device in DEVICES]
        lines.append([f"`{rule.__name__}`", equation(rule), phases, default, *gains])
    rows = "\n".join(f"| {' | '.join(cell.replace('|', ESCAPED) for cell in line)} |" for line in lines)
    return "\n\n".join([rows, *(_provenance(found) for found in records.values() if found)])


def rules() -> Iterator[tuple[type[PatternRewriter], str, str]]:
    """Each rule once, the names of its phases, and whether it is on."""
    found: dict[type[PatternRewriter], list[str]] = {}
    for phase in PHASES:
        for rule in (*phase.rules, *phase.on_request):
            found.setdefault(rule, []).append(phase.name)
    on = {name: on_by_default(device) for name, device in zip(("CPU", "GPU"), DEVICES, strict=True)}
    for rule, phases in found.items():
        places = [name for name, names in on.items() if rule.__name__ in names]
        yield rule, ", ".join(phases), "off" if not places else "on" if len(places) == len(on) else f"on, {places[0]}"


def on_by_default(device: str) -> frozenset[str]:
    """The names of the rules that run on a device without being asked for."""
    config = PipelineConfig(device=device)
    wanted = [phase for phase in PHASES if phase.wanted(config)]
    own = [rule for phase in wanted for rule in (*phase.rules, *(phase.on_gpu if device == "cuda" else ()))]
    return frozenset(rule.__name__ for rule in own)


def equation(rule: type[PatternRewriter]) -> str:
    """The first line of the rule's own docstring, or of its file's."""
    text = rule.__dict__.get("__doc__") or inspect.getmodule(rule).__doc__  # type: ignore[union-attr]
    return " ".join(str(text).strip().splitlines()[0].split())


def _record(path: Path) -> Record:
    return json.loads(path.read_text()) if path.is_file() else {}


def _gain(found: Record, rule: str) -> str:
    outcome = found.get("results", {}).get("rules", {})
    name = rule if rule in outcome else next((each for each in outcome if rule in each.split(TOGETHER)), None)
    if name is None:
        return "–"
    row = outcome[name]
    if "needed" in row:
        return "needed"
    batches = [value for value in row.values() if isinstance(value, dict)]
    where = row["model"] if name == rule else f"{row['model']}, {name.count(TOGETHER) + 1} rules together"
    return " · ".join(f"{value['gain, %']:+.1f}" for value in batches) + f" % ({where})"


def _provenance(found: Record) -> str:
    hardware, versions, outcome = found["hardware"], found["versions"], found["results"]["rules"]
    batches = next(
        [n for n, v in row.items() if isinstance(v, dict)] for row in outcome.values() if "needed" not in row
    )
    spread = ""
    if NOISE in outcome:
        values = [outcome[NOISE][name] for name in batches]
        spread = "; noise " + " · ".join(f"{v['gain, %']:+.1f} ± {v['spread, %']:.1f}" for v in values) + " %"
    machine = hardware.get("gpu", f"{hardware['cpu']}, {hardware['cores']} cores") + f", torch {versions['torch']}"
    return (
        f"Gains are of {' · '.join(batches)}, {found['results']['layers']} layers: {machine}, `{found['command']}`, "
        f"{found['when'][:10]}{spread}."
    )
