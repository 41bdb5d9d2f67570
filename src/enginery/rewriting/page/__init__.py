"""One HTML page of a rewritten network: complete in itself, it loads nothing and runs no code but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

from enginery.network import Network
from enginery.rewriting.page.facts import Phases, page_facts

_HERE = Path(__file__).parent
_SCRIPTS = ("layout.js", "modules.js", "drawing.js", "panel.js", "page.js")


def page(before: Network, after: Network, phases: Phases, *, title: str) -> str:
    """The page of a network as it was imported and as it is behind `phases`, with what each rule did.

    Facts are data in the page, never markup or code; its content security policy names the script by its digest.
    """
    script = "\n".join((_HERE / name).read_text() for name in _SCRIPTS)
    facts = page_facts(before, after, phases, title=title)
    parts = {
        "TITLE": _escaped(title),
        "DIGEST": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "STYLE": (_HERE / "page.css").read_text(),
        "FACTS": _inert(json.dumps(facts, ensure_ascii=False, separators=(",", ":"))),
        "SCRIPT": script,
    }
    pieces = (_HERE / "page.html").read_text().split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _inert(data: str) -> str:
    """JSON in which nothing can end or nest the element that holds it."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


__all__ = ["page"]
