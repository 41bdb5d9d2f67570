"""What a record says: a table for the terminal, tables in Markdown for the documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from decoder.job import OPEN
from decoder.protocol import ARRIVALS, DTYPES, FIRST_START, GROUPS, TARGETS, Arm, Sizes, Target
from decoder.roofline import Ceilings, Roofline, Shape
from decoder.shapes import FULL, LLAMA_8B

BEGIN, END = "<!-- begin: benchmarks/gpu.py --markdown -->", "<!-- end -->"
DETAILED = ("build", "host", "mixed", ARRIVALS, "ceilings", OPEN)
STEP_COUNTS = ("steps", "replayed", "tokens", "padded")
Record = Mapping[str, Any]


COLUMNS = (
    "unit", "measured", "another GPU", "limit", "of the limit", "goal", "reached", "vLLM 0.24", "vLLM here",
    "transformers",
)  # fmt: skip
"""Those that are empty are left out. "another GPU": of the same kind; such results are put into a record by hand."""


def show(record: Record) -> str:
    """For a terminal of any width."""
    found = list(figures(record))
    shown = _filled(found)
    lines = [("", *shown)]
    lines += [(f"{row['dtype']} {row['arm']}", *(row[name] for name in shown)) for row in found]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = record["hardware"].get("gpu", record["hardware"]["cpu"])
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{title}, {record['shape']}", *rows])


def figures(record: Record) -> Iterator[dict[str, Any]]:
    """One row for each arm that was tried, in the order of the protocol. Limits, goals and vLLM's figures are of the
    full shape."""
    results, another, is_full = record["results"], record.get("another", {}), record["shape"] == FULL
    for dtype in DTYPES:
        roof = roofline(results, dtype)
        for arm in _known_arms(results, dtype):
            mine = results.get(f"enginery {dtype} {arm.name}", {})
            target = TARGETS.get((dtype, arm.name) if is_full else ("", ""), Target(None, None))
            limit = limit_of(roof, arm) if is_full else None
            yield {
                "dtype": dtype,
                "arm": arm.name,
                "unit": arm.unit,
                "measured": _figure(mine),
                "another GPU": _figure(another.get(f"enginery {dtype} {arm.name}", {})),
                "limit": _figure({"value": limit}) if limit is not None else "",
                "of the limit": _share(mine.get("value"), limit, arm),
                "goal": _figure({"value": target.goal}) if target.goal is not None else "",
                "reached": _verdict(mine.get("value"), target.goal, arm),
                "vLLM 0.24": _figure({"value": target.vllm}) if target.vllm is not None else "",
                "vLLM here": _figure(results.get(f"vllm {dtype} {arm.name}", {})),
                "transformers": _figure(results.get(f"transformers {dtype} {arm.name}", {})),
            }


def _filled(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """The columns that are not empty."""
    rows = list(rows)
    return [name for name in COLUMNS if any(row[name] for row in rows)]


def _known_arms(results: Mapping[str, Any], dtype: str) -> list[Arm]:
    tried = {key.split(" ", 2)[2] for key in results if key.split(" ", 2)[1] == dtype}
    full = [arm for group in GROUPS if group not in ("transformers", "vllm") for arm in Sizes().arms(group)]
    known = {arm.name: arm for arm in full}
    others = [
        Arm("", name, results.get(f"enginery {dtype} {name}", {}).get("unit", "")) for name in tried - known.keys()
    ]
    return [arm for arm in full if arm.name in tried] + sorted(others, key=lambda arm: arm.name)


def roofline(results: Mapping[str, Any], dtype: str) -> Roofline:
    """With the ceilings of the record where it has them."""
    ceilings = Ceilings().updated(next((line for key, line in results.items() if key.endswith(" ceilings")), {}))
    return Roofline(Shape.of(LLAMA_8B), ceilings, fp8=dtype == "fp8")


def limit_of(roof: Roofline, arm: Arm) -> float | None:
    """In the unit of the arm."""
    if arm.group in ("decode", "context") or (arm.group == "profile" and "decode" in arm.name):
        return 1e3 * roof.decode(arm.batch, arm.length + arm.new / 2)
    if arm.group in ("prefill", "profile"):
        return 1e3 * roof.prefill(arm.length, arm.batch)
    if arm.group == "mixed":
        requests = Sizes().mixed()
        return sum(count for _, count in requests) / roof.load(requests)
    return None


def _is_rate(arm: Arm) -> bool:
    return arm.unit.endswith("/s")


def _share(value: float | None, limit: float | None, arm: Arm) -> str:
    if value is None or limit is None:
        return ""
    return f"{100 * (value / limit if _is_rate(arm) else limit / value):.0f} %"


def _verdict(value: float | None, goal: float | None, arm: Arm) -> str:
    if value is None or goal is None:
        return ""
    return "yes" if (value >= goal if _is_rate(arm) else value <= goal) else "no"


def _figure(line: Mapping[str, Any]) -> str:
    if "failed" in line or "skipped" in line:
        return "failed" if "failed" in line else "not run"
    value = line.get("value")
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


# Markdown


def tables(record: Record) -> str:
    """The measured tables of docs/performance.md."""
    return "\n\n".join(
        [
            _provenance(record),
            _limits(record),
            _main_table(record),
            "\n".join(_details(record)),
            *_kinds_of_steps(record),
            *_profiles(record),
        ]
    )


def put_into(document: Path, text: str) -> None:
    """Between the marks of the document."""
    before, _, rest = document.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{document} has no lines {BEGIN} and {END}")
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def _provenance(record: Record) -> str:
    hardware, versions = record["hardware"], record["versions"]
    machine = hardware.get("gpu", hardware["cpu"])
    driver = f", driver {hardware['driver']}" if "driver" in hardware else ""
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if name in versions)
    days = sorted({line["when"][:10] for line in record["results"].values() if "when" in line})
    dates = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}" if days else "never"
    return f"{machine}{driver}, {packages}, measured {dates}."


def _limits(record: Record) -> str:
    """What the limits were computed from."""
    wide, narrow = (roofline(record["results"], dtype) for dtype in DTYPES)
    ceilings = wide.ceilings
    return (
        f"Limits from {ceilings.read / 1e12:.2f} TB/s, {ceilings.bf16 / 1e12:.0f} TFLOP/s in bfloat16 and "
        f"{ceilings.fp8 / 1e12:.0f} in float8; {wide.weight_bytes / 1e9:.2f} GB of weights in bfloat16, "
        f"{narrow.weight_bytes / 1e9:.2f} in float8, {wide.shape.kv_bytes >> 10} KiB of KV per token."
    )


def _main_table(record: Record) -> str:
    rows = [row for row in figures(record) if not row["arm"].startswith(("profile", "steps"))]
    shown = _filled(rows)
    return _markdown(["", *shown], ([f"{row['dtype']}, {row['arm']}", *(row[name] for name in shown)] for row in rows))


def _details(record: Record) -> Iterator[str]:
    """What some arms know beside their value."""
    for key, line in record["results"].items():
        arm = key.split(" ", 2)[2]
        if arm not in DETAILED and not arm.startswith(FIRST_START) and "value" in line:
            continue
        details = [f"{name} {_detail(value)}" for name, value in line.items() if name not in ("unit", "when", "took")]
        yield f"- {key}: " + "; ".join(details).replace("value ", "", 1)


def _detail(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_detail(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _kinds_of_steps(record: Record) -> Iterator[str]:
    for key, line in record["results"].items():
        if "kinds" not in line:
            continue
        busy, waits = line["device, s"], line["device waits, s"]
        yield f"### {key}: {line['value']:.2f} s, of which the device works {busy:.2f} s and waits {waits:.2f} s"
        columns = (*STEP_COUNTS, "engine, ms", "ms/step", "sampling, ms", "waits, ms", "share")
        yield _markdown(("kind", *columns), (_kind(kind, sums, line["value"]) for kind, sums in line["kinds"].items()))


def _kind(kind: str, sums: Mapping[str, float], wall: float) -> tuple[str, ...]:
    counts = [f"{sums[name]:,.0f}" for name in STEP_COUNTS]
    times = [sums[name] for name in ("engine, ms", "sampling, ms", "waits, ms")]
    engine, *rest = (f"{time:,.0f}" for time in times)
    share = f"{sum(times) / wall / 10:.1f} %"
    return (kind, *counts, engine, f"{sums['engine, ms/step']:.2f}", *rest, share)


def _profiles(record: Record, listed: int = 20) -> Iterator[str]:
    for key, line in record["results"].items():
        if "kernels" not in line:
            continue
        yield f"### {key}: {line['value']:.3f} {line['unit']}"
        groups = sorted(line["groups"].items(), key=lambda item: -item[1]["us"])
        yield _markdown(
            ("group", "kernels", "µs", "share"),
            ((name, f"{g['count']:.0f}", f"{g['us']:.0f}", f"{100 * g['share']:.1f} %") for name, g in groups),
        )
        yield _markdown(
            ("kernel", "group", "calls", "µs", "share"),
            (
                (_kernel(k["name"]), k["group"], f"{k['count']:.0f}", f"{k['us']:.0f}", f"{100 * k['share']:.1f} %")
                for k in line["kernels"][:listed]
            ),
        )
        if "idle" in line:
            yield from _idle(line["idle"])


def _idle(idle: Record) -> Iterator[str]:
    borders = idle["borders"]
    between = f"; between steps {borders['us each']:.0f} µs each, {borders['count']} seen" if borders["count"] else ""
    yield f"Idle under the profiler: {idle['us']:.0f} µs in {idle['count']:.0f} places of a step{between}."
    yield _markdown(
        ("idle after", "before", "times", "µs"),
        (
            (_kernel(gap["before"]), _kernel(gap["after"]), f"{gap['count']:.0f}", f"{gap['us']:.0f}")
            for gap in idle["largest"]
        ),
    )


def _kernel(name: str) -> str:
    return f"`{name[:80]}`"


def _markdown(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
