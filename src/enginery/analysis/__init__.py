"""Facts about a network: what it costs in a step, and in which dtypes it computes. `docs/analysis.md` is the way in."""

from __future__ import annotations

from enginery.analysis.cost import Cost
from enginery.analysis.device import DEVICES, Device
from enginery.analysis.device_spec import find_device, this_device
from enginery.analysis.dtypes import DtypeAudit, audit_dtypes
from enginery.analysis.layer_cost import CostAnalyzer, LayerCost
from enginery.analysis.profile import Part, Profile, Row, join, profile
from enginery.analysis.step import Step

__all__ = [
    "DEVICES", "Cost", "CostAnalyzer", "Device", "DtypeAudit", "LayerCost", "Part", "Profile", "Row", "Step",
    "audit_dtypes", "find_device", "join", "profile", "this_device",
]  # fmt: skip
