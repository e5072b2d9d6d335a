'use strict';
// Reads the data of the page and answers questions about one graph after one pass. The format is documented in data.py.

/** A list of numbers from the text of little-endian 16-bit integers in base64, `scale` times each; see series in data.py. */
function decoded(series) {
  const raw = atob(series.data);
  const values = new Array(raw.length / 2);
  for (let i = 0; i < values.length; i++) {
    values[i] = (raw.charCodeAt(2 * i) + 256 * raw.charCodeAt(2 * i + 1)) * series.scale;
  }
  return values;
}

/** The graph of one kind of call, as it was before and after each pass. */
class Graph {
  constructor(data) {
    this.call = data.call;
    this.data = data;
    this.steps = data.steps;
    this._strings = data.strings;
    this._snapshots = new Map();
    this._drawn = new Map();
    this._nodes = new Array(data.nodes.length);
    this._tensors = new Array(data.tensors.length);
  }

  _text(index) {
    return index === null ? null : this._strings[index];
  }

  /** One version of a node; equal versions are the same object. */
  _node(index) {
    if (this._nodes[index]) return this._nodes[index];
    const [name, op, module, layer, role, shape, dtype, source, inputs, tensors, args, provenance] = this.data.nodes[index];
    const texts = (list) => list.map((entry) => this._text(entry));
    const made = provenance.map(([pass, sources]) => ({pass: this._text(pass), sources: texts(sources)}));
    this._nodes[index] = {
      name: this._text(name), op: this._text(op), module: this._text(module), layer: this._text(layer),
      role: this._text(role), shape: this._text(shape), dtype: this._text(dtype), source: this._text(source),
      inputs: texts(inputs), tensors: texts(tensors), args: texts(args), provenance: made,
    };
    return this._nodes[index];
  }

  _tensor(index) {
    if (this._tensors[index]) return this._tensors[index];
    const [name, shape, dtype, size, passes, layers] = this.data.tensors[index];
    const texts = (list) => list.map((entry) => this._text(entry));
    this._tensors[index] = {
      name: this._text(name), shape: this._text(shape), dtype: this._text(dtype), bytes: size, passes: texts(passes), layers: texts(layers),
    };
    return this._tensors[index];
  }

  /** The nodes and tensors after a pass, by name; step 0 is the captured graph. Steps without edits share a snapshot. */
  snapshot(step) {
    let at = step;
    while (this.steps[at].nodes === null) at--;
    if (!this._snapshots.has(at)) {
      const expand = (runs) => runs.flatMap(([start, length]) => Array.from({length}, (_, i) => start + i));
      const nodes = new Map(expand(this.steps[at].nodes).map((i) => [this._text(this.data.nodes[i][0]), this._node(i)]));
      const tensors = new Map(
        expand(this.steps[at].tensors).map((i) => [this._text(this.data.tensors[i][0]), this._tensor(i)]));
      const readers = new Map();
      for (const node of nodes.values()) {
        for (const input of node.inputs) {
          if (!readers.has(input)) readers.set(input, []);
          readers.get(input).push(node.name);
        }
      }
      this._snapshots.set(at, {nodes, tensors, readers});
    }
    return this._snapshots.get(at);
  }

  /** How a pass changed each node: name -> `added`, `removed`, `rewired` or `tensor`. */
  changes(step) {
    if (step === 0 || this.steps[step].nodes === null) return new Map();
    const found = this.steps[step].found;
    if (found) return found;
    const [before, after] = [this.snapshot(step - 1), this.snapshot(step)];
    const changed = this.changedTensors(step);
    const changes = new Map();
    for (const [name, node] of after.nodes) {
      const old = before.nodes.get(name);
      if (!old) changes.set(name, 'added');
      else if (old.op !== node.op || String(old.inputs) !== String(node.inputs)) changes.set(name, 'rewired');
      else if (String(old.tensors) !== String(node.tensors)) changes.set(name, 'tensor');
      else if (node.tensors.some((tensor) => changed.has(tensor))) changes.set(name, 'tensor');
      else if (String(old.args) !== String(node.args)) changes.set(name, 'rewired');
    }
    for (const name of before.nodes.keys()) if (!after.nodes.has(name)) changes.set(name, 'removed');
    this.steps[step].found = changes;
    return changes;
  }

  /** How many nodes a pass changed, by kind, in the order of `MARKS`: [[kind, count], ...]. */
  changeCounts(step) {
    const kinds = [...this.changes(step).values()];
    return Object.keys(MARKS).map((kind) => [kind, kinds.filter((other) => other === kind).length]).filter(([, count]) => count);
  }

  /** The tensors that a pass changed: name -> what it did. */
  changedTensors(step) {
    return new Map(this.steps[step].changed);
  }

  /** The nodes to draw after a pass, with those that it removed: name -> {node, change}. */
  drawn(step, withRemoved) {
    const key = `${step} ${withRemoved}`;
    if (this._drawn.has(key)) return this._drawn.get(key);
    const changes = this.changes(step);
    const drawn = new Map();
    this._drawn.set(key, drawn);
    for (const [name, node] of this.snapshot(step).nodes) drawn.set(name, {node, change: changes.get(name) ?? null});
    if (withRemoved && step > 0) {
      for (const [name, node] of this.snapshot(step - 1).nodes) {
        if (changes.get(name) === 'removed') drawn.set(name, {node, change: 'removed'});
      }
    }
    return drawn;
  }

  /** Bytes of the tensors of each layer after a pass: layer -> bytes. */
  layerBytes(step) {
    const found = new Map();
    for (const {bytes: size, layers} of this.snapshot(step).tensors.values()) {
      for (const layer of layers) found.set(layer, (found.get(layer) ?? 0) + (size ?? 0));
    }
    return found;
  }
}

/** One quantized model: its plan, report and graphs. */
class Model {
  constructor(data) {
    Object.assign(this, data);
    this.graphs = data.graphs.map((graph) => new Graph(graph));
    this.layerByName = new Map(data.layers.map((layer) => [layer.name, layer]));
    this.attentionByName = new Map(data.attentions.map((attention) => [attention.name, attention]));
  }
}
