// Layered layout of an acyclic graph (Sugiyama, Tagawa, Toda 1981): ranks, order within ranks, places.
// Deterministic: equal graphs give equal drawings.
//
// item   {width, height, ins: {value: offset}, outs: {value: offset}, first, last}
//        offsets are where an edge meets its upper or lower side; `first` items stand on top, `last` ones below all
// result {width, height, edges: [{value, from, to, points}]}; items get x and y of their upper left corner

const GAP = { item: 18, wire: 12, rank: 20 };
const SWEEPS = 14;

function layered(items) {
  const graph = linked(items);
  const ranks = rankOf(graph);
  const rows = insertWires(graph, ranks);
  order(rows, graph.segments);
  place(rows, graph.segments);
  return drawn(rows, graph);
}

// Which item makes each value, who reads it, and an order in which makers stand before readers.
function linked(items) {
  const maker = new Map();
  items.forEach((item) => Object.keys(item.outs).forEach((value) => maker.set(value, item)));
  const readers = new Map(items.map((item) => [item, []]));
  const sources = new Map(items.map((item) => [item, []]));
  const wires = new Map();
  for (const item of items) {
    for (const value of Object.keys(item.ins)) {
      const from = maker.get(value);
      if (!from || from === item) continue;
      sources.get(item).push(from);
      readers.get(from).push(item);
      if (!wires.has(value)) wires.set(value, { value, from, to: [] });
      wires.get(value).to.push(item);
    }
  }
  const waiting = new Map(items.map((item) => [item, sources.get(item).length]));
  const sorted = items.filter((item) => waiting.get(item) === 0);
  for (const item of sorted) {
    for (const reader of readers.get(item)) {
      waiting.set(reader, waiting.get(reader) - 1);
      if (waiting.get(reader) === 0) sorted.push(reader);
    }
  }
  return { items, sources, readers, sorted, wires: [...wires.values()], segments: [] };
}

// The items that lie on a cycle or behind one; empty for a sound graph.
function tangled(items) {
  const sorted = new Set(linked(items).sorted);
  return items.filter((item) => !sorted.has(item));
}

// Longest paths from above; then whoever makes more values than it reads moves down to its readers.
function rankOf({ sorted, sources, readers }) {
  const rank = new Map();
  const first = sorted.some((item) => item.first) ? 1 : 0;
  for (const item of sorted) {
    rank.set(item, item.first ? 0 : Math.max(first, ...sources.get(item).map((from) => rank.get(from) + 1)));
  }
  for (const item of [...sorted].reverse()) {
    const below = readers.get(item).map((reader) => rank.get(reader) - 1);
    const isLight = Object.keys(item.outs).length > new Set(sources.get(item)).size;
    if (!item.first && below.length && isLight) rank.set(item, Math.max(rank.get(item), Math.min(...below)));
  }
  const end = Math.max(0, ...sorted.filter((item) => !item.last).map((item) => rank.get(item) + 1));
  sorted.filter((item) => item.last).forEach((item) => rank.set(item, end));
  return rank;
}

// Rows of items, with one point of a wire in each row that it passes; readers of one value share its wire.
function insertWires(graph, rank) {
  const rows = [];
  const put = (item, at) => (rows[at] = rows[at] || []).push(item);
  graph.sorted.forEach((item) => put(item, rank.get(item)));
  for (const wire of graph.wires) {
    const start = rank.get(wire.from);
    const end = Math.max(...wire.to.map((item) => rank.get(item)));
    let above = wire.from;
    wire.points = new Map([[start, wire.from]]);
    for (let at = start + 1; at <= end; at++) {
      for (const item of wire.to) {
        if (rank.get(item) === at) graph.segments.push({ wire, from: above, to: item, row: at });
      }
      if (at === end) break;
      const point = { wire, width: 1, height: 0, ins: { [wire.value]: 0 }, outs: { [wire.value]: 0 }, isPoint: true };
      put(point, at);
      graph.segments.push({ wire, from: above, to: point, row: at });
      wire.points.set(at, point);
      above = point;
    }
  }
  for (let at = 0; at < rows.length; at++) rows[at] = rows[at] || [];
  rows.forEach((row) => row.forEach((item, i) => (item.index = i)));
  return rows;
}

const leaving = (s) => s.from.outs[s.wire.value];
const entering = (s) => s.to.ins[s.wire.value];

// Order within rows: medians of neighbours, alternately from above and from below; the order of fewest crossings wins.
function order(rows, segments) {
  const into = rows.map(() => []);
  segments.forEach((segment) => into[segment.row].push(segment));
  const position = (item, offset) => item.index + (0.8 * offset) / Math.max(item.width, 1);
  const upper = (s) => position(s.from, leaving(s));
  const lower = (s) => position(s.to, entering(s));
  const total = () => into.reduce((sum, row) => sum + crossings(row, upper, lower), 0);
  const sort = (row, near, own, far) => {
    const wanted = new Map(row.map((item) => [item, []]));
    near.forEach((segment) => wanted.get(own(segment)).push(far(segment)));
    const key = new Map(row.map((item) => [item, mean(wanted.get(item), item.index)]));
    row.sort((a, b) => key.get(a) - key.get(b) || a.index - b.index);
    row.forEach((item, i) => (item.index = i));
  };
  let best = total();
  let kept = rows.map((row) => [...row]);
  for (let sweep = 0; sweep < SWEEPS && best > 0; sweep++) {
    if (sweep % 2 === 0) for (let at = 1; at < rows.length; at++) sort(rows[at], into[at], (s) => s.to, upper);
    else for (let at = rows.length - 2; at >= 0; at--) sort(rows[at], into[at + 1], (s) => s.from, lower);
    const count = total();
    if (count < best) [best, kept] = [count, rows.map((row) => [...row])];
  }
  kept.forEach((row, at) => rows[at].splice(0, Infinity, ...row));
  rows.forEach((row) => row.forEach((item, i) => (item.index = i)));
}

function mean(numbers, otherwise) {
  return numbers.length ? numbers.reduce((a, b) => a + b, 0) / numbers.length : otherwise;
}

function crossings(segments, upper, lower) {
  const ends = segments.map((s) => [upper(s), lower(s)]);
  let count = 0;
  for (let i = 0; i < ends.length; i++) {
    for (let j = 0; j < i; j++) if ((ends[i][0] - ends[j][0]) * (ends[i][1] - ends[j][1]) < 0) count++;
  }
  return count;
}

// Places along a row: every item as near to its neighbours as the order allows (least squares by pooling).
function place(rows, segments) {
  rows.forEach((row) => row.reduce((x, item) => ((item.x = x), x + item.width + GAP.item), 0));
  const above = new Map();
  const below = new Map();
  for (const s of segments) {
    const weight = s.from.isPoint && s.to.isPoint ? 8 : s.from.isPoint || s.to.isPoint ? 1 : 2;
    if (!above.has(s.to)) above.set(s.to, []);
    if (!below.has(s.from)) below.set(s.from, []);
    above.get(s.to).push({ weight, x: () => s.from.x + leaving(s) - entering(s) });
    below.get(s.from).push({ weight, x: () => s.to.x + entering(s) - leaving(s) });
  }
  for (let sweep = 0; sweep < 3 * SWEEPS; sweep++) {
    const both = sweep > 2 * SWEEPS;
    const down = sweep % 2 === 0;
    const pulls = (item) => [
      ...((both || down) && above.has(item) ? above.get(item) : []),
      ...((both || !down) && below.has(item) ? below.get(item) : []),
    ];
    (down ? rows : [...rows].reverse()).forEach((row) => settle(row, pulls));
  }
  const left = Math.min(...rows.flat().map((item) => item.x));
  rows.flat().forEach((item) => (item.x = Math.round(item.x - left)));
}

function settle(row, pulls) {
  const pools = [];
  let offset = 0;
  row.forEach((item, i) => {
    if (i) offset += row[i - 1].width + (row[i - 1].isPoint || item.isPoint ? GAP.wire : GAP.item);
    const wanted = pulls(item);
    const weight = wanted.reduce((sum, pull) => sum + pull.weight, 0);
    const x = weight ? wanted.reduce((sum, pull) => sum + pull.weight * pull.x(), 0) / weight : item.x;
    let pool = { weight: weight || 0.01, x: x - offset, members: [[item, offset]] };
    while (pools.length && pools[pools.length - 1].x > pool.x) {
      const left = pools.pop();
      const sum = left.weight + pool.weight;
      pool = {
        weight: sum,
        x: (left.x * left.weight + pool.x * pool.weight) / sum,
        members: [...left.members, ...pool.members],
      };
    }
    pools.push(pool);
  });
  for (const pool of pools) for (const [item, at] of pool.members) item.x = pool.x + at;
}

// Rows from top to bottom, and the points that each edge passes.
function drawn(rows, graph) {
  let y = 0;
  rows.forEach((row, at) => {
    const height = Math.max(0, ...row.map((item) => item.height));
    row.forEach((item) => ((item.y = y), (item.rowHeight = height)));
    const reach = Math.max(0, ...graph.segments.filter((s) => s.row === at + 1).map(span));
    y += height + (at < rows.length - 1 ? GAP.rank + Math.min(28, reach / 14) : 0);
  });
  const edges = graph.wires.flatMap((wire) =>
    wire.to.map((item) => ({ value: wire.value, from: wire.from, to: item, points: route(wire, item) })),
  );
  const width = Math.max(0, ...rows.flat().map((item) => item.x + item.width));
  return { width, height: y, edges };
}

const span = (s) => Math.abs(s.from.x + leaving(s) - s.to.x - entering(s));

// From the maker's lower side through the wire's points to the reader's upper side. A maker that is lower than its row
// sends its edges straight down to the end of the row first.
function route(wire, item) {
  const start = wire.from.x + wire.from.outs[wire.value];
  const points = [[start, wire.from.y + wire.from.height]];
  const bend = wire.from.y + wire.from.rowHeight;
  if (bend > points[0][1]) points.push([start, bend]);
  for (const point of [...wire.points.values()].slice(1)) {
    if (point.y >= item.y) break;
    points.push([point.x, point.y]);
    if (point.rowHeight) points.push([point.x, point.y + point.rowHeight]);
  }
  points.push([item.x + item.ins[wire.value], item.y]);
  return points;
}
