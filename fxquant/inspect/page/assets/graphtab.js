'use strict';
// The tab with the graph: steps, tree, canvas and details belong together here.

/** The short name of a pass: its text without options. */
const passName = (text) => text.replace(/\{.*$/s, '');

class GraphTab {
  constructor(models, openLayer) {
    this.models = models;
    this.which = 0;  // Number of the model that the steps, the tree and the details show.
    this.number = 0;  // Number of the graph, one per kind of call.
    this.step = 0;
    this.open = new Set(['']);
    this.showRemoved = true;
    this.openLayer = openLayer;
    this.layouts = new Layouts();
    this.timings = {};
    this.views = [this._view(byId('views').querySelector('canvas'), 0)];
    this.details = new Details(byId('details'), this);
    this.search = new Search(byId('search'), byId('results'), (key) => this.reach(key));
    this._tools();
    this._start();
  }

  get model() { return this.models[this.which]; }

  get graph() { return this._graphOf(this.model); }

  get view() { return this.views[Math.min(this.which, this.views.length - 1)]; }

  get selected() { return this.view.selected; }

  /** The modules of the graph after the step. */
  get tree() { return treeOf(this.graph.drawn(this.step, this.showRemoved)); }

  _graphOf(model) { return model.graphs[Math.min(this.number, model.graphs.length - 1)]; }

  _view(canvas, which) {
    const view = new GraphView(canvas, {
      caption: captionOf,
      onselect: (key) => { this._focus(which); this.choose(key); },
      ontoggle: (path) => { this._focus(which); this.toggle(path); },
      onmove: (from, move) => this.views.forEach((other) => other !== from && move(other)),
    });
    canvas.addEventListener('keydown', (event) => this._key(event));
    return view;
  }

  /** In the split view, steps and details follow the side that was clicked last. */
  _focus(which) {
    if (this.views.length > 1 && this.which !== which) this.setModel(which, false);
  }

  /** Open on the last pass that changed the graph, with the first block open. */
  _start() {
    this.step = this._lastChange();
    const first = this._firstBlock();
    if (first) this.open = new Set(['', ...this._withParts(first)]);
    this.refresh(null);
    this.view.fit(first ? `b:${first}` : null, true);
    this.details.show(null);
  }

  _lastChange() {
    for (let step = this.graph.steps.length - 1; step > 0; step--) if (this.graph.steps[step].edits) return step;
    return 0;
  }

  _firstBlock() {
    const boxes = boxesIn(this.tree.root);
    return (boxes.find((box) => /\.0$/.test(box.path)) ?? boxes[0])?.path ?? null;
  }

  /** A box with the boxes directly inside it. */
  _withParts(path) {
    return [path, ...boxesIn(this.tree.boxes.get(path)).map((child) => child.path)];
  }

  /** Compute the picture anew and show it. */
  refresh(anchor = null) {
    const began = performance.now();
    this.views.forEach((view, i) => {
      const model = this.views.length > 1 ? this.models[i] : this.model;
      const graph = this._graphOf(model);
      const same = model === this.model ? this.step : this._sameStep(graph);
      const drawn = graph.drawn(same >= 0 ? same : Math.min(this.step, graph.steps.length - 1), this.showRemoved);
      const picture = scene(drawn, (path) => this.open.has(path), this.layouts);
      if (model === this.model) [this.picture, this.drawn] = [picture, drawn];
      view.show(picture, anchor);
    });
    const {picture, drawn} = this;
    this.search.use(() => entriesOf(picture.tree, drawn));
    this._steps();
    this._tree();
    this.timings.refresh = performance.now() - began;
  }

  /** The step of the graph of another model that shows the same pass as the step of this one; -1 if there is none. */
  _sameStep(graph) {
    const name = passName(this.graph.steps[this.step].pass);
    return graph.steps.findIndex((entry) => passName(entry.pass) === name);
  }

  /** Show another model; what is selected in it keeps its place, if `isAnchored`. */
  setModel(which, isAnchored = true) {
    const same = this._sameStep(this._graphOf(this.models[which]));
    this.which = which;
    this.step = same >= 0 ? same : this._lastChange();
    this.refresh(isAnchored ? this.selected : null);
    this.details.show(this.selected);
  }

  setGraph(number) {
    this.number = number;
    this.step = this._lastChange();
    this.refresh();
    this.view.fit();
    this.details.show(null);
  }

  /** Show the graph after another pass; what is selected, or the open block, keeps its place. */
  setStep(step) {
    const last = this.graph.steps.length - 1;
    this.step = Math.min(last, Math.max(0, step));
    const openBlock = [...this.open].find((path) => path);
    this.refresh(this.selected ?? (openBlock ? `b:${openBlock}` : null));
    this.details.show(this.selected);
  }

  /** Open a box, and close those beside it; or close it. */
  toggle(path) {
    const began = performance.now();
    if (this.open.has(path)) {
      this.open = new Set([...this.open].filter((other) => other !== path && !other.startsWith(`${path}.`)));
    } else {
      const box = this.picture.tree.boxes.get(path);
      if (!box) return;
      const above = chain(box).map((at) => at.path);
      const beside = boxesIn(box.parent).filter((child) => child !== box).map((child) => child.path);
      const isTop = box.parent.path === '';
      const kept = [...this.open].filter((other) => !isTop || !beside.some((path) => other === path || other.startsWith(`${path}.`)));
      this.open = new Set([...kept, ...above, ...this._withParts(path)]);
    }
    this.refresh(`b:${path}`);
    this.views.forEach((view) => view.paint());
    this.timings.open = performance.now() - began;
  }

  closeAll() {
    this.open = new Set(['']);
    this.refresh();
    this.views.forEach((view) => view.fit(null, true));
  }

  choose(key) {
    if (key?.startsWith('n:') && !this.picture.byKey.has(key)) { this.reach(key); return; }
    this.view.select(key);
    this.details.show(key);
    this._tree();
  }

  /** Open the boxes around an item, bring it into sight and select it. */
  reach(key) {
    const name = key.slice(2);
    const box = key.startsWith('b:') ? this.picture.tree.boxes.get(name) : this.picture.tree.homes.get(name);
    if (!box) return;
    const path = box.path;
    if (path && !this.open.has(path)) {
      const top = chain(box)[1].path;
      if (!this.open.has(top)) this.toggle(top);
      this.open = new Set([...this.open, ...chain(box).map((at) => at.path)]);
      this.refresh(null);
    }
    this.choose(key);
    this.views.forEach((view) => (key.startsWith('b:') ? view.fit(key, true) : view.reveal(key)));
  }

  go(name) { this.reach(`n:${name}`); }

  /** Go to the node that does the work of a layer. */
  goLayer(layer) {
    const nodes = [...this.graph.snapshot(this.step).nodes.values()].filter((node) => node.layer === layer);
    const node = nodes.find((found) => kindOf(found) === 'product') ?? nodes[0];
    if (node) this.go(node.name);
  }

  /** Go to the next or the previous node that the pass changed. */
  nextChange(direction) {
    const names = [...this.graph.changes(this.step).keys()].filter((name) => this.drawn.has(name));
    if (!names.length) return;
    const at = names.indexOf(this.selected?.slice(2));
    this.reach(`n:${names[(at + direction + names.length) % names.length]}`);
  }

  split(isSplit) {
    byId('views').querySelectorAll('.view + .view').forEach((node) => node.remove());
    this.views.length = 1;
    if (isSplit) {
      const canvas = el('canvas', {tabindex: 0, 'aria-label': 'Graph of the second model'});
      const second = el('div', {class: 'view'}, canvas);
      byId('views').insertBefore(second, byId('tools'));
      this.views.push(this._view(canvas, 1));
    }
    byId('views').querySelectorAll('.view').forEach((node, i) => {
      node.querySelector('.label')?.remove();
      if (isSplit) node.append(el('span', {class: 'label'}, this.models[i].name));
    });
    this.refresh();
    const openBlock = [...this.open].find((path) => path);
    this.views.forEach((view) => view.fit(openBlock ? `b:${openBlock}` : null, true));
  }

  retheme() { this.views.forEach((view) => view.retheme()); }

  _steps() {
    fill(byId('steps'), this.graph.steps.map((step, i) => {
      const marks = this.graph.changeCounts(i).map(([kind, count]) => el('span', {class: kind}, `${MARKS[kind]}${count}`));
      return el('button', {type: 'button', 'aria-pressed': i === this.step ? 'true' : 'false', class: i && !step.edits ? 'idle' : '',
        title: step.pass, onclick: () => this.setStep(i)},
      el('span', {}, `${i} ${step.name}`), el('small', {}, marks));
    }));
    byId('steps').querySelector('[aria-pressed="true"]')?.scrollIntoView({block: 'nearest', inline: 'nearest'});
  }

  _tree() {
    const rows = [];
    const walk = (box) => {
      for (const child of boxesIn(box)) {
        const counts = this.picture.counts.get(child.path);
        const up = child.parent.path ? `${child.parent.path}.` : '';
        rows.push(el('button', {type: 'button', title: child.path, class: this.selected === `b:${child.path}` ? 'selected' : '',
          style: {paddingLeft: `${4 + 12 * (child.depth - 1)}px`},
          onclick: () => this.reach(`b:${child.path}`)},
        el('span', {}, this.open.has(child.path) ? '▾' : '▸'), el('span', {class: 'path'}, this._short(child.path.slice(up.length), counts)),
        Object.keys(MARKS).filter((kind) => counts?.[kind]).map((kind) => el('small', {class: kind}, `${MARKS[kind]}${counts[kind]}`))));
        if (this.open.has(child.path)) walk(child);
      }
    };
    walk(this.picture.tree.root);
    fill(byId('tree'), rows.length ? rows : el('small', {}, 'No modules to fold.'));
  }

  /** The name of a module, short enough for the tree beside the counts of changes. */
  _short(name, counts) {
    const kinds = Object.values(counts ?? {}).filter(Boolean).length;
    const room = 24 - 4 * kinds;
    return name.length > room ? middleCut(name, room) : name;
  }

  _tools() {
    const removed = el('input', {type: 'checkbox', onchange: () => { this.showRemoved = removed.checked; this.refresh(this.selected); }});
    removed.checked = true;
    const split = el('input', {type: 'checkbox', onchange: () => this.split(split.checked)});
    const button = (text, title, action) => el('button', {type: 'button', title, 'aria-label': title, onclick: action}, text);
    fill(byId('tools'), el('label', {title: 'Show nodes that the pass removed'}, removed, 'removed nodes'),
      this.models.length > 1 ? el('label', {title: 'Both models side by side'}, split, 'side by side') : null,
      button('⤢', 'Fit (0)', () => this.view.fit()), button('−', 'Zoom out', () => this.view.zoom(1 / 1.3)),
      button('+', 'Zoom in', () => this.view.zoom(1.3)), button('▸▸', 'Close all modules (c)', () => this.closeAll()));
    fill(byId('legend'), Object.entries(MEANINGS).map(([kind, text]) => el('div', {}, el('b', {class: kind}, MARKS[kind]), text)),
      Object.entries(KINDS).map(([kind, text]) => el('div', {}, el('i', {style: {background: `var(--${kind})`}}), text)));
  }

  /** Keys on the canvas. */
  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const pan = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]}[event.key];
    if (pan) this.view.pan(...pan);
    else if (event.key === 'Enter' && this.selected?.startsWith('b:')) this.toggle(this.selected.slice(2));
    else return;
    event.preventDefault();
  }

  /** Keys anywhere in the tab. */
  key(event) {
    const actions = {
      '[': () => this.setStep(this.step - 1), ']': () => this.setStep(this.step + 1), ',': () => this.setStep(this.step - 1),
      '.': () => this.setStep(this.step + 1), '+': () => this.view.zoom(1.3), '=': () => this.view.zoom(1.3), '-': () => this.view.zoom(1 / 1.3),
      0: () => this.view.fit(), n: () => this.nextChange(1), p: () => this.nextChange(-1), c: () => this.closeAll(),
      Escape: () => this.choose(null), '/': () => byId('search').focus(),
      u: () => this._step('inputs'), d: () => this._step('readers'),
    };
    const action = actions[event.key];
    if (action) { action(); event.preventDefault(); }
  }

  /** Select the first input or the first reader of the selected node. */
  _step(side) {
    if (!this.selected?.startsWith('n:')) return;
    const name = this.selected.slice(2);
    const {nodes, readers} = this.graph.snapshot(this.step);
    const [next] = side === 'inputs' ? nodes.get(name)?.inputs ?? [] : readers.get(name) ?? [];
    if (next) this.go(next);
  }
}
