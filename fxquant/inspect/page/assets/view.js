'use strict';
// The canvas with the graph: pan, zoom, selection. It draws what scene.js placed, and only what is in sight.

class GraphView {
  /** `onselect(key)` is called when the user selects an item or nothing (null), `ontoggle(path)` to open or close a box. */
  constructor(canvas, {onselect, ontoggle, caption, onmove = () => {}}) {
    Object.assign(this, {canvas, onselect, ontoggle, caption, onmove});
    this.picture = null;
    this.selected = null;
    this.scale = 1;
    this.x = 0;
    this.y = 0;
    this.fitter = new Fitter();
    this.theme = colours();
    this.pending = false;
    canvas.addEventListener('wheel', (event) => this._wheel(event), {passive: false});
    canvas.addEventListener('pointerdown', (event) => this._press(event));
    canvas.addEventListener('pointermove', (event) => this._move(event));
    canvas.addEventListener('pointerup', (event) => this._release(event));
    canvas.addEventListener('pointercancel', () => { this.drag = null; });
    canvas.addEventListener('dblclick', (event) => {
      const item = this._at(event);
      if (item?.box) this.ontoggle(item.box.path);
    });
    new ResizeObserver(() => this.draw()).observe(canvas.parentElement);
  }

  /** Show a picture. If an item called `anchor` was there before, it keeps its place on the screen. */
  show(picture, anchor = null) {
    const [before, after] = [this.picture?.byKey.get(anchor), picture.byKey.get(anchor)];
    if (before && after) {
      this.x += (before.x - after.x) * this.scale;
      this.y += (before.y - after.y) * this.scale;
    }
    this.picture = picture;
    if (!picture.byKey.has(this.selected)) this.selected = null;
    this.draw();
  }

  select(key) {
    this.selected = key;
    this.draw();
  }

  /** Bring an item into sight, at a scale at which it can be read. */
  reveal(key) {
    const item = this.picture.byKey.get(key);
    if (!item) return;
    this.scale = Math.max(this.scale, 0.7);
    const [width, height] = this._size();
    this.x = width / 2 - (item.x + item.width / 2) * this.scale;
    this.y = height / 2 - (item.y + Math.min(item.height, height / this.scale) / 2) * this.scale;
    this.draw();
  }

  /** Fit an item, or the whole picture, into the canvas: all of it, or only its width from its top (`wide`). */
  fit(key = null, wide = false) {
    const item = this.picture.byKey.get(key) ?? {x: 0, y: 0, width: this.picture.width, height: this.picture.height};
    const [width, height] = this._size();
    const across = (width - 40) / item.width;
    this.scale = Math.min(1.15, wide ? Math.max(across, 0.25) : Math.min(across, (height - 40) / item.height));
    this.x = width / 2 - (item.x + item.width / 2) * this.scale;
    this.y = wide ? 24 - item.y * this.scale : height / 2 - (item.y + item.height / 2) * this.scale;
    this.draw();
  }

  /** Zoom around a point of the canvas, its middle by default; `onmove` is told, so that another view can do the same. */
  zoom(factor, x = null, y = null, isTold = true) {
    const [width, height] = this._size();
    const [atX, atY] = [x ?? width / 2, y ?? height / 2];
    const scale = Math.min(3, Math.max(0.03, this.scale * factor));
    this.x = atX - ((atX - this.x) * scale) / this.scale;
    this.y = atY - ((atY - this.y) * scale) / this.scale;
    this.scale = scale;
    this.draw();
    if (isTold) this.onmove(this, (other) => other.zoom(factor, x, y, false));
  }

  pan(x, y, isTold = true) {
    this.x += x;
    this.y += y;
    this.draw();
    if (isTold) this.onmove(this, (other) => other.pan(x, y, false));
  }

  retheme() {
    this.theme = colours();
    this.draw();
  }

  /** Draw before the screen is next shown; several calls draw once. */
  draw() {
    if (this.pending || !this.picture) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.paint();
    });
  }

  paint() {
    const [width, height] = this._size();
    if (!width || !height) return;
    const context = sharp(this.canvas, width, height);
    context.fillStyle = this.theme.paper;
    context.fillRect(0, 0, width, height);
    context.translate(this.x, this.y);
    context.scale(this.scale, this.scale);
    const [left, top] = [-this.x / this.scale, -this.y / this.scale];
    const [right, bottom] = [left + width / this.scale, top + height / this.scale];
    const inSight = (item) => item.x < right && item.x + item.width > left && item.y - 14 < bottom && item.y + item.height > top;
    const {theme, fitter, scale} = this;
    const own = this.selected?.startsWith('n:') ? this.selected.slice(2) : null;
    const near = this._neighbours(own);
    for (const box of this.picture.boxes) if (inSight(box)) drawBox(context, box, theme, fitter, scale, box.key === this.selected);
    for (const line of this.picture.lines) {
      const high = line.points[0][1];
      const low = line.points[line.points.length - 1][1];
      if (Math.max(low, high) < top || Math.min(low, high) > bottom) continue;
      const isOwn = own !== null && (line.sources.includes(own) || line.to === this.selected);
      const colour = isOwn ? theme.accent : line.change ? theme[line.change] : theme.edge;
      drawLine(context, line.points, colour, isOwn ? 2.2 : line.change ? 1.8 : 1.1, line.change === 'removed');
    }
    if (scale >= 0.3) {
      for (const port of this.picture.ports) if (inSight(port)) drawPort(context, port, theme, fitter, port.name === own);
    }
    for (const card of this.picture.cards) {
      if (!inSight(card)) continue;
      drawCard(context, card, theme, fitter, scale, {
        isSelected: card.key === this.selected, isNear: near.has(card.name), caption: this.caption(card.node, card.home),
      });
    }
  }

  _neighbours(name) {
    const card = name === null ? null : this.picture.byKey.get(`n:${name}`);
    if (!card) return new Set();
    const near = new Set(card.node.inputs);
    for (const other of this.picture.cards) if (other.node.inputs.includes(name)) near.add(other.name);
    return near;
  }

  _size() {
    const parent = this.canvas.parentElement;
    return [parent.clientWidth, parent.clientHeight];
  }

  /** The item under the pointer: a card before the boxes around it, an inner box before the outer ones. */
  _at(event) {
    const x = (event.offsetX - this.x) / this.scale;
    const y = (event.offsetY - this.y) / this.scale;
    const hit = (item) => x >= item.x && x <= item.x + item.width && y >= item.y && y <= item.y + item.height;
    const {cards, ports, boxes} = this.picture;
    return cards.find(hit) ?? ports.find(hit) ?? boxes.findLast(hit) ?? null;
  }

  _wheel(event) {
    event.preventDefault();
    if (event.ctrlKey || event.metaKey || !event.shiftKey) {
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0015)), event.offsetX, event.offsetY);
    } else {
      this.pan(-event.deltaX || -event.deltaY, 0);
    }
  }

  _press(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.drag = {x: event.clientX, y: event.clientY, moved: false};
  }

  _move(event) {
    if (!this.drag) {
      this.canvas.style.cursor = this.picture && this._at(event) ? 'pointer' : 'grab';
      return;
    }
    const [x, y] = [event.clientX - this.drag.x, event.clientY - this.drag.y];
    if (!this.drag.moved && Math.hypot(x, y) < 4) return;
    this.drag = {x: event.clientX, y: event.clientY, moved: true};
    this.pan(x, y);
  }

  _release(event) {
    const drag = this.drag;
    this.drag = null;
    if (!drag || drag.moved) return;
    const item = this._at(event);
    if (item?.box && this._isOnHandle(event, item)) {
      this.ontoggle(item.box.path);
      return;
    }
    this.onselect(item ? (item.box ? item.key : `n:${item.name}`) : null);
  }

  /** Whether the pointer is on the triangle of a box. */
  _isOnHandle(event, item) {
    const x = (event.offsetX - this.x) / this.scale - item.x;
    const y = (event.offsetY - this.y) / this.scale - item.y;
    return x < 26 && y < 30;
  }
}
