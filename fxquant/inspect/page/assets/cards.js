'use strict';
// Draws the parts of the picture of a graph on a canvas.

const MARKS = {added: '+', removed: '−', rewired: '↻', tensor: '◆'};
const MEANINGS = {
  added: 'added by this pass', removed: 'removed by this pass', rewired: 'reads other inputs or arguments',
  tensor: 'reads a tensor that this pass changed',
};
const FONT = 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif';
const MONO = 'ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace';

/** The kind of work that a node does; it decides the colour of the stripe on its card. */
function kindOf(node) {
  if (node.op === 'input' || node.op === 'output') return 'input';
  if (/channel_affine/.test(node.op)) return 'scale';
  if (/(^|::)quantize/.test(node.op)) return 'quantize';
  if (/dequantize/.test(node.op)) return 'weight';
  if (/linear|matmul|bmm|conv|attention|addmm|(^|\.)mm\b|embedding/.test(node.op)) return 'product';
  return 'other';
}

const KINDS = {
  product: 'matrix products, convolutions, attention, embeddings', quantize: 'quantizes an activation',
  weight: 'restores a weight from its codes', scale: 'multiplies or shifts channels', input: 'input or output of the model',
  other: 'everything else',
};

/** The beginning and the end of a text, `length` characters together. */
function middleCut(text, length) {
  const head = Math.floor(length * 0.35);
  return `${text.slice(0, head)}…${text.slice(text.length - (length - head))}`;
}

/** Shortens text to a width, with an ellipsis; remembers what it measured. */
class Fitter {
  constructor() {
    this.known = new Map();
  }

  /** `isPath`: leave out the middle, because the end of a path says most and its beginning tells lists apart. */
  fit(context, text, width, isPath = false) {
    const key = `${context.font}|${width}|${isPath}|${text}`;
    const found = this.known.get(key);
    if (found !== undefined) return found;
    const cut = (length) => (isPath ? middleCut(text, length) : `${text.slice(0, length)}…`);
    let shown = text;
    if (context.measureText(text).width > width) {
      let [low, high] = [0, text.length];
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (context.measureText(cut(middle)).width <= width) low = middle;
        else high = middle - 1;
      }
      shown = cut(low);
    }
    if (this.known.size > 20000) this.known.clear();
    this.known.set(key, shown);
    return shown;
  }
}

function roundRect(context, x, y, width, height, radius) {
  context.beginPath();
  context.roundRect(x, y, width, height, radius);
}

/** One line between items: straight where it passes items, curved in between, with a head. */
function drawLine(context, points, colour, width, dashed) {
  context.strokeStyle = colour;
  context.fillStyle = colour;
  context.lineWidth = width;
  context.setLineDash(dashed ? [5, 4] : []);
  context.beginPath();
  context.moveTo(...points[0]);
  for (let i = 1; i < points.length; i++) {
    const [fromX, fromY] = points[i - 1];
    const [x, y] = points[i];
    if (Math.abs(fromX - x) < 0.5) context.lineTo(x, y);
    else context.bezierCurveTo(fromX, (fromY + y) / 2, x, (fromY + y) / 2, x, y);
  }
  context.stroke();
  context.setLineDash([]);
  const [x, y] = points[points.length - 1];
  const back = y > points[points.length - 2][1] ? -6 : 6;
  context.beginPath();
  context.moveTo(x, y);
  context.lineTo(x - 3, y + back);
  context.lineTo(x + 3, y + back);
  context.fill();
}

/** The card of one node. */
function drawCard(context, card, theme, fitter, scale, {isSelected, isNear, caption}) {
  const tone = card.change ? theme[card.change] : null;
  const top = card.named.length ? card.y + 14 : card.y;
  const height = card.y + card.height - top;
  context.globalAlpha = card.change === 'removed' ? 0.75 : 1;
  roundRect(context, card.x, top, card.width, height, 6);
  context.fillStyle = theme.card;
  context.fill();
  if (tone) {
    context.globalAlpha *= 0.16;
    context.fillStyle = tone;
    context.fill();
    context.globalAlpha = 1;
  }
  context.lineWidth = isSelected ? 3 : tone ? 2 : 1;
  context.strokeStyle = isSelected ? theme.accent : tone ?? (isNear ? theme.accent : theme.line);
  context.setLineDash(card.change === 'removed' ? [5, 4] : []);
  context.stroke();
  context.setLineDash([]);
  context.fillStyle = theme[kindOf(card.node)];
  roundRect(context, card.x + 4, top + 6, 4, height - 12, 2);
  context.fill();
  if (scale < 0.22) return;
  const left = card.x + 14;
  const room = card.width - 20;
  context.textAlign = 'left';
  context.fillStyle = theme.ink;
  if (scale < 0.5) {  // From afar: only the op, in large letters.
    context.textBaseline = 'middle';
    context.font = `600 ${Math.min(21, 9.5 / scale)}px ${FONT}`;
    context.fillText(fitter.fit(context, caption.title, room), left, top + height / 2);
    return;
  }
  context.textBaseline = 'alphabetic';
  context.font = `600 12px ${FONT}`;
  const mark = tone ? 16 : 0;
  context.fillText(fitter.fit(context, caption.title, room - mark), left, top + 15);
  if (tone) {
    context.fillStyle = tone;
    context.font = `700 13px ${FONT}`;
    context.textAlign = 'right';
    context.fillText(MARKS[card.change], card.x + card.width - 7, top + 15);
    context.textAlign = 'left';
  }
  context.font = `10.5px ${FONT}`;
  context.fillStyle = theme.soft;
  context.fillText(fitter.fit(context, caption.place, room, true), left, top + 28);
  context.font = `10px ${MONO}`;
  context.fillText(fitter.fit(context, caption.value, room), left, top + 40);
  if (card.named.length) drawNames(context, card, theme, fitter);
}

/** Names of values that come without a line, above an item. */
function drawNames(context, item, theme, fitter) {
  context.font = `9.5px ${MONO}`;
  context.fillStyle = theme.faint;
  context.textAlign = 'left';
  context.fillText(fitter.fit(context, `← ${item.named.join(', ')}`, item.width - 4), item.x + 2, item.y + (item.box ? -4 : 9));
}

/** A box: the frame of an open module, or a closed module with what a pass changed inside. */
function drawBox(context, entry, theme, fitter, scale, isSelected) {
  const {x, y, width, height, box, isOpen, change} = entry;
  roundRect(context, x, y, width, height, 8);
  context.fillStyle = isOpen ? theme.box : theme.panel;
  context.fill();
  context.lineWidth = isSelected ? 3 : 1.2;
  context.strokeStyle = isSelected ? theme.accent : theme['box-line'];
  context.stroke();
  if (scale < 0.12) return;
  const up = box.parent.path ? `${box.parent.path}.` : '';
  const title = box.path.startsWith(up) ? box.path.slice(up.length) : box.path;
  context.textAlign = 'left';
  context.textBaseline = 'alphabetic';
  context.fillStyle = theme.ink;
  const big = Math.min(24, Math.max(12.5, 8.5 / scale));
  context.font = `600 ${big}px ${FONT}`;
  context.fillText(fitter.fit(context, `${isOpen ? '▾' : '▸'} ${title}`, width - (isOpen ? 120 : 20), true), x + 10, y + 20);
  if (scale < 0.3) return;
  context.font = `10.5px ${FONT}`;
  context.fillStyle = theme.soft;
  const count = plural(box.size, 'node');
  if (!isOpen) context.fillText(count, x + 10, y + 39);
  if (entry.named?.length) drawNames(context, {...entry, box}, theme, fitter);
  let right = x + width - 10;
  context.textAlign = 'right';
  context.font = `600 11px ${FONT}`;
  for (const kind of ['tensor', 'rewired', 'removed', 'added']) {
    if (!change?.[kind]) continue;
    const text = `${MARKS[kind]}${change[kind]}`;
    context.fillStyle = theme[kind];
    context.fillText(text, right, isOpen ? y + 20 : y + 39);
    right -= context.measureText(text).width + 8;
  }
}

/** A port: the name of a value that enters or leaves an open box. */
function drawPort(context, port, theme, fitter, isNear) {
  roundRect(context, port.x, port.y, port.width, port.height, port.height / 2);
  context.fillStyle = theme.paper;
  context.fill();
  context.lineWidth = 1;
  context.strokeStyle = isNear ? theme.accent : theme['box-line'];
  context.stroke();
  context.font = `9.5px ${MONO}`;
  context.textAlign = 'center';
  context.textBaseline = 'middle';
  context.fillStyle = theme.soft;
  context.fillText(fitter.fit(context, port.name, port.width - 12), port.x + port.width / 2, port.y + port.height / 2 + 0.5);
}
