// The panel beside the graph: all phases and rules, or one layer with its call and where it comes from.

function overview() {
  const total = (name) => facts.phases.reduce((sum, phase) => sum + phase[name], 0);
  const rows = facts.phases.flatMap((phase) => [
    html(
      "tr",
      { class: "phase" },
      html("th", { scope: "rowgroup", colspan: 2 }, phase.name),
      html("td", {}, phase.milliseconds.toFixed(1)),
      html("td", {}, `${phase.before} → ${phase.after}`),
    ),
    ...phase.rules
      .filter((rule) => rule.applied)
      .map((rule) =>
        html(
          "tr",
          {},
          html("td", {}, ruleButton(rule.label)),
          html("td", { title: `tried ${rule.tried}, matched ${rule.matched}` }, String(rule.applied)),
          html("td", {}, rule.milliseconds.toFixed(1)),
          html("td"),
        ),
      ),
  ]);
  const first = facts.phases[0];
  const last = facts.phases[facts.phases.length - 1];
  return html(
    "div",
    {},
    html("h2", {}, "Phases and rules"),
    html(
      "table",
      {},
      html(
        "thead",
        {},
        html("tr", {}, ...["phase, rule", "applied", "ms", "layers"].map((word) => html("th", { scope: "col" }, word))),
      ),
      html("tbody", {}, ...rows),
      html(
        "tfoot",
        {},
        html(
          "tr",
          {},
          html("th", { colspan: 2 }, "all"),
          html("td", {}, total("milliseconds").toFixed(1)),
          html("td", {}, facts.phases.length ? `${first.before} → ${last.after}` : ""),
        ),
      ),
    ),
    html(
      "p",
      { class: "faint" },
      "Left, a colour is the rule with which a layer went; right, the rule that made it. " +
        "Dashed layers are computed once, when weights are bound. Click a rule to find its layers, a layer for its call.",
    ),
  );
}

function ruleButton(label) {
  const rule = rules.get(label);
  if (!rule) return html("code", {}, label);
  const button = html(
    "button",
    {
      class: "rule",
      title: rule.equation || null,
      style: `--hue:${rule.hue}`,
      onclick: () => find(state.q === label ? "" : label),
    },
    html("i", {}, rule.letter),
    label,
  );
  return button;
}

function details(before, after) {
  const layer = after || before;
  const body = html(
    "div",
    {},
    html("button", { class: "back", onclick: () => select("", false) }, "← phases and rules"),
    html("h2", {}, html("code", {}, layer.op)),
    html("p", { class: "name" }, layer.name),
    html("p", {}, ...standing(before, after)),
  );
  if (after) body.append(...call(after, before && callText(before) !== callText(after) ? "call, after" : "call"));
  if (before && (!after || callText(before) !== callText(after)))
    body.append(...call(before, after ? "call, before" : "call"));
  if (after && after.history.length) body.append(...provenance(after));
  if (before && before.heirs.length) body.append(html("h3", {}, "became"), links(before.heirs));
  const readers = layer.outputs.flatMap((output) => output.readers);
  if (readers.length) body.append(html("h3", {}, "read by"), links([...new Set(readers)]));
  return body;
}

function standing(before, after) {
  if (before && !after && before.gone)
    return ["Went with ", ruleButton(before.gone.rule), ` in the phase ${before.gone.phase}.`];
  if (after && after.history.length)
    return ["Made by ", ruleButton(after.history[0].rule), ` in the phase ${after.history[0].phase}.`];
  if (before && after)
    return [
      callText(before) === callText(after) ? "Untouched by any rule." : "Kept; it reads other values than before.",
    ];
  return [after ? "Made by a phase itself, not by a rule." : "Gone."];
}

const callText = (layer) => JSON.stringify(layer.args.map((arg) => arg.value));

function call(layer, title) {
  const types = new Map(
    facts.parts[state.part].before.layers
      .concat(facts.parts[state.part].after.layers)
      .flatMap((one) => one.outputs.map((output) => [output.name, output.type])),
  );
  for (const side of ["before", "after"]) {
    Object.entries(facts.parts[state.part][side].outside).forEach(([name, value]) => types.set(name, value.type));
  }
  const piece = (one) =>
    one.tensor ? html("span", {}, valueLink(one.tensor), html("small", {}, types.get(one.tensor) || "")) : one;
  const rows = layer.args.map((arg) =>
    html(
      "tr",
      { class: arg.omitted ? "omitted" : null, title: arg.omitted ? "the default" : null },
      html("th", { scope: "row" }, arg.name),
      html("td", {}, ...arg.value.map(piece)),
    ),
  );
  const results = layer.outputs.map((output) =>
    html(
      "tr",
      {},
      html("th", { scope: "row" }, output.returned.length ? `→ ${output.returned}` : "→"),
      html("td", {}, html("code", {}, output.name), html("small", {}, output.type)),
    ),
  );
  const notes = [
    layer.constant && "computed once, when weights are bound",
    layer.effects && "has effects: it is never moved or merged",
  ].filter(Boolean);
  return [
    html("h3", {}, title),
    html("table", { class: "call" }, html("tbody", {}, ...rows, ...results)),
    ...notes.map((note) => html("p", { class: "faint" }, note)),
  ];
}

function valueLink(name) {
  const part = facts.parts[state.part];
  const layers = [...part.after.layers, ...part.before.layers];
  const maker = layers.find((layer) => layer.outputs.some((output) => output.name === name));
  return maker ? layerLink(maker.name, name) : html("code", {}, name);
}

function layerLink(name, text = name) {
  return html("button", { class: "link", onclick: () => go(name) }, text);
}

function links(names) {
  const known = new Set(
    facts.parts.flatMap((part) => [...part.before.layers, ...part.after.layers].map((layer) => layer.name)),
  );
  return html(
    "ul",
    {},
    ...names.map((name) => html("li", {}, known.has(name) ? layerLink(name) : html("code", {}, name))),
  );
}

function provenance(layer) {
  const steps = layer.history.map((step) => {
    const rule = rules.get(step.rule);
    return html(
      "li",
      {},
      ruleButton(step.rule),
      ` in ${step.phase}`,
      rule && rule.equation ? html("p", { class: "equation" }, rule.equation) : null,
      rule ? html("p", { class: "faint" }, rule.location) : null,
      html("p", {}, "replaced"),
      links(step.replaced),
    );
  });
  return [
    html("h3", {}, "provenance, last first"),
    html("ol", { class: "steps" }, ...steps),
    html("h3", {}, "stands for"),
    links(layer.origins),
  ];
}
