'use strict';
// Starts the page: reads the data, makes the tabs, and connects keys and buttons.

const KEYS = [['/', 'search'], ['[ ]  or  , .', 'previous or next pass'], ['n  p', 'next or previous change of the pass'],
  ['u  d', 'first input or first reader of the selected node'], ['Enter', 'open or close the selected module'],
  ['c', 'close all modules'], ['0', 'fit'], ['+  −', 'zoom; also the wheel of the mouse'], ['arrows', 'pan, while the graph has the focus'],
  ['1 … 8', 'tabs'], ['t', 'light or dark'], ['Esc', 'select nothing'], ['?', 'this list']];

class App {
  constructor(data) {
    this.models = data.models.map((entry) => new Model(entry));
    this.tab = 'graph';
    this._theme(this._wanted());
    this.graphTab = new GraphTab(this.models, (name) => this.openLayer(name));
    this.tabs = [
      ['graph', 'Graph', null], ['layers', 'Layers', layersPanel], ['errors', 'Errors', errorsPanel],
      ['salience', 'Salience', saliencePanel], ['timesteps', 'Timesteps', timestepsPanel],
      ['absorption', 'Absorption', absorptionPanel], ['passes', 'Passes', passesPanel],
    ];
    if (this.models.length > 1) this.tabs.push(['compare', 'Compare', comparePanel]);
    fill(byId('tabs'), this.tabs.map(([id, title]) => el('button', {type: 'button', role: 'tab', id: `tab-${id}`, onclick: () => this.show(id)}, title)));
    byId('theme').addEventListener('click', () => this.toggleTheme());
    byId('help').addEventListener('click', () => this.showKeys());
    document.addEventListener('keydown', (event) => this._key(event));
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => { if (!this.chosenTheme) this._theme(this._wanted()); });
    this._pickers();
    this._title();
    this.show('graph');
  }

  get model() { return this.graphTab.model; }

  get details() { return this.graphTab.details; }

  show(id, chosen = null) {
    this.tab = id;
    const isGraph = id === 'graph';
    byId('graph').hidden = !isGraph;
    byId('panel').hidden = isGraph;
    this.tabs.forEach(([name]) => byId(`tab-${name}`).setAttribute('aria-selected', String(name === id)));
    if (isGraph) {
      this.graphTab.views.forEach((view) => view.draw());
      return;
    }
    byId('panel').setAttribute('aria-label', this.tabs.find(([name]) => name === id)[1]);
    byId('panel').scrollTop = 0;
    this.tabs.find(([name]) => name === id)[2](byId('panel'), this, chosen);
  }

  /** Show a layer in the graph. */
  goLayer(name) {
    this.show('graph');
    this.graphTab.goLayer(name);
  }

  /** Show the salience of a layer, or else its timesteps. */
  openLayer(name) {
    const layers = this.model.salience.layers ?? {};
    const observed = this.model.layerByName.get(name)?.observed;
    const found = [name, observed].find((key) => key && key in layers);
    this.show(found || this.model.salience.missing === undefined ? 'salience' : 'timesteps', found ?? name);
  }

  _pickers() {
    const {graphs, calls} = this.model;
    const choices = [];
    if (this.models.length > 1) {
      const select = el('select', {'aria-label': 'Model', onchange: () => { this.graphTab.setModel(Number(select.value)); this._title(); if (this.tab !== 'graph') this.show(this.tab); }},
        this.models.map((model, i) => el('option', {value: i}, model.name)));
      choices.push(select);
    }
    if (graphs.length > 1) {
      const select = el('select', {'aria-label': 'Kind of call', onchange: () => this.graphTab.setGraph(Number(select.value))},
        graphs.map((graph, i) => el('option', {value: i}, `call ${i + 1}: ${graph.call}`)));
      choices.push(select);
    }
    if (calls > graphs.length) {
      const why = `The page shows the graphs of the first ${graphs.length} of ${calls} kinds of call; fxquant inspect --graph N shows another one.`;
      choices.push(el('span', {title: why}, `${graphs.length} of ${calls} kinds of call`));
    }
    fill(byId('pickers'), choices);
  }

  _title() {
    const {model} = this;
    byId('title').textContent = [...new Set([model.model_class.split(':').pop(), model.name, model.backend])].join(' · ');
  }

  // --- light and dark ---

  _wanted() { return matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'; }

  _theme(name) {
    document.documentElement.dataset.theme = name;
    this.graphTab?.retheme();
    if (this.tab !== 'graph') this.show(this.tab);
  }

  toggleTheme() {
    this.chosenTheme = document.documentElement.dataset.theme === 'dark' ? 'light' : 'dark';
    this._theme(this.chosenTheme);
  }

  // --- keys ---

  showKeys() {
    const dialog = byId('keys');
    fill(dialog, el('h1', {}, 'Keys'), el('dl', {}, KEYS.map(([key, text]) => [el('dt', {}, el('kbd', {}, key)), el('dd', {}, text)])),
      el('p', {}, el('button', {type: 'button', onclick: () => dialog.close()}, 'Close')));
    dialog.showModal();
  }

  _key(event) {
    const isTyping = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== 'checkbox';
    if (isTyping || event.ctrlKey || event.metaKey || event.altKey || byId('keys').open) return;
    if (event.key === '?') this.showKeys();
    else if (event.key === 't') this.toggleTheme();
    else if (/^[1-9]$/.test(event.key) && this.tabs[Number(event.key) - 1]) this.show(this.tabs[Number(event.key) - 1][0]);
    else if (this.tab === 'graph') this.graphTab.key(event);
    else if (event.key === '/') { this.show('graph'); byId('search').focus(); event.preventDefault(); }
  }
}

const page = new App(JSON.parse(byId('data').textContent));
requestAnimationFrame(() => { page.ready = performance.now(); });  // Milliseconds from opening the file to the first picture.
