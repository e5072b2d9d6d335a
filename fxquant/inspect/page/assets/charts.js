'use strict';
// Curves by uPlot; heat maps and dendrograms on a canvas.

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [110, 206, 88], [181, 222, 43], [253, 231, 37]];

/** Colour of the viridis map for a share from 0 to 1. */
function viridis(share) {
  const at = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1);
  const low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return `rgb(${VIRIDIS[low].map((value, i) => Math.round(value + (VIRIDIS[low + 1][i] - value) * (at - low))).join(',')})`;
}

/** A strip that shows the colours from `low` to `high`. */
function colourScale(low, high, title) {
  const stops = Array.from({length: 11}, (_, i) => viridis(i / 10)).join(',');
  return el('div', {class: 'scale'}, title, el('span', {}, low), el('i', {style: {background: `linear-gradient(90deg, ${stops})`}}), el('span', {}, high));
}

/** Curves: `x` values and `series` of {label, values, colour, width}. */
function curves(place, {title, x, series, xLabel, yLabel, height = 230, legend = true, points = false, stepped = false}) {
  const theme = colours();
  const axis = {stroke: theme.soft, grid: {stroke: theme.line, width: 0.5}, ticks: {stroke: theme.line, width: 0.5}, font: '11px system-ui', labelFont: '12px system-ui'};
  const plot = new uPlot({
    title, width: Math.max(280, place.clientWidth || 560), height,
    scales: {x: {time: false}},
    axes: [{...axis, label: xLabel, labelSize: 22, size: 34}, {...axis, label: yLabel, labelSize: 22, size: 54, values: (_, ticks) => ticks.map((tick) => num(tick))}],
    series: [{label: xLabel, value: (_, value) => num(value)}, ...series.map((entry) => ({
      label: entry.label, stroke: entry.colour ?? theme.accent, width: entry.width ?? 1, dash: entry.dash,
      points: {show: points, size: 5}, paths: stepped ? uPlot.paths.stepped({align: -1}) : null, value: (_, value) => num(value),
    }))],
    legend: {show: legend, live: true}, cursor: {drag: {x: true, y: false}},
  }, [x, ...series.map((entry) => entry.values)], place);
  new ResizeObserver(() => {
    const width = Math.max(280, place.clientWidth);
    if (Math.abs(width - plot.width) > 4) plot.setSize({width, height});
  }).observe(place);
  return plot;
}

/** A matrix as coloured cells: one row per layer, one column per timestep. `onpick(row)` is called on a click. */
function heatMap(place, {rows, columns, values, unit, low, high, onpick}) {
  const theme = colours();
  const label = Math.min(330, 40 + 6.2 * Math.max(...rows.map((row) => row.length), 4));
  const cellHeight = rows.length > 60 ? 14 : 18;
  const width = Math.max(360, place.clientWidth || 900);
  const cell = Math.min(46, Math.max(3, (width - label - 12) / columns.length));
  const canvas = el('canvas', {role: 'img', 'aria-label': `Heat map of ${rows.length} layers by ${columns.length} timesteps`});
  const tip = el('div', {class: 'tip', hidden: true});
  fill(place, canvas, tip);
  const context = sharp(canvas, label + cell * columns.length + 12, 24 + cellHeight * rows.length);
  context.font = `11px ${FONT}`;
  context.textBaseline = 'middle';
  const fitter = new Fitter();
  const every = Math.ceil(34 / cell);
  context.fillStyle = theme.soft;
  context.textAlign = 'center';
  columns.forEach((step, i) => { if (i % every === 0) context.fillText(num(step), label + cell * (i + 0.5), 11); });
  rows.forEach((row, r) => {
    const y = 24 + r * cellHeight;
    context.fillStyle = theme.ink;
    context.textAlign = 'right';
    context.fillText(fitter.fit(context, row, label - 10), label - 6, y + cellHeight / 2);
    values[r].forEach((value, c) => {
      context.fillStyle = typeof value === 'number' ? viridis((value - low) / (high - low || 1)) : theme.panel;
      context.fillRect(label + c * cell, y, Math.max(1, cell - (cell > 6 ? 1 : 0)), cellHeight - 1);
    });
  });
  const at = (event) => [Math.floor((event.offsetY - 24) / cellHeight), Math.floor((event.offsetX - label) / cell)];
  canvas.addEventListener('pointermove', (event) => {
    const [r, c] = at(event);
    tip.hidden = !(rows[r] !== undefined && columns[c] !== undefined);
    if (tip.hidden) return;
    fill(tip, `${rows[r]} at t = ${num(columns[c])}: ${values[r][c] === null ? 'not measured' : `${num(values[r][c])} ${unit}`}`);
    tip.style.left = `${Math.min(event.offsetX + 14, width - 260)}px`;
    tip.style.top = `${event.offsetY + 16}px`;
  });
  canvas.addEventListener('pointerleave', () => { tip.hidden = true; });
  canvas.addEventListener('click', (event) => {
    const [r] = at(event);
    if (rows[r] !== undefined) onpick(rows[r]);
  });
  canvas.style.cursor = 'pointer';
}

/** How neighbouring timesteps were merged into groups: the height of a bar is the distance of the two groups. */
function dendrogram(place, {timesteps, merges, boundaries}) {
  const theme = colours();
  const [width, height] = [Math.max(320, Math.min(900, place.clientWidth || 640)), 260];
  const canvas = el('canvas', {role: 'img', 'aria-label': `Dendrogram of ${timesteps.length} timesteps in ${boundaries.length + 1} groups`});
  fill(place, canvas);
  const context = sharp(canvas, width, height);
  const [left, right, top, bottom] = [56, 14, 14, 40];
  const step = (width - left - right) / timesteps.length;
  const x = new Map(timesteps.map((t, i) => [t, left + step * (i + 0.5)]));
  const most = Math.max(...merges.map(([, , distance]) => distance), 0) || 1;
  const y = (distance) => height - bottom - Math.sqrt(Math.max(0, distance) / most) * (height - top - bottom);
  const group = (t) => boundaries.filter((boundary) => t > boundary).length;
  context.lineWidth = 1.5;
  const heads = new Map(timesteps.map((t) => [t, {x: x.get(t), y: height - bottom, members: [t]}]));
  const headOf = (t) => [...heads.values()].find((head) => head.members.includes(t));
  for (const [a, b, distance] of merges) {
    const [one, two] = [headOf(a), headOf(b)];
    if (!one || !two || one === two) continue;
    const at = Math.min(y(distance), one.y, two.y);
    const isWithin = group(one.members[0]) === group(two.members[0]) && one.members.concat(two.members).every((t) => group(t) === group(one.members[0]));
    context.strokeStyle = isWithin ? viridis(0.15 + 0.65 * ((group(one.members[0]) + 0.5) / (boundaries.length + 1))) : theme.faint;
    context.beginPath();
    context.moveTo(one.x, one.y);
    context.lineTo(one.x, at);
    context.lineTo(two.x, at);
    context.lineTo(two.x, two.y);
    context.stroke();
    const merged = {x: (one.x + two.x) / 2, y: at, members: [...one.members, ...two.members]};
    for (const [key, head] of heads) if (head === one || head === two) heads.delete(key);
    heads.set(merged.members[0], merged);
  }
  context.strokeStyle = theme.removed;
  context.setLineDash([4, 4]);
  for (const boundary of boundaries) {
    const before = timesteps.filter((t) => t <= boundary).length;
    const at = left + step * before;
    context.beginPath();
    context.moveTo(at, top);
    context.lineTo(at, height - bottom + 6);
    context.stroke();
  }
  context.setLineDash([]);
  context.fillStyle = theme.soft;
  context.font = `11px ${FONT}`;
  context.textAlign = 'center';
  const every = Math.ceil(34 / step);
  timesteps.forEach((t, i) => { if (i % every === 0) context.fillText(num(t), x.get(t), height - bottom + 16); });
  context.fillText('timestep', left + (width - left - right) / 2, height - 8);
  context.textAlign = 'right';
  for (const share of [0, 0.25, 0.5, 1]) {
    context.fillText(num(most * share, 2), left - 8, y(most * share) + 4);
    context.strokeStyle = theme.line;
    context.lineWidth = 0.5;
    context.beginPath();
    context.moveTo(left - 4, y(most * share));
    context.lineTo(left, y(most * share));
    context.stroke();
  }
}
