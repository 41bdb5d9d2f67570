// The modules of a part as a tree: {path, name, layers, boxes}. A module with a single layer has no box of its own.
function moduleTree(layers, root) {
  const tree = { path: root, name: "", layers: [], boxes: new Map() };
  for (const layer of layers) {
    const inside = layer.path === root || layer.path.startsWith(root + ".");
    const rest = root && inside ? layer.path.slice(root.length + 1) : layer.path;
    let box = tree;
    for (const name of rest ? rest.split(".") : []) {
      const path = box.path ? `${box.path}.${name}` : name;
      if (!box.boxes.has(name)) box.boxes.set(name, { path, name, layers: [], boxes: new Map() });
      box = box.boxes.get(name);
    }
    box.layers.push(layer);
  }
  return simplified(tree, true);
}

function simplified(box, isRoot) {
  const boxes = [...box.boxes.values()].map((inner) => simplified(inner, false));
  const own = [...box.layers];
  const kept = [];
  for (const inner of boxes) {
    if (inner.size < 2) own.push(...inner.layers);
    else if (!isRoot && !box.layers.length && boxes.length === 1)
      return { ...inner, name: `${box.name}.${inner.name}` };
    else kept.push(inner);
  }
  return { ...box, layers: own, boxes: kept, size: own.length + kept.reduce((sum, inner) => sum + inner.size, 0) };
}

const layersIn = (box) => [...box.layers, ...box.boxes.flatMap(layersIn)];
