"""The page as a browser shows it: no errors, deep links, search, boxes that close, keys, and a layout that holds."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from enginery.network import Network
from enginery.rewriting.page import page
from rewriting.test_page import HOSTILE, Model, Rewritten, SigmoidOfTanh, SiluByHand, hostile, rewritten

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--window-size=1600,1000", "--virtual-time-budget=3000", "--dump-dom",
)  # fmt: skip

# Reads the drawn graph: its nodes as rectangles, wires as their ends.
GEOMETRY = """
const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const overlaps = (side) => {
  const faces = all(`.pane[data-side=${side}] .node`).map(box);
  const cross = (a, b) => a[0] < b[2] - 0.1 && b[0] < a[2] - 0.1 && a[1] < b[3] - 0.1 && b[1] < a[3] - 0.1;
  return faces.flatMap((a, i) => faces.slice(0, i).filter((b) => cross(a, b))).length;
};
const rising = (side) => all(`.pane[data-side=${side}] .wires path`).filter((path) => {
  const ends = [path.getPointAtLength(0), path.getPointAtLength(path.getTotalLength())];
  return !(ends[0].y <= ends[1].y);
}).length;
const nodes = (side, more = "") => all(`.pane[data-side=${side}] .node${more}`);
"""


def browse(text: str, folder: Path, fragment: str = "", script: str = "") -> str:
    """The document behind the page's own script, and behind ours, which the page's policy would keep out."""
    if script:
        text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", text)
        text = text.replace("</body>", f"<script>{GEOMETRY}{script}</script></body>")
    file = folder / "page.html"
    file.write_text(text)
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"file://{file}#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors
    return done.stdout


def results(text: str, folder: Path, script: str, fragment: str = "") -> dict[str, Any]:
    """What `script` left in `seen`."""
    dom = browse(
        text, folder, fragment, f"const seen = {{}};{script}document.body.dataset.seen = JSON.stringify(seen);"
    )
    (data,) = re.findall(r'data-seen="(.*?)"', dom)
    return json.loads(unescape(data))


@pytest.fixture(scope="module")
def text() -> str:
    network = Network.from_module(Model(3), (torch.randn(4, 8),))
    return page(*rewritten(network, ("SiluByHand", SiluByHand()), ("SigmoidOfTanh", SigmoidOfTanh())), title="model")


def shown(dom: str) -> dict[str, str]:
    """Class of each drawn layer and closed box of the side `after`, by name."""
    after = dom[dom.index('data-side="after"') :]
    groups = re.findall(r'<g class="(node[^"]*)"[^>]*?data-(?:layer|box)="([^"]*)"', after)
    return {name: style for style, name in groups}


def test_the_address_says_what_is_shown(text: str, tmp_path: Path) -> None:
    dom = browse(text, tmp_path, "q=tanh+float32&closed=norm&layer=layers.0.mlp.tanh")
    nodes = shown(dom)
    assert "match" in nodes["layers.0.mlp.tanh"]
    assert "selected" in nodes["layers.0.mlp.tanh"]
    assert "match" not in nodes["layers.0.mlp.up.linear"]
    assert 'class="searching"' in dom
    panel = re.sub(r"<[^>]*>", " ", dom[dom.index("<aside") : dom.index("</aside>")])
    for words in ("aten.tanh", "Made by", "SigmoidOfTanh", "sigmoid(x) = (1 + tanh(x / 2)) / 2", "test_page.py:",
                  "stands for", "layers.0.mlp.silu", "float32[4, 16]"):  # fmt: skip
        assert words in panel
    assert "0 before, 4 after" in dom


def test_a_console_error_would_be_seen(text: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="CONSOLE"):
        browse(text, tmp_path, script="throw new Error('on purpose');")


SCENARIO = """
const key = (target, name) => target.dispatchEvent(
  new KeyboardEvent("keydown", {key: name, bubbles: true, cancelable: true}));
const click = (target) => target.dispatchEvent(new MouseEvent("click", {bubbles: true}));
const field = byId("search");
seen.counts = [nodes("before").length, nodes("after").length];
seen.overlaps = [overlaps("before"), overlaps("after")];
seen.rising = [rising("before"), rising("after")];
seen.gone = nodes("before", ".gone").map((e) => e.dataset.layer);
seen.made = nodes("after", ".made").length;
seen.types = all(".pane[data-side=before] .type").map((e) => e.textContent);

click(all(".pane[data-side=before] .heading[data-box='layers.0.mlp']")[0]);
seen.closed = [nodes("before").length, nodes("after").length, location.hash];
seen.shares = all(".pane[data-side=after] .share").length;

field.value = "sigmoidoftanh";
field.dispatchEvent(new Event("input"));
seen.found = [nodes("before", ".match").length, nodes("after", ".match").length, location.hash];
key(field, "Enter");
seen.opened = [nodes("after").length, nodes("after", ".current").map((e) => e.dataset.layer), state.layer];
key(field, "Enter");
seen.next = nodes("after", ".current").map((e) => e.dataset.layer);
key(field, "Escape");
key(field, "Escape");
seen.cleared = [document.body.className, state.layer, state.q, location.hash];

const silu = nodes("before").find((e) => e.dataset.layer === "layers.0.mlp.silu");
silu.focus();
key(silu, "Enter");
seen.relatives = nodes("after", ".relative").length;
key(silu, "ArrowDown");
seen.walked = document.activeElement.dataset.layer;
key(document.body, "Escape");
key(document.body, "b");
seen.hidden = all(".pane").map((e) => e.hidden);
key(document.body, "+");
seen.zoom = location.hash;
seen.table = document.querySelector("aside table").textContent;
byId("part").value = "1";
byId("part").dispatchEvent(new Event("change"));
seen.part = [nodes("before").map((e) => e.dataset.layer), location.hash];
click(byId("close-all"));
"""


def test_searching_closing_walking(text: str, tmp_path: Path) -> None:
    seen = results(text, tmp_path, SCENARIO)
    assert seen["counts"] == [5, 9]
    assert seen["overlaps"] == [0, 0]
    assert seen["rising"] == [0, 0]
    assert seen["gone"] == ["layers.0.mlp.silu"]
    assert seen["made"] == 5
    assert seen["types"] == ["f32[4,8]", "f32[4,16]", "f32[4,16]", "f32[4,8]", "f32[4,8]"]
    assert seen["closed"] == [3, 3, "#closed=mlp"]
    assert seen["shares"] == 3
    assert seen["found"] == [0, 1, "#q=sigmoidoftanh&closed=mlp"]
    size, current, selected = seen["opened"]
    assert size == 9
    assert current == [selected]
    assert len(seen["next"]) == 1
    assert seen["next"] != current
    assert seen["cleared"] == ["", "", "", ""]
    assert seen["relatives"] == 5
    assert seen["walked"] == "layers.0.mlp.down.linear"
    assert seen["hidden"] == [False, True]
    assert seen["zoom"] == "#view=before&zoom=1.20"
    for words in ("phase of SiluByHand", "SigmoidOfTanh", "16 → 19", "19 → 28", "16 → 28"):
        assert words in seen["table"]
    assert seen["part"][0] == ["tanh"]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    dom = browse(page(*hostile(), title=HOSTILE), tmp_path, "layer=layers.0.silu&q=%3Cscript%3E")
    assert "data-pwned" not in dom
    assert "<img" not in dom
    assert "&lt;script&gt;document" in dom


def random_network(size: int) -> Rewritten:
    """Layers of one or two operands in modules chosen at random, so that modules are left and entered again."""
    chance, network = random.Random(7), Network()
    values: list[Any] = [network.add_input("x", (4, 8), torch.float32)]
    for _ in range(size):
        path = ".".join(chance.choices("abc", k=chance.randrange(4)))
        with network.inserting_before(None, module_path=path):
            one, other = (values[max(0, len(values) - chance.randrange(1, 9))] for _ in range(2))
            op = chance.choice([torch.ops.aten.add.Tensor, torch.ops.aten.silu.default])
            values.append(network.call(op, one, other) if op is torch.ops.aten.add.Tensor else network.call(op, one))
    network.set_output("y", values[-1])
    return rewritten(network, ("SiluByHand", SiluByHand()))


def test_three_hundred_layers_in_tangled_modules(tmp_path: Path) -> None:
    before, after, phases = random_network(300)
    script = """
    for (const side of ["before", "after"]) seen[side] = [nodes(side).length, overlaps(side), rising(side)];
    seen.whole = !document.querySelector("main").innerHTML.includes("NaN");
    """
    seen = results(page(before, after, phases, title="large"), tmp_path, script)
    assert seen == {"before": [300, 0, 0], "after": [len(after), 0, 0], "whole": True}
