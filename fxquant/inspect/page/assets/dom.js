'use strict';
// Small helpers for the document. Text from the data enters the page through `textContent` only, never as markup.

/** Make an element: `el('div', {class: 'row', onclick: f}, 'text', child, ...)`. Null children are left out. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else if (name === 'style') Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? '' : String(value));
  }
  append(node, children);
  return node;
}

/** Append text and elements; lists are flattened. */
function append(node, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
}

/** Replace all children of an element. */
function fill(node, ...children) {
  node.replaceChildren();
  append(node, children);
  return node;
}

const byId = (id) => document.getElementById(id);

/** A number for people: at most `digits` significant digits, thousands not in scientific notation. */
function num(value, digits = 4) {
  if (value === null || value === undefined) return '';
  if (typeof value !== 'number') return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e6) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(digits)));
}

const db = (value) => (typeof value === 'number' ? value.toFixed(1) : value ?? '');

/** Bytes with a unit, in powers of 1024. */
function bytes(count) {
  if (count === null || count === undefined) return '';
  const units = ['B', 'KiB', 'MiB', 'GiB'];
  let value = count;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[unit]}`;
}

/** `1 edit`, `2 edits`. */
const plural = (count, noun) => `${count} ${noun}${count === 1 ? '' : 's'}`;

/** A table whose head sorts when it is clicked. `columns`: {title, cell, sort, number, class}; `rows`: any values. */
function sortedTable(columns, rows, {onrow = null, sortBy = null, descending = false} = {}) {
  let order = sortBy;
  let down = descending;
  const body = el('tbody');
  const heads = columns.map((column, index) => el('th', {
    class: column.number ? 'number' : '', scope: 'col', tabindex: 0, title: column.help ?? 'Sort by this column',
    onclick: () => sort(index), onkeydown: (event) => event.key === 'Enter' && sort(index),
  }, column.title));
  const keyOf = (row) => (columns[order].sort ?? columns[order].cell)(row);
  const compare = (left, right) => {
    const [a, b] = [keyOf(left), keyOf(right)];
    const [noA, noB] = [a === null || a === undefined || a === '', b === null || b === undefined || b === ''];
    if (noA || noB) return noA - noB;  // Rows without a value stay at the end, in both directions.
    const sign = typeof a === 'number' && typeof b === 'number' ? a - b : String(a).localeCompare(String(b), 'en', {numeric: true});
    return down ? -sign : sign;
  };
  function show() {
    const sorted = order === null ? rows : [...rows].sort(compare);
    heads.forEach((head, index) => {
      head.setAttribute('aria-sort', index !== order ? 'none' : down ? 'descending' : 'ascending');
    });
    fill(body, sorted.map((row) => el('tr', {
      class: onrow ? 'link' : '', tabindex: onrow ? 0 : null,
      onclick: onrow && (() => onrow(row)), onkeydown: onrow && ((event) => event.key === 'Enter' && onrow(row)),
    }, columns.map((column) => {
      const value = column.cell(row);
      const tone = column.tone ? column.tone(row) : '';
      return el('td', {class: `${column.number ? 'number' : ''} ${column.class ?? ''} ${tone}`.trim()}, value);
    }))));
  }
  function sort(index) {
    down = order === index ? !down : Boolean(columns[index].number);
    order = index;
    show();
  }
  show();
  return el('table', {class: 'data'}, el('thead', {}, el('tr', {}, heads)), body);
}

/** The value of a colour variable of the style sheet, for drawing on a canvas. */
function colours() {
  const style = getComputedStyle(document.documentElement);
  const found = {};
  for (const name of ['paper', 'panel', 'ink', 'soft', 'faint', 'line', 'accent', 'card', 'added', 'removed', 'rewired',
    'tensor', 'box', 'box-line', 'edge', 'product', 'quantize', 'weight', 'scale', 'other', 'input']) {
    found[name] = style.getPropertyValue(`--${name}`).trim();
  }
  return found;
}

/** Fit a canvas to its box at the resolution of the screen; returns its context in CSS pixels. */
function sharp(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.max(1, Math.round(width * ratio));
  canvas.height = Math.max(1, Math.round(height * ratio));
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext('2d');
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}
