"""Devices by name or by numbers: `h200`, `cpu`, `bandwidth=1.2e12,bfloat16=200e12`, `h100,bandwidth=2e12`."""

from __future__ import annotations

import math
from dataclasses import replace
from types import MappingProxyType

import torch

from enginery.analysis.cpu_device import measured_cpu
from enginery.analysis.device import DEVICES, Device
from enginery.errors import UsageError

FLAG = "--device-spec"


def find_device(text: str) -> Device:
    """The device of a specification: a name, `key=number` pairs separated by commas, or both.

    Keys are `bandwidth` in bytes a second, `flops` for every dtype, or a dtype, in FLOPs a second. `cpu` is this
    machine's, measured anew, the best so far. Raises UsageError for what is none of these.
    """
    parts = [part.strip() for part in text.split(",")]
    device = None if "=" in parts[0] else _named(parts.pop(0))
    numbers = dict(_number(part) for part in parts)
    if device is None and not {"bandwidth"} < numbers.keys():
        raise UsageError(
            f"{FLAG} {text!r} has no bandwidth or no FLOPs", "Give bandwidth=BYTES_PER_SECOND,flops=FLOPS_PER_SECOND"
        )
    device = device or Device(text, 0.0, MappingProxyType({}), "given")
    flops = dict(device.flops)
    if "flops" in numbers:
        flops = dict.fromkeys({*flops, torch.float32}, numbers["flops"])
    flops |= {dtype: value for name, value in numbers.items() if (dtype := _dtype(name)) is not None}
    flops.setdefault(torch.float32, min(flops.values()))
    bandwidth = numbers.get("bandwidth", device.bandwidth)
    return replace(device, name=text, bandwidth=bandwidth, flops=MappingProxyType(flops)) if numbers else device


def this_device(kind: str) -> Device:
    """The device of this machine that engines run on: `cpu`, or the table's entry for the `cuda` device."""
    if kind == "cpu":
        return measured_cpu()
    title = torch.cuda.get_device_name()
    found = next((device for device in DEVICES if device.name.upper() in title.upper()), None)
    if found is None:
        raise UsageError(f"{title} is not in the table of devices", f"Describe it with {FLAG} bandwidth=…,flops=…")
    return found


def _named(name: str) -> Device:
    if name.lower() == "cpu":
        return measured_cpu(again=True)
    found = next((device for device in DEVICES if device.name == name.lower()), None)
    if found is None:
        names = ", ".join(["cpu", *(device.name for device in DEVICES)])
        raise UsageError(f"{FLAG} names no device {name!r}", f"Give one of {names}, or bandwidth=…,flops=…")
    return found


def _number(part: str) -> tuple[str, float]:
    name, _, text = part.partition("=")
    if name not in ("bandwidth", "flops") and _dtype(name) is None:
        raise UsageError(f"{FLAG} does not know {name!r}", "Give bandwidth=…, flops=… or a dtype such as bfloat16=…")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{FLAG} {part!r} is not a positive number", "Give numbers such as 3.35e12")
    return name, value


def _dtype(name: str) -> torch.dtype | None:
    found = getattr(torch, name, None)
    return found if isinstance(found, torch.dtype) else None
