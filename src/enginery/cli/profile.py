"""`enginery inspect --profile`: what a step costs, region by region, and with `--measure` how long it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from enginery.cli.options import EngineOptions
from enginery.cli.output import print_table
from enginery.cli.progress import Progress
from enginery.cli.units import parse_count
from enginery.errors import UsageError

if TYPE_CHECKING:
    from enginery.analysis import Device, DtypeAudit, Profile, Step
    from enginery.network import Network

CONTEXT = 1024
"""tokens in the KV cache where the command line names no number"""


@dataclass(frozen=True)
class InspectOptions(EngineOptions):
    """As `EngineOptions`, and a step and a device to look at."""

    profile: Annotated[bool, typer.Option("--profile", help="FLOPs, bytes and roofline time of a step.")] = False
    measure: Annotated[bool, typer.Option("--measure", help="Build the engine too and time its regions.")] = False
    tokens: Annotated[str | None, typer.Option(help="New tokens of the step; default: one a sequence.")] = None
    sequences: Annotated[str, typer.Option(help="Sequences of the step.")] = "1"
    context: Annotated[str | None, typer.Option(help="Tokens of each sequence in the KV cache; default: 1024.")] = None
    device_spec: Annotated[
        str | None, typer.Option(help="cpu, h100, h200, a100 or bandwidth=1e12,bfloat16=1e14; default: this machine.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        own = {field.name for field in fields(InspectOptions)} - {field.name for field in fields(EngineOptions)}
        return {name: value for name, value in super().arguments().items() if name not in own}

    def step(self, longest: int) -> Step:
        """Raises UsageError for a sequence that the model was not made for."""
        from enginery.analysis import Step

        sequences = parse_count(self.sequences, "--sequences")
        tokens = sequences if self.tokens is None else parse_count(self.tokens, "--tokens")
        new = Step(tokens, sequences).longest
        context = min(CONTEXT, max(0, longest - new))
        if self.context is not None:
            context = parse_count(self.context, "--context")
        step = Step(tokens, sequences, context)
        if step.longest > longest:
            cause = f"a sequence of {step.longest} tokens is longer than the model's {longest}"
            raise UsageError(cause, "Lower --context or --tokens")
        return step


@dataclass(frozen=True)
class Profiled:
    """A profile by regions, the dtypes of the network and, if asked for, seconds of one run of each region."""

    profile: Profile
    dtypes: DtypeAudit
    measured: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        found = {"profile": self.profile.to_json(), "dtypes": self.dtypes.to_json()}
        return {**found, "measured": self.measured_rows()} if self.measured else found

    def measured_rows(self) -> list[dict[str, Any]]:
        """Seconds of all runs of each region, and of the step: under the roofline, measured, and their ratio."""
        rows = []
        for part in self.profile.parts:
            times = self.profile.of_part(part).seconds, self.measured[part.name] * part.count
            rows.append((part.name, part.count, *times))
        rows.append(("step", 1, sum(row[2] for row in rows), sum(row[3] for row in rows)))
        names = ("region", "count", "roofline_seconds", "measured_seconds", "ratio")
        return [dict(zip(names, (*row, row[3] / row[2] if row[2] else 0.0), strict=True)) for row in rows]


def profile_model(model: str | None, options: InspectOptions) -> Profiled:
    from enginery.analysis import audit_dtypes, find_device, this_device
    from enginery.llm import step_network

    arguments = options.arguments()
    if options.measure and options.backend != "compiled":
        raise UsageError("only a compiled engine has regions to measure", "Leave --backend out")
    device = None if options.device_spec is None else find_device(options.device_spec)
    network, manifest = step_network(model, **arguments)
    step = options.step(manifest.facts.max_position_embeddings)
    measured = measure_model(model, step, arguments) if options.measure else {}
    found = profile_regions(network, step, device or this_device(manifest.device))
    return Profiled(found, audit_dtypes(network), measured)


def profile_regions(network: Network, step: Step, device: Device) -> Profile:
    """Each distinct region once, with the number of times that it is run."""
    from enginery.analysis import Part, join, profile
    from enginery.engine.regions import outline

    regions = outline(network)
    counts = Counter(region.key for region in regions.regions)
    profiles = []
    for key, region in regions.distinct.items():
        pairs = zip(region.network.inputs, region.bindings, strict=True)
        weights = [inner for inner, outer in pairs if outer.is_constant]
        part = Part(region.name, counts[key])
        profiles.append(profile(region.network, step, device, weights=weights, part=part))
    return join(profiles)


def measure_model(model: str | None, step: Step, arguments: Mapping[str, Any]) -> dict[str, float]:
    """Builds the engine, or finds it in the cache, and times one run of each distinct region, by its name."""
    from enginery.cli.measure import region_timer
    from enginery.engine.artifact import open_artifact
    from enginery.engine.config import BuildConfig
    from enginery.llm import open_model

    with Progress() as progress:
        opened = open_model(model, BuildConfig(**arguments), progress=progress)
    opened.engine.close()
    return region_timer(open_artifact(opened.directory), step).measure()


def show(found: Profiled) -> None:
    from enginery.analysis.text import si

    print(found.profile)
    print(f"\n{found.dtypes}")
    if found.measured:
        rows = [
            (row["region"], str(row["count"]), si(row["roofline_seconds"], "s"), si(row["measured_seconds"], "s"),
             f"{row['ratio']:.2f}")
            for row in found.measured_rows()
        ]  # fmt: skip
        tokens = found.profile.step.tokens / found.measured_rows()[-1]["measured_seconds"]
        print()
        print_table("", ("region", "×", "roofline", "measured", "ratio"), rows)
        print(f"measured: {tokens:,.0f} tokens/s")
