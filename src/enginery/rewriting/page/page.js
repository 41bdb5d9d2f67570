// What a reader sees and does. The state is in the address: part, view, q, closed, layer, zoom.

const facts = JSON.parse(document.getElementById("facts").textContent);
const byId = (id) => document.getElementById(id);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const rules = new Map(
  facts.rules.map((rule, index) => [
    rule.label,
    {
      ...rule,
      index,
      letter: letter(index),
      hue: Math.round((25 + index * 137.508) % 360),
    },
  ]),
);
const VIEWS = { both: ["before", "after"], before: ["before"], after: ["after"] };
const state = { part: 0, view: "both", q: "", closed: new Set(), layer: "", zoom: 1 };
let drawings = {};
let current = -1;

function letter(index) {
  return index < 26 ? String.fromCharCode(65 + index) : String(index - 25);
}

function html(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick") element.addEventListener("click", value);
    else if (value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

// The address

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  const part = facts.parts.findIndex((one) => one.name === given.get("part") || one.blocks.includes(given.get("part")));
  state.part = Math.max(0, part);
  state.view = given.get("view") in VIEWS ? given.get("view") : "both";
  state.q = given.get("q") || "";
  state.closed = new Set((given.get("closed") || "").split(",").filter(Boolean).map(absolute));
  state.layer = given.get("layer") || "";
  state.zoom = Math.min(4, Math.max(0.2, Number(given.get("zoom")) || 1));
}

function writeAddress() {
  const words = new URLSearchParams();
  if (state.part) words.set("part", facts.parts[state.part].name);
  if (state.view !== "both") words.set("view", state.view);
  if (state.q) words.set("q", state.q);
  if (state.closed.size) words.set("closed", [...state.closed].map(relative).join(","));
  if (state.layer) words.set("layer", state.layer);
  if (state.zoom !== 1) words.set("zoom", state.zoom.toFixed(2));
  history.replaceState(null, "", `#${words}`);
}

// Paths of boxes are written without the block that they are in.
const prefix = () => (facts.parts[state.part].blocks.length ? facts.parts[state.part].name + "." : "");
const absolute = (path) => (path.startsWith(prefix()) ? path : prefix() + path);
const relative = (path) => (path.startsWith(prefix()) ? path.slice(prefix().length) : path);

// Drawing

function render() {
  const part = facts.parts[state.part];
  drawings = {};
  for (const pane of all(".pane")) {
    const side = pane.dataset.side;
    pane.hidden = !VIEWS[state.view].includes(side);
    drawings[side] = new Drawing(part[side], part, state.closed, rules);
    const count = part[side].layers.length;
    pane
      .querySelector("h2")
      .replaceChildren(
        html("b", {}, side),
        ` ${count} ${count === 1 ? "layer" : "layers"}`,
        html(
          "span",
          { class: "faint" },
          ` of ${part[side].total}, ${side === "before" ? "as imported" : "behind all phases"}`,
        ),
      );
    pane.querySelector(".graph").replaceChildren(drawings[side].draw());
  }
  document.body.dataset.view = state.view;
  byId("part").value = String(state.part);
  all("[data-view]", document.querySelector("header")).forEach((button) =>
    button.setAttribute("aria-pressed", button.dataset.view === state.view),
  );
  scale();
  search();
  select(state.layer, false);
}

function scale() {
  for (const graph of all(".pane:not([hidden]) .graph")) {
    const drawing = graph.firstElementChild;
    const { width, height } = drawing.viewBox.baseVal;
    const fit = Math.min(1, Math.max(0.62, graph.clientWidth / width)) * state.zoom;
    drawing.setAttribute("width", width * fit);
    drawing.setAttribute("height", height * fit);
  }
}

// Searching

function search() {
  const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
  const hit = (layer) => words.every((word) => haystack(layer).includes(word));
  byId("search").value = state.q;
  document.body.classList.toggle("searching", words.length > 0);
  for (const element of all(".node")) {
    const matches = words.length > 0 && layersOf(element).some(hit);
    element.classList.toggle("match", matches);
  }
  current = -1;
  const shown = VIEWS[state.view].map((side) => `${facts.parts[state.part][side].layers.filter(hit).length} ${side}`);
  byId("found").textContent = words.length ? shown.join(", ") : "";
}

function layersOf(element) {
  const side = element.closest(".pane").dataset.side;
  const { layers } = facts.parts[state.part][side];
  if (element.dataset.layer) return layers.filter((layer) => layer.name === element.dataset.layer);
  return layers.filter((layer) => `${layer.path}.`.startsWith(`${element.dataset.box}.`));
}

function haystack(layer) {
  const rule = layer.gone ? layer.gone.rule : layer.history.map((step) => step.rule).join(" ");
  const types = layer.outputs.map((output) => `${output.type} ${shortType(output.type)}`);
  return [layer.name, layer.op, rule, ...types].join(" ").toLowerCase();
}

// Enter in the search field: the next match; a closed box that holds it is opened.
function jump(step) {
  const matches = all(".pane:not([hidden]) .node.match");
  if (!matches.length) return;
  current = (current + step + matches.length) % matches.length;
  const element = matches[current];
  if (element.dataset.box) {
    const at = current;
    toggle(element.dataset.box);
    current = at - step;
    jump(step);
    return;
  }
  all(".current").forEach((one) => one.classList.remove("current"));
  element.classList.add("current");
  show(element);
  select(element.dataset.layer, false);
}

function show(element) {
  element.scrollIntoView({ block: "center", inline: "center" });
}

// Selecting a layer: its facts beside the graph, its relatives on the other side marked.

function select(name, scroll) {
  state.layer = name;
  writeAddress();
  const part = facts.parts[state.part];
  const before = part.before.layers.find((layer) => layer.name === name);
  const after = part.after.layers.find((layer) => layer.name === name);
  const relatives = new Set([...(before ? before.heirs : []), ...(after ? after.origins : [])]);
  all(".node").forEach((element) => {
    element.classList.toggle("selected", !!name && element.dataset.layer === name);
    element.classList.toggle("relative", !!name && layersOf(element).some((layer) => relatives.has(layer.name)));
  });
  const values = new Set(
    [before, after].flatMap((layer) => (layer ? [...layer.outputs.map((o) => o.name), ...tensorsOf(layer)] : [])),
  );
  all(".wires path").forEach((path) => path.classList.toggle("near", values.has(path.dataset.value)));
  document.querySelector("aside").replaceChildren(before || after ? details(before, after) : overview());
  if (scroll) {
    const element = all(".pane:not([hidden]) .node").find((one) => one.dataset.layer === name);
    if (element) show(element);
  }
}

function go(name) {
  const part = facts.parts.findIndex((one) =>
    [...one.before.layers, ...one.after.layers].some((layer) => layer.name === name),
  );
  if (part < 0) return;
  const layer = [...facts.parts[part].before.layers, ...facts.parts[part].after.layers].find(
    (one) => one.name === name,
  );
  const closed = [...state.closed].filter((path) => !`${layer.path}.`.startsWith(`${path}.`));
  const redraw = part !== state.part || closed.length !== state.closed.size;
  state.part = part;
  state.closed = new Set(closed);
  state.layer = name;
  if (redraw) render();
  select(name, true);
}

// Doing

function find(text) {
  state.q = text;
  search();
  writeAddress();
}

function toggle(path) {
  if (!state.closed.delete(path)) state.closed.add(path);
  render();
  const again = all(".pane:not([hidden]) .toggle").find((one) => one.dataset.box === path);
  if (again) again.focus({ preventScroll: true });
}

function boxes() {
  const paths = (box) => box.boxes.flatMap((inner) => [inner.path, ...paths(inner)]);
  return Object.values(drawings).flatMap((drawing) => paths(drawing.tree));
}

function view(name) {
  state.view = name;
  render();
}

function zoom(by) {
  state.zoom = by ? Math.min(4, Math.max(0.2, state.zoom * by)) : 1;
  scale();
  writeAddress();
}

// The nearest node in a direction, by where nodes stand.
function walk(from, [dx, dy]) {
  const center = (element) => {
    const box = element.getBoundingClientRect();
    return [box.x + box.width / 2, box.y + box.height / 2];
  };
  const [x, y] = center(from);
  let best = null;
  for (const element of all(".node, .heading", from.closest(".pane"))) {
    const [u, v] = center(element);
    const along = (u - x) * dx + (v - y) * dy;
    const aside = Math.abs((u - x) * dy) + Math.abs((v - y) * dx);
    const cost = along + 2.5 * aside;
    if (element !== from && along > 2 && (!best || cost < best.cost)) best = { element, cost };
  }
  if (best) best.element.focus();
}

const ARROWS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };
const KEYS = {
  "/": () => byId("search").select(),
  s: () => view("both"),
  b: () => view("before"),
  a: () => view("after"),
  "+": () => zoom(1.2),
  "=": () => zoom(1.2),
  "-": () => zoom(1 / 1.2),
  0: () => zoom(0),
};

function activate(element) {
  if (element.dataset.layer) select(element.dataset.layer, false);
  else toggle(element.dataset.box);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const inField = event.target.id === "search";
  const node = event.target.closest("[data-layer], [data-box]");
  if (event.key === "Escape") {
    if (state.layer) select("", false);
    else find("");
    if (inField) event.target.blur();
  } else if (inField) {
    if (event.key !== "Enter") return;
    jump(event.shiftKey ? -1 : 1);
  } else if (node && (event.key === "Enter" || event.key === " ")) activate(node);
  else if (node && event.key in ARROWS) walk(node, ARROWS[event.key]);
  else if (event.key in KEYS && !event.target.closest("select")) KEYS[event.key]();
  else return;
  event.preventDefault();
}

// While the pointer is over a layer its values stand out.
function onOver(event) {
  const node = event.target.closest(".node[data-layer], .pill");
  all(".wires path.over").forEach((path) => path.classList.remove("over"));
  if (!node) return;
  const layer = node.dataset.layer && layersOf(node)[0];
  const values = new Set(
    layer ? [...tensorsOf(layer), ...layer.outputs.map((output) => output.name)] : [node.dataset.value],
  );
  all(".wires path", node.closest("svg")).forEach((path) =>
    path.classList.toggle("over", values.has(path.dataset.value)),
  );
}

function start() {
  const defs = svg(
    "svg",
    { width: 0, height: 0, class: "defs", "aria-hidden": "true" },
    svg(
      "marker",
      { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" },
      svg("path", { d: "M0 1L8 4L0 7z" }),
    ),
  );
  document.body.prepend(defs);
  facts.parts.forEach((part, i) => {
    const blocks = part.blocks;
    const more = blocks.length > 1 ? `  (${blocks.length} alike, to ${blocks[blocks.length - 1]})` : "";
    byId("part").append(html("option", { value: i }, part.name + more));
  });
  byId("part").addEventListener("change", (event) => {
    state.part = Number(event.target.value);
    state.closed.clear();
    render();
  });
  byId("search").addEventListener("input", (event) => find(event.target.value));
  byId("close-all").addEventListener("click", () => ((state.closed = new Set(boxes())), render()));
  byId("open-all").addEventListener("click", () => (state.closed.clear(), render()));
  byId("smaller").addEventListener("click", () => zoom(1 / 1.2));
  byId("larger").addEventListener("click", () => zoom(1.2));
  byId("fit").addEventListener("click", () => zoom(0));
  all("header [data-view]").forEach((button) => button.addEventListener("click", () => view(button.dataset.view)));
  document.querySelector("main").addEventListener("click", (event) => {
    const element = event.target.closest("[data-layer], .toggle");
    if (element) activate(element);
  });
  document.querySelector("main").addEventListener("pointerover", onOver);
  document.addEventListener("keydown", onKey);
  window.addEventListener("resize", scale);
  window.addEventListener("hashchange", () => (readAddress(), render()));
  readAddress();
  render();
  if (state.layer) go(state.layer);
}

start();
