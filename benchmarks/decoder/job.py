"""What a worker process is told, and how it reports. Without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from decoder.protocol import TINY_SIZES, Arm, Sizes

OPEN = "open"
"""the arm that opening an engine is where it is measured by no other"""


class NotAvailable(Exception):
    """Something that is not installed or not built yet: its arms are skipped."""


class OutOfTime(BaseException):
    """The budget is spent. No `Exception`: a session would take it for the failure of a request."""


@dataclass(frozen=True)
class Job:
    engine: str
    """enginery, transformers or vllm"""
    dtype: str
    """bf16 or fp8"""
    groups: tuple[str, ...]
    names: tuple[str, ...]
    """arms still to be measured"""
    deadline: float
    """of the system's clock (`time.time`)"""
    pipe: int
    """file descriptor that takes the messages"""
    device: str
    directory: str
    """of the built engine"""
    tiny: bool = False
    layers: int | None = None
    backend: str = "compiled"
    step_tokens: int | None = None
    repeats: int = 2
    peer_requests: int = 64
    peer_seconds: float = 60.0

    @property
    def sizes(self) -> Sizes:
        return TINY_SIZES if self.tiny else Sizes()

    @property
    def arms(self) -> list[Arm]:
        return [arm for group in self.groups for arm in self.sizes.arms(group) if arm.name in self.names]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("groups", "names")})

    def send(self, message: Mapping[str, Any]) -> None:
        os.write(self.pipe, (json.dumps(message) + "\n").encode())
