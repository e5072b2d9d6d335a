'use strict';
// The panel at the right: everything that is known about the selected node or module.

const BIN = (boundaries, index) => {
  const [low, high] = [boundaries[index - 1], boundaries[index]];
  if (low === undefined && high === undefined) return 'all timesteps';
  if (low === undefined) return `t ≤ ${num(high)}`;
  return high === undefined ? `t > ${num(low)}` : `${num(low)} < t ≤ ${num(high)}`;
};

function pairs(rows) {
  const shown = rows.filter(([, value]) => value !== null && value !== undefined && value !== '');
  return shown.length ? el('dl', {}, shown.map(([name, value]) => [el('dt', {}, name), el('dd', {}, value)])) : null;
}

function section(title, ...children) {
  const inside = children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false);
  return inside.length ? [el('h3', {}, title), inside] : null;
}

const valueOf = (node) => (node.shape === null && node.dtype === null ? '' : `${node.dtype ?? ''}[${node.shape ?? ''}]`);

/** The captions of a node's card in the box `home`: the op, where it is inside the box, what it gives. */
function captionOf(node, home) {
  if (node.op === 'input' || node.op === 'output') return {title: node.name, place: `${node.op} of the model`, value: valueOf(node)};
  const title = node.op.replace(/^\w+::/, '').replace(/\.(Tensor|int|default|using_ints)$/, '');
  const path = node.layer ?? node.module;
  const inside = path === home ? '' : home && path.startsWith(`${home}.`) ? path.slice(home.length + 1) : path;
  const place = inside ? `${inside} · ${node.name}` : node.name;
  return {title, place, value: valueOf(node)};
}

class Details {
  /** `app` gives `model`, `graph`, `step`, `go(name)`, `goLayer(name)` and `openLayer(name)`. */
  constructor(element, app) {
    this.element = element;
    this.app = app;
  }

  show(key) {
    if (key?.startsWith('n:')) this.node(key.slice(2));
    else if (key?.startsWith('b:')) this.module(key.slice(2));
    else this.pass();
  }

  _links(names) {
    const go = (name) => el('button', {type: 'button', class: 'go mono', onclick: () => this.app.go(name)}, name);
    const shown = names.slice(0, 12).map((name) => el('p', {}, go(name)));
    return names.length > 12 ? [shown, el('p', {}, `and ${names.length - 12} more`)] : shown;
  }

  node(name) {
    const {graph, step} = this.app;
    const change = graph.changes(step).get(name) ?? null;
    const at = graph.snapshot(change === 'removed' ? step - 1 : step);
    const node = at.nodes.get(name);
    if (!node) return this.pass();
    const made = node.provenance.map(({pass, sources}) => el('p', {}, pass, sources.length
      ? [el('span', {class: 'soft'}, ' from '), el('code', {}, sources.join(', '))] : null));
    const args = [];
    for (let i = 0; i < node.args.length; i += 2) args.push([node.args[i], el('code', {}, node.args[i + 1])]);
    fill(this.element,
      el('h1', {}, node.op),
      change && el('p', {}, el('span', {class: `pill ${change}`}, MARKS[change], ' ', MEANINGS[change])),
      pairs([['node', el('code', {}, name)], ['value', valueOf(node) && el('code', {}, valueOf(node))],
        ['layer', node.layer && el('code', {}, node.layer)], ['role', node.role],
        ['module', node.module && el('code', {}, node.module)]]),
      node.layer !== null && this._layer(node.layer),
      this._attention(node),
      section('Made by', made.length ? made : el('p', {}, 'The model itself; no pass changed this node.')),
      node.source && section('Line of the model', el('p', {}, el('code', {}, node.source))),
      section('Inputs', this._links(node.inputs)),
      section('Read by', this._links(at.readers.get(name) ?? [])),
      section('Tensors', node.tensors.map((tensor) => this._tensor(at.tensors.get(tensor), tensor, node.layer))),
      args.length ? section('Arguments', pairs(args)) : null,
    );
    return undefined;
  }

  /** A stored tensor; the name of the layer is left out of its name. */
  _tensor(tensor, name, layer) {
    if (!tensor) return el('p', {}, el('code', {}, name));
    const {graph, step} = this.app;
    const change = graph.changedTensors(step).get(name);
    const isNew = step > 0 && !graph.snapshot(step - 1).tensors.has(name);
    const facts = [`${tensor.dtype}[${tensor.shape}]`, bytes(tensor.bytes)].join(' · ');
    return el('p', {}, el('code', {class: change ? 'tensor' : isNew ? 'added' : '', title: name}, layer && name.startsWith(`${layer}.`) ? name.slice(layer.length + 1) : name), el('br'), facts,
      tensor.passes.length ? [el('br'), `by ${tensor.passes.join(', ')}`] : null,
      change || isNew ? [el('br'), el('span', {class: change ? 'tensor' : 'added'}, `this pass: ${change ?? 'made'}`)] : null);
  }

  /** What the plan says about a layer. */
  _layer(name) {
    const layer = this.app.model.layerByName.get(name);
    if (!layer) return null;
    const {graph} = this.app;
    const [before, after] = [graph.layerBytes(0).get(name), graph.layerBytes(graph.steps.length - 1).get(name)];
    const balance = layer.balance;
    const shift = layer.shift;
    return section('Layer', pairs([
      ['bits', layer.precision], ['kernel', layer.kernel], ['float because', layer.float_because],
      ['kind', `${layer.kind}, ${layer.role}`], ['weight', layer.shape.join(' × ')],
      ['bytes', before === undefined ? '' : `${bytes(before)} → ${bytes(after)}`],
      ['weight SQNR', layer.weight_sqnr_db !== null ? `${db(layer.weight_sqnr_db)} dB` : ''],
      ['input SQNR', layer.activation_sqnr_db !== null ? `${db(layer.activation_sqnr_db)} dB` : ''],
      ['max |input|', layer.spread && `${num(layer.spread[0])} to ${num(layer.spread[1])} over timesteps`],
      ['balanced', balance && `${plural(balance.channels, 'channel')}, ${balance.cost}`],
      ['absorbed in', balance?.into.length ? balance.into.map((into) => el('div', {}, el('code', {}, into))) : ''],
      ['not balanced', balance?.reason], ['shifted', shift && `${plural(shift.channels, 'channel')}, ${shift.cost}`],
    ]), this.ranges(layer.range, layer.boundaries),
    el('p', {}, el('button', {type: 'button', class: 'go', onclick: () => this.app.openLayer(name)}, 'Show its salience and timesteps')));
  }

  /** One range per group of timesteps. */
  ranges(range, boundaries) {
    if (!range) return null;
    const rows = range.low.map((low, i) => [BIN(boundaries, i), num(low), num(range.high[i])]);
    return [el('p', {}, `Range of the input (${range.method})`), el('table', {class: 'data small'},
      el('tr', {}, ['timesteps', 'low', 'high'].map((title, i) => el('th', {class: i ? 'number' : ''}, title))),
      rows.map((cells) => el('tr', {}, cells.map((cell, i) => el('td', {class: i ? 'number' : ''}, cell)))))];
  }

  _attention(node) {
    if (!/attention|matmul|softmax/.test(node.op)) return null;
    const found = this.app.model.attentionByName.get(node.module);
    if (!found) return null;
    const ranges = Object.entries(found.ranges).map(([side, [low, high]]) => [`range of ${side}`, `${num(low)} to ${num(high)}`]);
    return section('Attention', pairs([['bits', found.bits === null ? 'float' : `a${found.bits}, softmax ${found.softmax_bits}`],
      ['kernel', found.kernel], ['float because', found.reason], ...ranges]));
  }

  module(path) {
    const {graph, step, model} = this.app;
    const inside = (name) => name === path || name.startsWith(`${path}.`);
    const nodes = [...graph.snapshot(step).nodes.values()].filter((node) => inside(node.module));
    const changed = [...graph.drawn(step, true).values()].filter(({node, change}) => change && inside(node.module));
    const counts = Object.keys(MARKS).map((kind) => [kind, changed.filter(({change}) => change === kind).length]);
    const layers = model.layers.filter((layer) => inside(layer.name));
    const sizes = [0, graph.steps.length - 1].map((at) => {
      const found = graph.layerBytes(at);
      return layers.reduce((sum, layer) => sum + (found.get(layer.name) ?? 0), 0);
    });
    fill(this.element, el('h1', {}, path), pairs([
      ['nodes', nodes.length], ['layers', layers.length || ''], ['bytes', layers.length ? `${bytes(sizes[0])} → ${bytes(sizes[1])}` : ''],
      ...counts.filter(([, count]) => count).map(([kind, count]) => [el('span', {class: kind}, `${MARKS[kind]} ${kind}`), count]),
    ]), section('Layers', layers.map((layer) => el('p', {}, el('button', {type: 'button', class: 'go mono', onclick: () => this.app.goLayer(layer.name)},
      layer.name.slice(path.length + 1) || layer.name), ` ${layer.precision}`))));
  }

  /** Without a selection: what the pass did as a whole. */
  pass() {
    const {graph, step, model} = this.app;
    const at = graph.steps[step];
    const counts = graph.changeCounts(step);
    const ops = Object.entries(at.ops ?? {}).sort((left, right) => left[0].localeCompare(right[0]));
    fill(this.element, el('h1', {}, at.name),
      at.name !== at.pass && el('p', {}, el('code', {}, at.pass)),
      el('p', {}, step === 0 ? 'The graph as it was captured from the model, before any pass.'
        : at.phase === 'lower' ? 'The graph as the backend runs it: every node that it replaced is new.'
          : `${plural(at.edits, 'edit')}${at.seconds === null ? '' : ` in ${num(at.seconds, 3)} s`}, ${at.phase === 'prepare' ? 'before' : 'after'} calibration.`),
      step > 0 && at.edits === 0 && el('p', {}, 'This pass left the graph as it was. It may have written decisions into the plan.'),
      counts.length ? section('Nodes', pairs(counts.map(([kind, count]) => [el('span', {class: kind}, `${MARKS[kind]} ${kind}`), count]))) : null,
      ops.length ? section('Ops', pairs(ops.map(([op, change]) => [el('code', {}, op), change > 0 ? `+${change}` : `−${-change}`]))) : null,
      at.changed.length ? section('Tensors changed', at.changed.slice(0, 40).map(([name, what]) =>
        el('p', {}, el('code', {class: 'tensor'}, name), what ? [el('br'), what] : null)),
      at.changed.length > 40 ? el('p', {}, `and ${at.changed.length - 40} more`) : null) : null,
      section('Model', pairs([['class', model.model_class.split(':').pop()], ['name', model.name], ['backend', model.backend],
        ['call', el('code', {}, graph.call)], ['nodes', graph.snapshot(step).nodes.size]])),
      section('Recipe', el('p', {}, el('code', {}, model.recipe))),
      el('p', {class: 'hint'}, 'Select a node or a module to see everything about it.'));
  }
}
