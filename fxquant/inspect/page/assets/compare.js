'use strict';
// The tab that compares two models: totals, recipes, and the layers whose decisions differ.

const COMPARED = [
  ['bits', (layer) => layer.precision], ['kernel', (layer) => layer.kernel],
  ['balance', (layer) => layer.balance && `${layer.balance.cost}, ${plural(layer.balance.channels, 'channel')}`],
  ['shift', (layer) => layer.shift && `${layer.shift.cost}, ${plural(layer.shift.channels, 'channel')}`],
  ['groups', (layer) => layer.boundaries.length + 1],
  ['range', (layer) => layer.range && `${num(Math.min(...layer.range.low), 3)} … ${num(Math.max(...layer.range.high), 3)}`],
  ['weight dB', (layer) => db(layer.weight_sqnr_db)], ['input dB', (layer) => db(layer.activation_sqnr_db)],
  ['float because', (layer) => layer.float_because],
];

/** The decisions that differ between two layers: [what, left, right]. */
function differences(left, right) {
  if (!left || !right) return [['layer', left ? 'yes' : 'not there', right ? 'yes' : 'not there']];
  return COMPARED.map(([what, of]) => [what, of(left) ?? '', of(right) ?? '']).filter(([, a, b]) => String(a) !== String(b));
}

function comparePanel(panel, app) {
  const [left, right] = app.models;
  const names = [...new Set([...left.layers, ...right.layers].map((layer) => layer.name))];
  const rows = names.map((name) => {
    const [a, b] = [left.layerByName.get(name), right.layerByName.get(name)];
    return {name, a, b, found: differences(a, b)};
  });
  const differing = rows.filter((row) => row.found.length);
  const totals = [
    ['backend', (model) => model.backend],
    ['size', (model) => bytes(model.totals.bytes_after)], ['mean output SQNR', (model) => model.totals.mean_sqnr_db !== null ? `${db(model.totals.mean_sqnr_db)} dB` : 'not measured'],
    ['worst output SQNR', (model) => model.totals.worst_sqnr_db !== null ? `${db(model.totals.worst_sqnr_db)} dB${model.totals.worst_timestep !== null ? ` at t = ${num(model.totals.worst_timestep)}` : ''}` : 'not measured'],
    ['layers', (model) => Object.entries(model.totals.layers_by_precision).map(([precision, count]) => `${count} ${precision}`).join(', ')],
    ['nodes', (model) => model.graphs[0]?.snapshot(model.graphs[0].steps.length - 1).nodes.size ?? ''],
    ['passes', (model) => model.passes.map((entry) => el('div', {}, code(entry.text)))],
  ];
  const curve = el('div', {class: 'chart'});
  const measured = [left, right].filter((model) => model.output_sqnr_db.length);
  fill(panel, el('h1', {}, 'Compare'),
    el('table', {class: 'data'}, el('thead', {}, el('tr', {}, ['', left.name, right.name].map((text) => el('th', {}, text)))),
      el('tbody', {}, totals.map(([title, of]) => el('tr', {}, el('td', {}, title), el('td', {}, of(left)), el('td', {}, of(right)))))),
    measured.length ? [el('h2', {}, 'Output against float, by timestep'), curve] : null,
    el('h2', {}, `Layers: ${differing.length} of ${names.length} differ`),
    differing.length ? sortedTable([
      {title: 'layer', cell: (row) => row.name, class: 'mono'},
      {title: 'what', cell: (row) => row.found.map(([what]) => el('div', {}, what)), sort: (row) => row.found.length},
      {title: left.name, cell: (row) => row.found.map(([, a]) => el('div', {}, a === '' ? '–' : a)), sort: (row) => row.found[0][1]},
      {title: right.name, cell: (row) => row.found.map(([, , b]) => el('div', {}, b === '' ? '–' : b)), sort: (row) => row.found[0][2]},
    ], differing, {onrow: (row) => app.goLayer(row.name)}) : missing('All layers have the same decisions.'));
  if (measured.length) outputCurves(curve, measured);
}
