'use strict';
// The tabs with tables and curves. Each function fills the panel; `app` gives `model`, `models` and `goLayer(name)`.

const missing = (text) => el('div', {class: 'missing'}, text);
const lead = (text) => el('p', {class: 'lead'}, text);
const tile = (value, text) => (value === null || value === undefined || value === '' ? null : el('div', {class: 'tile'}, el('b', {}, value), el('span', {}, text)));
const code = (text) => el('code', {}, text);

/** A choice among layers; calls `change` with the chosen name. */
function layerChoice(names, chosen, change) {
  const select = el('select', {'aria-label': 'Layer', onchange: () => change(select.value)},
    names.map((name) => el('option', {value: name, selected: name === chosen}, name)));
  const move = (by) => {
    select.selectedIndex = Math.min(names.length - 1, Math.max(0, select.selectedIndex + by));
    change(select.value);
  };
  return el('div', {class: 'row'}, select, el('button', {type: 'button', onclick: () => move(-1)}, '← previous'),
    el('button', {type: 'button', onclick: () => move(1)}, 'next →'));
}

/** A table of layers under a field that filters it by words. */
function filteredTable(columns, rows, onrow) {
  const place = el('div');
  const show = (text) => {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const all = (row) => [row.name, row.role, row.precision, row.kernel].join(' ').toLowerCase();
    fill(place, sortedTable(columns, rows.filter((row) => words.every((word) => all(row).includes(word))), {onrow}));
  };
  const input = el('input', {type: 'search', placeholder: 'Filter by words, such as to_q w4a8', 'aria-label': 'Filter',
    style: {width: '280px'}, oninput: () => show(input.value)});
  show('');
  return [el('div', {class: 'row'}, input), place];
}

function overviewTiles(model) {
  const totals = model.totals;
  return el('div', {class: 'tiles'},
    tile(totals.ratio && `${totals.ratio.toFixed(2)} ×`, `smaller: ${bytes(totals.bytes_before)} → ${bytes(totals.bytes_after)}`),
    tile(totals.mean_sqnr_db !== null && totals.mean_sqnr_db !== undefined ? `${db(totals.mean_sqnr_db)} dB` : '', 'mean output SQNR'),
    tile(totals.worst_sqnr_db !== null && totals.worst_sqnr_db !== undefined ? `${db(totals.worst_sqnr_db)} dB` : '', totals.worst_timestep !== null ? `worst, at timestep ${num(totals.worst_timestep)}` : 'worst output SQNR'),
    Object.entries(totals.layers_by_precision).map(([precision, count]) => tile(count, `layers ${precision}`)));
}

function layersPanel(panel, app) {
  const {model} = app;
  const graph = model.graphs[0];
  const [before, after] = graph ? [graph.layerBytes(0), graph.layerBytes(graph.steps.length - 1)] : [new Map(), new Map()];
  const columns = [
    {title: 'layer', cell: (row) => row.name, class: 'mono'},
    {title: 'role', cell: (row) => row.role},
    {title: 'bits', cell: (row) => row.precision},
    {title: 'kernel', cell: (row) => row.kernel, class: 'text'},
    {title: 'weight', cell: (row) => row.shape.join(' × '), sort: (row) => row.shape[0] * row.shape[1], number: true},
    {title: 'bytes', cell: (row) => bytes(after.get(row.name)), sort: (row) => after.get(row.name) ?? null, number: true},
    {title: 'smaller', cell: (row) => (after.get(row.name) ? `${(before.get(row.name) / after.get(row.name)).toFixed(1)} ×` : ''),
      sort: (row) => (after.get(row.name) ? before.get(row.name) / after.get(row.name) : null), number: true},
    {title: 'range', cell: (row) => (row.range ? `${num(Math.min(...row.range.low), 3)} … ${num(Math.max(...row.range.high), 3)}` : ''),
      sort: (row) => (row.range ? Math.max(...row.range.high) : null), number: true},
    {title: 'groups', cell: (row) => row.boundaries.length + 1, number: true, help: 'Groups of timesteps'},
    {title: 'balance', cell: (row) => row.balance?.cost ?? ''},
    {title: 'weight dB', cell: (row) => db(row.weight_sqnr_db), sort: (row) => row.weight_sqnr_db, number: true},
    {title: 'input dB', cell: (row) => db(row.activation_sqnr_db), sort: (row) => row.activation_sqnr_db, number: true},
    {title: 'float because', cell: (row) => row.float_because ?? '', class: 'text'},
  ];
  const products = Object.entries(model.products);
  fill(panel, el('h1', {}, 'Layers'), overviewTiles(model),
    lead('One row per layer. A click on a title sorts, a click on a row shows the layer in the graph.'),
    filteredTable(columns, model.layers, (row) => app.goLayer(row.name)),
    products.length ? [el('h2', {}, 'Matrix products that stay float'), sortedTable([
      {title: 'product', cell: (row) => row[0], class: 'mono'}, {title: 'reason', cell: (row) => row[1]}], products)] : null);
}

/** Curves of the SQNR of the output by timestep, one per model. */
function outputCurves(place, models) {
  const x = [...new Set(models.flatMap((model) => model.output_sqnr_db.map(([t]) => t)))].sort((a, b) => a - b);
  const theme = colours();
  curves(place, {x, xLabel: 'timestep', yLabel: 'SQNR in dB', points: true, series: models.map((model, i) => {
    const found = new Map(model.output_sqnr_db);
    return {label: model.name, values: x.map((t) => found.get(t) ?? null), colour: [theme.accent, theme.scale][i], width: 2};
  })});
}

function errorsPanel(panel, app) {
  const {model, models} = app;
  const curve = el('div', {class: 'chart'});
  const map = el('div', {class: 'chart'});
  const errors = model.errors;
  const measured = models.filter((other) => other.output_sqnr_db.length);
  fill(panel, el('h1', {}, 'Errors'), el('h2', {}, 'Output against float, by timestep'),
    measured.length ? curve : missing('The error of the output was not measured: this plan was not made with calibration inputs at hand.'),
    el('h2', {}, 'Error by layer and timestep'),
    errors.missing ? missing(errors.missing) : [lead(`How these were found: ${errors.about}.`), el('div', {class: 'row'}), map]);
  if (measured.length) outputCurves(curve, measured);
  if (errors.missing) return;
  const row = panel.querySelector('.row');
  const choice = el('select', {'aria-label': 'Kind of error', onchange: () => draw()},
    errors.tables.map((table, i) => el('option', {value: i}, `${table.title} ${table.about}`)));
  const sort = el('input', {type: 'checkbox', onchange: () => draw()});
  const legend = el('span');
  append(row, [choice, el('label', {}, sort, ' worst layer first'), legend]);
  const draw = () => errorMap(map, legend, app, errors, errors.tables[choice.value || 0].values, sort.checked);
  draw();
}

const SPAN = 60;  // Decibels that the colours of the heat map tell apart, from the worst.

/** The heat map of one kind of error, in dB. */
function errorMap(place, legend, app, errors, values, worstFirst) {
  const finite = values.flat().filter((value) => typeof value === 'number');
  const low = Math.min(...finite);
  const most = Math.max(...finite);
  const high = Math.min(most, low + SPAN);
  const worst = (row) => Math.min(...row.filter((value) => typeof value === 'number'));
  const order = errors.layers.map((_, i) => i);
  if (worstFirst) order.sort((a, b) => worst(values[a]) - worst(values[b]));
  heatMap(place, {rows: order.map((i) => errors.layers[i]), values: order.map((i) => values[i]), columns: errors.timesteps,
    unit: 'dB', low, high, onpick: (name) => app.goLayer(name)});
  fill(legend, colourScale(num(low), `${high < most ? '≥ ' : ''}${num(high)}`, 'SQNR in dB'));
}

function saliencePanel(panel, app, chosen = null) {
  const {model} = app;
  const found = model.salience;
  if (found.missing) {
    fill(panel, el('h1', {}, 'Salience of channels'), missing(found.missing));
    return;
  }
  const names = Object.keys(found.layers);
  const name = names.includes(chosen) ? chosen : names[0];
  const layer = found.layers[name];
  const places = Array.from({length: 5}, () => el('div', {class: 'chart'}));
  fill(panel, el('h1', {}, 'Salience of channels'),
    lead('The largest magnitude of each channel. A quantizer with one scale suffers from channels that are much larger than the others; balancing evens them out.'
      + (layer.pooled > 1 ? ` Each point is the largest of ${layer.pooled} neighbouring channels.` : '')),
    layerChoice(names, name, (next) => saliencePanel(panel, app, next)),
    el('div', {class: 'row'}, colourScale(num(layer.timesteps[0]), num(layer.timesteps[layer.timesteps.length - 1]), 'timestep'),
      el('span', {}, `${plural(layer.channels, 'channel')}, ${layer.after ? '' : 'not '}balanced${layer.readers.length ? `; also the input of ${layer.readers.join(', ')}` : ''}`)),
    el('div', {class: 'cols'}, places));
  const theme = colours();
  const x = Array.from({length: layer.points}, (_, i) => i * layer.pooled);
  const span = layer.timesteps.length - 1 || 1;
  const lines = (all) => all.map((series, i) => ({label: `t = ${num(layer.timesteps[i])}`, values: decoded(series), colour: viridis(i / span), width: 1}));
  const common = {x, xLabel: 'input channel', legend: false};
  curves(places[0], {...common, title: `Input, before${layer.after ? ' balancing' : ''}`, yLabel: 'max |x|', series: lines(layer.before)});
  if (layer.after) curves(places[1], {...common, title: 'Input, after balancing', yLabel: 'max |x|', series: lines(layer.after)});
  if (layer.weight_before) {
    curves(places[2], {...common, title: 'Weight, before', yLabel: 'max |W|', series: [{label: 'max |W|', values: decoded(layer.weight_before), colour: theme.accent}]});
    if (layer.weight_after) curves(places[3], {...common, title: 'Weight, after balancing', yLabel: 'max |W|', series: [{label: 'max |W|', values: decoded(layer.weight_after), colour: theme.accent}]});
  }
  const overall = [{label: 'before', values: layer.overall.before, colour: theme.scale, width: 2}];
  if (layer.overall.after) overall.push({label: 'after', values: layer.overall.after, colour: theme.accent, width: 2});
  curves(places[4], {title: 'Largest channel, by timestep', x: layer.overall.timesteps, xLabel: 'timestep', yLabel: 'max |x|', series: overall});
  places.filter((place) => !place.hasChildNodes()).forEach((place) => place.remove());
}

function timestepsPanel(panel, app, chosen = null) {
  const layers = app.model.layers.filter((layer) => layer.boundaries.length || layer.dendrogram.length);
  fill(panel, el('h1', {}, 'Groups of timesteps'));
  if (!layers.length) {
    append(panel, [missing('All timesteps share one range: no pass of this recipe groups timesteps. The recipe htg does, by its pass group-timesteps.')]);
    return;
  }
  const layer = layers.find((entry) => entry.name === chosen) ?? layers[0];
  const tree = el('div', {class: 'chart'});
  const ranges = el('div', {class: 'chart'});
  append(panel, [
    lead('Neighbouring timesteps whose inputs are alike share a range. The tree shows how they were merged: the lower a bar, the more alike the two groups. Dashed lines are the boundaries of the groups; the axis of distances is drawn by square root.'),
    layerChoice(layers.map((entry) => entry.name), layer.name, (next) => timestepsPanel(panel, app, next)),
    layer.groups_reason ? el('p', {}, layer.groups_reason) : null,
    layer.dendrogram.length ? tree : null, layer.range ? ranges : null,
    el('p', {}, el('button', {type: 'button', onclick: () => app.goLayer(layer.name)}, 'Show the layer in the graph')),
    layer.range ? el('div', {style: {maxWidth: '420px'}}, app.details.ranges(layer.range, layer.boundaries)) : null]);
  const steps = app.model.timesteps;
  if (layer.dendrogram.length) dendrogram(tree, {timesteps: steps, merges: layer.dendrogram, boundaries: layer.boundaries});
  if (layer.range && steps.length > 1) {
    const group = (t) => Math.min(layer.range.low.length - 1, layer.boundaries.filter((boundary) => t > boundary).length);
    const theme = colours();
    curves(ranges, {title: 'Range of the input', stepped: true, x: steps, xLabel: 'timestep', yLabel: 'x', series: [
      {label: 'high', values: steps.map((t) => layer.range.high[group(t)]), colour: theme.scale, width: 2},
      {label: 'low', values: steps.map((t) => layer.range.low[group(t)]), colour: theme.accent, width: 2}]});
  }
}

function absorptionPanel(panel, app) {
  const {model} = app;
  const rows = model.layers.flatMap((layer) => [['balance', layer.balance], ['shift', layer.shift]].filter(([, entry]) => entry)
    .map(([what, entry]) => ({layer, what, ...entry})));
  fill(panel, el('h1', {}, 'Absorption'));
  if (!rows.length) {
    append(panel, [missing('No pass of this recipe balanced or shifted channels, so there was nothing to absorb.')]);
    return;
  }
  const costs = new Map();
  for (const {cost} of rows) costs.set(cost, (costs.get(cost) ?? 0) + 1);
  const about = {free: 'free: folded into weights', vector: 'vector: one multiplication of a vector per call', tokens: 'tokens: a multiplication of every token', not: 'not absorbed, so not balanced'};
  append(panel, [
    lead('Balancing divides the input channels of a layer by factors. An earlier op must absorb the factors; what absorbs them decides what they cost at run time.'),
    el('div', {class: 'tiles'}, [...costs].map(([cost, count]) => tile(count, about[cost] ?? cost))),
    sortedTable([
      {title: 'layer', cell: (row) => row.layer.name, class: 'mono'}, {title: 'what', cell: (row) => row.what},
      {title: 'cost', cell: (row) => row.cost, tone: (row) => ({free: 'good', not: 'bad'}[row.cost] ?? '')},
      {title: 'channels', cell: (row) => row.channels, number: true},
      {title: 'absorbed in', cell: (row) => row.into.map((into) => el('div', {}, into)), sort: (row) => row.into.join(' '), class: 'mono'},
      {title: 'factors', cell: (row) => (row.factors ? `${num(row.factors[0], 3)} … ${num(row.factors[2], 3)}, median ${num(row.factors[1], 3)}` : ''),
        sort: (row) => row.factors?.[2] ?? null, number: true},
      {title: 'decided with', cell: (row) => (row.group && row.group !== row.layer.name ? row.group : ''), class: 'mono'},
      {title: 'left alone because', cell: (row) => row.reason ?? '', class: 'text'},
    ], rows, {onrow: (row) => app.goLayer(row.layer.name)})]);
}

function passesPanel(panel, app) {
  const {model} = app;
  const most = Math.max(...model.passes.map((entry) => entry.seconds), 1e-9);
  const total = model.passes.reduce((sum, entry) => sum + entry.seconds, 0);
  fill(panel, el('h1', {}, 'Passes'), lead(`The log of the conversion: ${plural(model.passes.length, 'pass').replace('passs', 'passes')}, ${num(total, 3)} s together, verification included.`),
    sortedTable([
      {title: 'pass', cell: (row) => code(row.text), sort: (row) => row.text},
      {title: 'edits', cell: (row) => row.edits, number: true},
      {title: 'seconds', cell: (row) => row.seconds.toFixed(3), sort: (row) => row.seconds, number: true},
      {title: '', cell: (row) => el('div', {style: {width: `${(120 * row.seconds) / most}px`, height: '9px', background: 'var(--accent)', borderRadius: '2px', marginTop: '5px'}}), sort: (row) => row.seconds},
      {title: 'change in ops', cell: (row) => Object.entries(row.ops).map(([op, change]) => `${op} ${change > 0 ? '+' : '−'}${Math.abs(change)}`).join(', ')},
    ], model.passes),
    model.decisions.length ? [el('h2', {}, 'Decisions of further passes'), sortedTable([
      {title: 'pass', cell: (row) => row.of}, {title: 'of', cell: (row) => row.name, class: 'mono'},
      {title: 'values', cell: (row) => Object.entries(row.values).map(([key, value]) => `${key}: ${typeof value === 'object' && value !== null ? JSON.stringify(value) : value}`).join(', ')},
    ], model.decisions)] : null);
}
