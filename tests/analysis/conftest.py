from __future__ import annotations

import logging

import pytest


@pytest.fixture(autouse=True)
def _quiet_torch() -> None:
    """torch.export writes a trace for whoever listens, as the log capture of pytest does: that doubles its time."""
    logging.getLogger("torch.__trace").propagate = False
