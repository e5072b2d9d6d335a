'use strict';
// Turns the nodes of a graph into a picture: boxes for modules, open or closed, with cards for nodes inside.
//
// Each open box is laid out alone by dagre. A value that crosses the border of a box enters or leaves through a port.
// Boxes of the same structure, such as the blocks of a transformer, share one layout.

const CARD = {width: 178, height: 46};
const CLOSED = {width: 210, height: 52};
const PORT = {width: 96, height: 18};
const PAD = {side: 14, top: 34, bottom: 14};
const FEW = 7;  // Modules of so few nodes, such as a linear, are not boxes of their own.
const MANY = 6;  // A value that more items than this read is named at its readers, without lines.
const GAP = 26;  // Distance between items below each other.
const LARGE = 40;  // From so many items on, chains of items are placed as one, which is faster.
const SIZE = /sym_size/;  // Sizes of shapes are read everywhere and say little; lines to them are left out.

/** The tree of modules over the drawn nodes. A box has `path`, `parent`, `children` (boxes and names of nodes), `size`. */
function moduleTree(drawn) {
  const sizes = new Map();
  for (const {node} of drawn.values()) {
    for (const path of prefixes(node.module)) sizes.set(path, (sizes.get(path) ?? 0) + 1);
  }
  const stacks = new Set([...drawn.values()].map(({node}) => node.module));
  const parts = new Map();
  for (const path of sizes.keys()) {
    const up = path.slice(0, Math.max(0, path.lastIndexOf('.')));
    if (!parts.has(up)) parts.set(up, []);
    parts.get(up).push(path);
  }
  // A list of modules, such as `transformer_blocks`, is never called itself; its entries become boxes, not the list.
  // A box that would hold nothing but another box is left out.
  const isBox = (path) => {
    const below = parts.get(path) ?? [];
    if (sizes.get(path) <= FEW) return false;
    if (below.length === 1 && sizes.get(below[0]) === sizes.get(path) && isBox(below[0])) return false;
    return stacks.has(path) || below.some((child) => !/\.\d+$/.test(child));
  };
  const root = {path: '', parent: null, children: [], size: drawn.size, depth: 0};
  const boxes = new Map([['', root]]);
  const homes = new Map();
  for (const [name, {node}] of drawn) {
    let home = root;
    for (const path of prefixes(node.module)) {
      if (!isBox(path)) continue;
      if (!boxes.has(path)) {
        const box = {path, parent: home, children: [], size: sizes.get(path), depth: home.depth + 1};
        boxes.set(path, box);
        home.children.push(box);
      }
      home = boxes.get(path);
    }
    home.children.push(name);
    homes.set(name, home);
  }
  return {root, boxes, homes};
}

/** The boxes directly inside a box. */
const boxesIn = (box) => box.children.filter((child) => typeof child !== 'string');

const TREES = new WeakMap();

/** The tree of modules, computed once for the same nodes. */
function treeOf(drawn) {
  if (!TREES.has(drawn)) TREES.set(drawn, moduleTree(drawn));
  return TREES.get(drawn);
}

/** `a.b.c` -> `a`, `a.b`, `a.b.c`. */
function prefixes(path) {
  if (!path) return [];
  const words = path.split('.');
  return words.map((_, i) => words.slice(0, i + 1).join('.'));
}

/** The boxes from the root to a box. */
function chain(box) {
  const found = [];
  for (let at = box; at; at = at.parent) found.unshift(at);
  return found;
}

/** What each open box shows: its items and the lines between them. Items are boxes, nodes and ports. */
function levels(tree, drawn, isOpen) {
  const found = new Map();
  const level = (box) => {
    if (!found.has(box.path)) {
      const items = box.children.map((child) => (typeof child === 'string'
        ? {key: `n:${child}`, node: child} : {key: `b:${child.path}`, box: child}));
      found.set(box.path, {box, items, index: new Map(items.map((item, i) => [item.key, i])), edges: new Map(), named: new Map()});
    }
    return found.get(box.path);
  };
  const port = (box, name, isInput) => {
    const at = level(box);
    const key = `${isInput ? 'in' : 'out'}:${name}`;
    if (!at.index.has(key)) {
      at.index.set(key, at.items.length);
      at.items.push({key, port: name});
    }
    return key;
  };
  const connect = (box, from, to, source, change) => {
    const edges = level(box).edges;
    const key = `${from}>${to}`;
    if (!edges.has(key)) edges.set(key, {from, to, sources: [], change});
    const edge = edges.get(key);
    if (!edge.sources.includes(source)) edge.sources.push(source);
    if (edge.change !== change) edge.change = null;
  };
  const visible = (box) => chain(box).every((at) => isOpen(at.path));
  for (const box of tree.boxes.values()) if (visible(box)) level(box);
  for (const [reader, {node, change}] of drawn) {
    const down = chain(tree.homes.get(reader));
    for (const source of node.inputs) {
      if (!drawn.has(source) || SIZE.test(drawn.get(source).node.op)) continue;
      const up = chain(tree.homes.get(source));
      let common = 0;
      while (common + 1 < up.length && common + 1 < down.length && up[common + 1] === down[common + 1]) common++;
      const tone = change === 'removed' || drawn.get(source).change === 'removed' ? 'removed'
        : change === 'added' || change === 'rewired' ? change : drawn.get(source).change === 'added' ? 'added' : null;
      let from = `n:${source}`;
      for (let i = up.length - 1; i > common; i--) {  // Out of the boxes around the source.
        if (visible(up[i])) connect(up[i], from, port(up[i], source, false), source, tone);
        from = `b:${up[i].path}`;
      }
      let to = `n:${reader}`;
      for (let i = down.length - 1; i > common; i--) {  // Into the boxes around the reader.
        if (visible(down[i])) connect(down[i], port(down[i], source, true), to, source, tone);
        to = `b:${down[i].path}`;
      }
      if (visible(up[common])) connect(up[common], from, to, source, tone);
    }
  }
  found.forEach(nameCommonValues);
  return found;
}

/** Replace the lines from a value that very many items read by its name at each of them. */
function nameCommonValues(level) {
  const readers = new Map();
  for (const edge of level.edges.values()) readers.set(edge.from, (readers.get(edge.from) ?? 0) + 1);
  for (const [key, edge] of level.edges) {
    if (readers.get(edge.from) <= MANY) continue;
    level.edges.delete(key);
    level.named.set(edge.to, [...(level.named.get(edge.to) ?? []), ...edge.sources]);
  }
}

/** Runs dagre once per structure. */
class Layouts {
  constructor() {
    this.known = new Map();
    this.runs = 0;
  }

  /** Place items of the given sizes: {width, height, at: [[x, y], ...] (centres), lines: [[[x, y], ...], ...]}. */
  place(sizes, edges) {
    const key = JSON.stringify([sizes, edges]);
    if (!this.known.has(key)) {
      this.runs++;
      this.known.set(key, layOut(sizes, edges, sizes.length > LARGE ? chainsOf(sizes.length, edges) : sizes.map((_, i) => [i])));
    }
    return this.known.get(key);
  }
}

/** Items in groups: those of a chain, in which each has one reader that reads nothing else, are one group. */
function chainsOf(count, edges) {
  const [readers, sources] = [Array.from({length: count}, () => []), Array.from({length: count}, () => [])];
  for (const [from, to] of edges) {
    readers[from].push(to);
    sources[to].push(from);
  }
  const next = (i) => (readers[i].length === 1 && sources[readers[i][0]].length === 1 ? readers[i][0] : null);
  const chains = [];
  for (let i = 0; i < count; i++) {
    if (sources[i].length === 1 && next(sources[i][0]) === i) continue;  // Inside of a chain.
    const chain = [];
    for (let at = i; at !== null; at = next(at)) chain.push(at);
    chains.push(chain);
  }
  return chains;
}

/** Run dagre on groups of items that stand below each other. */
function layOut(sizes, edges, groups) {
  const graph = new dagre.graphlib.Graph({multigraph: false});
  graph.setGraph({ranksep: GAP, nodesep: 18, edgesep: 8, marginx: 0, marginy: 0});
  const groupOf = [];
  const boxes = groups.map((group, g) => {
    group.forEach((i) => { groupOf[i] = g; });
    const width = Math.max(...group.map((i) => sizes[i][0]));
    const height = group.reduce((sum, i) => sum + sizes[i][1], GAP * (group.length - 1));
    graph.setNode(String(g), {width, height});
    return [width, height];
  });
  for (const [from, to] of edges) if (groupOf[from] !== groupOf[to]) graph.setEdge(String(groupOf[from]), String(groupOf[to]), {});
  dagre.layout(graph);
  const at = [];
  const centres = groups.map((group, g) => {
    const {x, y} = graph.node(String(g));
    let top = y - boxes[g][1] / 2;
    for (const i of group) {
      at[i] = [x, top + sizes[i][1] / 2];
      top += sizes[i][1] + GAP;
    }
    return [x, y];
  });
  const heights = ranks(centres, boxes);
  const lines = edges.map(([from, to]) => {
    const isInside = groupOf[from] === groupOf[to];
    const points = isInside ? [] : graph.edge(String(groupOf[from]), String(groupOf[to])).points.slice(1, -1);
    return route(points.map(({x, y}) => [x, y]), [at[from], sizes[from]], [at[to], sizes[to]], heights);
  });
  return {width: Math.max(0, graph.graph().width || 0), height: Math.max(0, graph.graph().height || 0), at, lines};
}

/** Top and bottom of each rank of items, by the height of its centre. */
function ranks(at, sizes) {
  const found = new Map();
  at.forEach(([, y], i) => {
    const key = Math.round(y);
    found.set(key, Math.max(found.get(key) ?? 0, sizes[i][1]));
  });
  return found;
}

/** A line from the bottom of one item to the top of another that passes straight by the items in between. */
function route(middle, [[fromX, fromY], [fromWide, fromHigh]], [[toX, toY], [toWide, toHigh]], heights) {
  const isDown = toY > fromY;  // Only in a cycle, which removed nodes can close, does a line go up.
  const between = (x, centre, wide) => Math.min(centre + wide / 2 - 14, Math.max(centre - wide / 2 + 14, x));
  const path = [];
  for (const [x, y] of middle) {
    const key = Math.round(y);  // Centres of a rank may differ by rounding.
    const half = (heights.get(key) ?? heights.get(key - 1) ?? heights.get(key + 1) ?? 0) / 2;
    path.push([x, isDown ? y - half : y + half]);
    if (half) path.push([x, isDown ? y + half : y - half]);
  }
  const [first, last] = [path[0] ?? [toX], path[path.length - 1] ?? [fromX]];
  path.unshift([between(first[0], fromX, Math.min(fromWide, 120)), isDown ? fromY + fromHigh / 2 : fromY - fromHigh / 2]);
  path.push([between(last[0], toX, Math.min(toWide, 120)), isDown ? toY - toHigh / 2 : toY + toHigh / 2]);
  return path;
}

/** The picture: rectangles in absolute coordinates, and lines. `isOpen(path)` tells which boxes are open. */
function scene(drawn, isOpen, layouts) {
  const tree = treeOf(drawn);
  const shown = levels(tree, drawn, isOpen);
  const counts = changeCounts(tree, drawn);
  const placed = new Map();
  const measure = (box) => {
    if (!shown.has(box.path)) return [CLOSED.width, CLOSED.height];
    const level = shown.get(box.path);
    const sizes = level.items.map((item) => {
      if (item.box) return measure(item.box);
      return item.node ? [CARD.width, CARD.height + (level.named.has(item.key) ? 14 : 0)] : [PORT.width, PORT.height];
    });
    const edges = [...level.edges.values()].map((edge) => [level.index.get(edge.from), level.index.get(edge.to)]);
    const layout = layouts.place(sizes, edges);
    placed.set(box.path, {level, sizes, layout});
    return [Math.max(CLOSED.width, layout.width + 2 * PAD.side), layout.height + PAD.top + PAD.bottom];
  };
  const [width, height] = measure(tree.root);
  const picture = {boxes: [], cards: [], ports: [], lines: [], byKey: new Map(), width, height, tree, counts};
  const draw = (box, left, top, wide, high) => {
    const entry = {key: `b:${box.path}`, box, x: left, y: top, width: wide, height: high, isOpen: placed.has(box.path), change: counts.get(box.path)};
    if (box.parent) {
      picture.boxes.push(entry);
      picture.byKey.set(entry.key, entry);
    }
    if (!entry.isOpen) return;
    const {level, sizes, layout} = placed.get(box.path);
    const [x0, y0] = [left + (wide - layout.width) / 2, top + PAD.top];
    level.items.forEach((item, i) => {
      const [x, y] = [x0 + layout.at[i][0] - sizes[i][0] / 2, y0 + layout.at[i][1] - sizes[i][1] / 2];
      if (item.box) {
        draw(item.box, x, y, ...sizes[i]);
        picture.byKey.get(item.key).named = level.named.get(item.key) ?? [];
        return;
      }
      const found = {key: item.key, x, y, width: sizes[i][0], height: sizes[i][1], named: level.named.get(item.key) ?? []};
      if (item.node) {
        Object.assign(found, drawn.get(item.node), {name: item.node, home: box.path});
        picture.cards.push(found);
        picture.byKey.set(item.key, found);
      } else {
        picture.ports.push({...found, name: item.port});
      }
    });
    let number = 0;
    for (const edge of level.edges.values()) {
      const points = layout.lines[number++].map(([x, y]) => [x0 + x, y0 + y]);
      picture.lines.push({points, sources: edge.sources, change: edge.change, to: edge.to, from: edge.from});
    }
  };
  draw(tree.root, 0, 0, width, height);
  return picture;
}

/** For each box: how many of the nodes in it a pass changed, by kind. */
function changeCounts(tree, drawn) {
  const counts = new Map();
  for (const [name, {change}] of drawn) {
    if (!change) continue;
    for (const box of chain(tree.homes.get(name))) {
      if (!counts.has(box.path)) counts.set(box.path, {added: 0, removed: 0, rewired: 0, tensor: 0});
      counts.get(box.path)[change]++;
    }
  }
  return counts;
}
