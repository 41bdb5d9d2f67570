// One side of the page, drawn: layers in nested boxes, one for each module; a closed box is one node.

const FONT = { size: 11, small: 9.5, width: 0.605, line: 15 };
const TYPE = 13; // height of the types below a node, from which its edges start
const PAD = { x: 8, y: 5, box: 12, heading: 24 };

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const textWidth = (text, size = FONT.size) => text.length * size * FONT.width;
const shorten = (text, length) => (text.length > length ? text.slice(0, length - 1) + "…" : text);
const shortType = (type) =>
  type
    .replace(/\bbfloat(\d+)\[/, "bf$1[")
    .replace(/\b(float|int|uint|complex)(\d+)/, (_, kind, bits) => kind[0] + bits + "")
    .replace(/, /g, ",");
const tensorsOf = (layer) => [
  ...new Set(layer.args.flatMap((arg) => arg.value.filter((piece) => piece.tensor).map((piece) => piece.tensor))),
];
const literal = (arg) => arg.value.every((piece) => typeof piece === "string");

// A side of a part, laid out: `closed` has the paths of closed boxes.
class Drawing {
  constructor(side, part, closed, rules) {
    this.side = side;
    this.part = part;
    this.closed = closed;
    this.rules = rules;
    this.root = part.blocks.length ? part.name : "";
    this.maker = new Map(side.layers.flatMap((layer) => layer.outputs.map((output) => [output.name, layer])));
    this.types = new Map(side.layers.flatMap((layer) => layer.outputs.map((output) => [output.name, output.type])));
    Object.entries(side.outside).forEach(([name, value]) => this.types.set(name, value.type));
    this.place = new Map(side.layers.map((layer, i) => [layer.name, i]));
    this.tree = this.untangled(moduleTree(side.layers, this.root));
    this.top = this.arrange(this.tree, this.pills());
  }

  // Values of elsewhere that are drawn as nodes: activations, and inputs that a layer reads and nothing else.
  isWired(name, layer) {
    if (this.maker.has(name)) return true;
    const value = this.side.outside[name];
    if (value.kind !== "input") return value.kind === "value";
    return tensorsOf(layer).every((other) => !this.maker.has(other) && this.side.outside[other].kind !== "value");
  }

  reads(layer) {
    return tensorsOf(layer).filter((name) => this.isWired(name, layer));
  }

  // Boxes that would stand both before and behind something else are opened for good.
  untangled(box) {
    const boxes = box.boxes.map((inner) => this.untangled(inner));
    const layers = [...box.layers];
    for (;;) {
      const items = [...layers, ...boxes].map((member) => this.abstract(member));
      const bad = tangled(items)
        .map((item) => item.member)
        .filter((member) => member.boxes);
      if (!bad.length) return { ...box, layers, boxes };
      const worst = bad[bad.length - 1];
      boxes.splice(boxes.indexOf(worst), 1, ...worst.boxes);
      layers.push(...worst.layers);
    }
  }

  abstract(member) {
    const inside = member.boxes ? layersIn(member) : [member];
    const made = new Set(inside.flatMap((layer) => layer.outputs.map((output) => output.name)));
    const read = inside.flatMap((layer) => this.reads(layer)).filter((name) => !made.has(name));
    const zero = (names) => Object.fromEntries([...names].map((name) => [name, 0]));
    return { member, width: 0, height: 0, ins: zero(new Set(read)), outs: zero(made) };
  }

  // What enters and leaves the part as a whole.
  pills() {
    const outside = new Set(
      this.side.layers.flatMap((layer) => this.reads(layer)).filter((name) => !this.maker.has(name)),
    );
    const enter = [...outside].map((name) => this.pill(name, { outs: true }));
    const leave = this.side.layers.flatMap((layer) =>
      layer.outputs
        .filter((output) => output.returned.length || output.readers.some((reader) => !this.place.has(reader)))
        .map((output) => this.pill(output.name, { ins: true, returned: output.returned })),
    );
    return [...enter, ...leave];
  }

  pill(name, { outs, returned = [] }) {
    const full = returned.length ? returned.join(", ") : name;
    const lines = [{ text: shorten(full, 34), full }];
    if (outs) lines.push({ text: shortType(this.types.get(name)), faint: true });
    const width = Math.max(...lines.map((line) => textWidth(line.text, FONT.small))) + 22;
    return {
      kind: "pill",
      name,
      lines,
      width,
      height: 8 + lines.length * 12,
      last: !outs,
      ins: outs ? {} : { [name]: width / 2 },
      outs: outs ? { [name]: width / 2 } : {},
    };
  }

  // A box laid out: an item whose `inner` are items with places of their own.
  arrange(box, pills) {
    const isTop = box === this.tree;
    const order = (item) => this.place.get((item.layer || item.layers[0]).name);
    const members = [
      ...box.layers.map((layer) => this.node(layer, box)),
      ...box.boxes.map((inner) => (this.closed.has(inner.path) ? this.shut(inner) : this.arrange(inner, []))),
    ].sort((a, b) => order(a) - order(b));
    const { ins, outs } = isTop ? { ins: {}, outs: {} } : this.abstract(box);
    const used = isTop ? [] : this.leaving(box, Object.keys(outs));
    const doors = [
      ...Object.keys(ins).map((value) => ({
        kind: "door",
        width: 1,
        height: 0,
        ins: {},
        outs: { [value]: 0 },
        first: true,
      })),
      ...used.map((value) => ({ kind: "door", width: 1, height: 0, ins: { [value]: 0 }, outs: {}, last: true })),
    ];
    const inner = [...pills, ...doors, ...members];
    const { width, height, edges } = layered(inner);
    const heading = isTop ? 0 : PAD.heading;
    const pad = isTop ? 2 : PAD.box;
    const room = Math.max(width, isTop ? 0 : textWidth(box.name) + 30);
    const shift = pad + (room - width) / 2;
    const across = (side) =>
      Object.fromEntries(doors.flatMap((door) => Object.keys(door[side]).map((value) => [value, door.x + shift])));
    return {
      kind: "box",
      box,
      layers: layersIn(box),
      inner,
      edges,
      shift,
      heading,
      isTop,
      width: room + 2 * pad,
      height: height + heading + (isTop ? 4 : 6),
      ins: across("outs"),
      outs: across("ins"),
    };
  }

  leaving(box, values) {
    const inside = new Set(layersIn(box).map((layer) => layer.name));
    return values.filter((value) => {
      const output = this.maker.get(value).outputs.find((one) => one.name === value);
      return output.returned.length || output.readers.some((reader) => !inside.has(reader));
    });
  }

  shut(box) {
    const { ins, outs } = this.abstract(box);
    const layers = layersIn(box);
    const lines = [
      { text: `▸ ${box.name}`, bold: true },
      { text: `${layers.length} layers`, faint: true },
    ];
    return this.sized(
      { kind: "box", box, layers, lines, isShut: true },
      Object.keys(ins),
      this.leaving(box, Object.keys(outs)),
      12,
    );
  }

  node(layer, box) {
    const lines = [{ ...this.heading(layer, box) }];
    const literals = layer.args.filter((arg) => literal(arg) && !arg.omitted);
    if (literals.length) {
      const words = literals.map((arg) => `${arg.name} ${arg.value.join("").replace(/, /g, ",")}`).join("  ");
      lines.push({ text: shorten(words, 30), full: words, faint: true });
    }
    const inline = tensorsOf(layer).filter((name) => !this.isWired(name, layer));
    inline.slice(0, inline.length > 6 ? 5 : 6).forEach((name) => {
      const local = name.startsWith(box.path + ".")
        ? name.slice(box.path.length + 1)
        : name.startsWith(this.root + ".")
          ? name.slice(this.root.length + 1)
          : name;
      const text = `${shorten(local, 26)} ${shortType(this.types.get(name))}`;
      lines.push({ text, full: `${name} ${this.types.get(name)}`, small: true, weight: true });
    });
    if (inline.length > 6) lines.push({ text: `and ${inline.length - 5} more`, small: true, faint: true });
    return this.sized({ kind: "node", layer, lines }, this.reads(layer), this.used(layer), 0);
  }

  used(layer) {
    return layer.outputs
      .filter((output) => output.readers.length || output.returned.length)
      .map((output) => output.name);
  }

  // `q_proj.` linear `_2`: the operator, and what its name adds to it.
  heading(layer, box) {
    const path =
      layer.path === box.path
        ? ""
        : box.path && layer.path.startsWith(box.path + ".")
          ? layer.path.slice(box.path.length + 1)
          : layer.path;
    const own =
      layer.path && layer.name.startsWith(layer.path + ".") ? layer.name.slice(layer.path.length + 1) : layer.name;
    const before = path ? shorten(path, 24) + "." : "";
    const after = own.startsWith(layer.short) ? own.slice(layer.short.length) : ` ${shorten(own, 20)}`;
    return { before, text: layer.short, after, bold: true };
  }

  // The node's size, and its ports: values that are read above, values that are made below their types.
  sized(item, reads, makes, more) {
    const labels = makes.map((value) => textWidth(shortType(this.types.get(value)), FONT.small) + 10);
    const text = Math.max(
      ...item.lines.map((line) =>
        textWidth((line.before || "") + line.text + (line.after || ""), line.bold ? FONT.size : FONT.small),
      ),
    );
    const badge = item.layer && this.ruleOf(item.layer) ? 17 : 0;
    const sum = labels.reduce((a, b) => a + b, 0);
    item.width = Math.max(text + 2 * PAD.x + badge, sum, 13 * reads.length, 44);
    item.face = item.lines.reduce((y, line) => y + (line.bold ? FONT.line : 12.5), 2 * PAD.y) + more;
    item.height = item.face + (makes.length ? TYPE : 0);
    item.ins = spread(reads, item.width);
    item.outs = {};
    let x = (item.width - sum) / 2;
    makes.forEach((value, i) => {
      item.outs[value] = x + labels[i] / 2;
      x += labels[i];
    });
    return item;
  }

  // The rule that made a layer (after), or with which it went (before).
  ruleOf(layer) {
    if (layer.gone) return this.rules.get(layer.gone.rule);
    return layer.history.length ? this.rules.get(layer.history[0].rule) : undefined;
  }

  draw() {
    const element = svg("svg", {
      role: "group",
      width: this.top.width,
      height: this.top.height + 4,
      viewBox: `0 0 ${this.top.width} ${this.top.height + 4}`,
    });
    this.drawItem(this.top, 0, 0, element);
    return element;
  }

  drawItem(item, x, y, onto) {
    if (item.kind === "door") return;
    if (item.kind === "pill") this.drawPill(item, x, y, onto);
    else if (item.kind === "node" || item.isShut) this.drawNode(item, x, y, onto);
    else this.drawBox(item, x, y, onto);
  }

  drawBox(item, x, y, onto) {
    const group = svg("g", { class: "box", transform: `translate(${x} ${y})` });
    const wires = svg("g", { class: "wires" });
    if (!item.isTop) group.append(svg("rect", { class: "frame", width: item.width, height: item.height, rx: 8 }));
    group.append(wires);
    if (!item.isTop) group.append(this.headingOf(item.box));
    const dx = item.shift;
    const dy = item.isTop ? 2 : 0;
    for (const edge of item.edges) this.drawEdge(edge, item, dx, dy, wires);
    for (const inner of item.inner) this.drawItem(inner, inner.x + dx, inner.y + dy + this.drop(item, inner), group);
    onto.append(group);
  }

  headingOf(box) {
    return svg(
      "g",
      { class: "heading toggle", tabindex: 0, role: "button", "aria-expanded": "true", "data-box": box.path },
      svg("rect", { x: 2, y: 2, width: textWidth(box.name) + 26, height: 19, rx: 4 }),
      svg("text", { x: 10, y: 16 }, `▾ ${box.name}`),
    );
  }

  // Below the heading of a box everything stands lower, except for the doors in its upper side.
  drop(item, inner) {
    return inner.first || item.isTop ? 0 : item.heading;
  }

  drawEdge(edge, item, dx, dy, onto) {
    const last = edge.points.length - 1;
    const lower = this.drop(item, {});
    const points = edge.points.map(([x, y]) => [x + dx, y + dy + lower]);
    if (edge.from.kind === "door") points[0][1] = 0;
    if (edge.to.kind === "door") points[last][1] = item.height;
    let path = `M${points[0]}`;
    for (let i = 1; i <= last; i++) {
      const [[x0, y0], [x1, y1]] = [points[i - 1], points[i]];
      const half = (y1 - y0) / 2;
      path += Math.abs(x0 - x1) < 0.5 ? `L${x1} ${y1}` : `C${x0} ${y0 + half} ${x1} ${y1 - half} ${x1} ${y1}`;
    }
    const arrow = edge.to.kind === "door" ? null : "url(#arrow)";
    onto.append(
      svg(
        "path",
        { d: path, "data-value": edge.value, "marker-end": arrow },
        svg("title", {}, `${edge.value}: ${this.types.get(edge.value)}`),
      ),
    );
  }

  drawPill(item, x, y, onto) {
    const group = svg(
      "g",
      { class: "pill", transform: `translate(${x} ${y})`, "data-value": item.name },
      svg("rect", { width: item.width, height: item.height, rx: Math.min(12, item.height / 2) }),
    );
    item.lines.forEach((line, i) =>
      group.append(svg("text", { x: item.width / 2, y: 14 + 12 * i, class: line.faint ? "faint" : null }, line.text)),
    );
    group.append(svg("title", {}, `${item.name}: ${this.types.get(item.name)}`));
    onto.append(group);
  }

  drawNode(item, x, y, onto) {
    const { layer, box } = item;
    const rule = layer && this.ruleOf(layer);
    const group = svg("g", {
      class: [
        "node",
        item.isShut && "shut toggle",
        rule && (layer.gone ? "gone" : "made"),
        layer && layer.constant && "constant",
        layer && layer.op.startsWith("enginery.") && "own",
      ]
        .filter(Boolean)
        .join(" "),
      transform: `translate(${x} ${y})`,
      tabindex: 0,
      role: "button",
      style: rule ? `--hue:${rule.hue}` : null,
      "aria-expanded": item.isShut ? "false" : null,
      "data-layer": layer ? layer.name : null,
      "data-box": box ? box.path : null,
      "aria-label": layer
        ? `${layer.short}, ${layer.name}${rule ? `, ${layer.gone ? "consumed" : "made"} by ${rule.label}` : ""}`
        : `${box.path}, ${item.layers.length} layers, closed`,
    });
    if (item.isShut)
      group.append(svg("rect", { class: "under", x: 4, y: 4, width: item.width, height: item.face, rx: 5 }));
    group.append(svg("rect", { class: "face", width: item.width, height: item.face, rx: 5 }));
    let baseline = PAD.y;
    for (const line of item.lines) {
      baseline += line.bold ? FONT.line : 12.5;
      const text = svg("text", {
        x: PAD.x,
        y: baseline - 3.5,
        class: line.bold ? "op" : line.weight ? "weight" : "faint",
      });
      if (line.before) text.append(svg("tspan", { class: "soft" }, line.before));
      text.append(svg("tspan", {}, line.text));
      if (line.after) text.append(svg("tspan", { class: "soft" }, line.after));
      if (line.full && line.full !== line.text) text.append(svg("title", {}, line.full));
      group.append(text);
    }
    if (rule) group.append(badge(rule, item.width - 14.5, 4));
    if (item.isShut) group.append(...this.stripe(item));
    for (const [value, at] of Object.entries(item.outs)) {
      const type = shortType(this.types.get(value));
      group.append(svg("text", { class: "type", x: at, y: item.height - 2.5 }, type));
    }
    onto.append(group);
  }

  // The rules of a closed box, each as wide as its share of the layers.
  stripe(item) {
    const counts = new Map();
    item.layers.forEach((layer) => counts.set(this.ruleOf(layer), (counts.get(this.ruleOf(layer)) || 0) + 1));
    let x = PAD.x;
    const unit = (item.width - 2 * PAD.x) / item.layers.length;
    return [...counts]
      .sort((a, b) => (a[0] ? a[0].index : -1) - (b[0] ? b[0].index : -1))
      .map(([rule, count]) => {
        const bar = svg(
          "rect",
          {
            class: rule ? "share ruled" : "share",
            style: rule ? `--hue:${rule.hue}` : null,
            x,
            y: item.face - 12,
            width: unit * count,
            height: 5,
          },
          svg("title", {}, `${rule ? rule.label : "untouched"}: ${count}`),
        );
        x += unit * count;
        return bar;
      });
  }
}

function badge(rule, x, y) {
  return svg(
    "g",
    { class: "badge", transform: `translate(${x} ${y})`, style: `--hue:${rule.hue}` },
    svg("rect", { width: 11, height: 11, rx: 2.5 }),
    svg("text", { x: 5.5, y: 8.7 }, rule.letter),
    svg("title", {}, rule.label),
  );
}

function spread(values, width) {
  const step = Math.min(26, (width - 12) / Math.max(values.length, 1));
  const start = (width - step * (values.length - 1)) / 2;
  return Object.fromEntries(values.map((value, i) => [value, start + i * step]));
}
