'use strict';
// The search field: nodes, layers, modules and ops of the graph that is shown.

const MOST_RESULTS = 60;

/** Entries that hold all words of the query; entries whose name begins with it come first. */
function searchEntries(entries, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return {found: [], total: 0};
  const ranked = [[], [], []];
  let total = 0;
  for (const entry of entries) {
    if (!words.every((word) => entry.text.includes(word))) continue;
    total++;
    const rank = entry.title.toLowerCase().startsWith(words[0]) ? 0 : entry.title.toLowerCase().includes(words[0]) ? 1 : 2;
    if (ranked[rank].length < MOST_RESULTS) ranked[rank].push(entry);
  }
  return {found: ranked.flat().slice(0, MOST_RESULTS), total};
}

/** What can be found in a picture: its modules and its nodes. */
function entriesOf(tree, drawn) {
  const entries = [];
  for (const box of tree.boxes.values()) {
    if (box.path) entries.push({key: `b:${box.path}`, title: box.path, about: `module, ${plural(box.size, 'node')}`, text: box.path.toLowerCase()});
  }
  for (const [name, {node, change}] of drawn) {
    const place = node.layer ?? node.module;
    const text = `${name} ${node.op} ${place} ${node.role ?? ''} ${node.dtype ?? ''} ${change ?? ''} ${node.tensors.join(' ')}`;
    entries.push({key: `n:${name}`, title: place || name, about: `${node.op} · ${name}`, text: text.toLowerCase()});
  }
  return entries;
}

class Search {
  /** `choose(key)` is called with the entry that the user picks. */
  constructor(input, list, choose) {
    Object.assign(this, {input, list, choose});
    this.source = () => [];  // Makes what can be found, when it is first needed.
    this.found = [];
    this.at = 0;
    this.entries = null;
    input.addEventListener('input', () => this.run());
    input.addEventListener('keydown', (event) => this._key(event));
  }

  /** Search in other entries from now on. */
  use(source) {
    this.source = source;
    this.entries = null;
  }

  run() {
    this.entries ??= this.source();
    const {found, total} = searchEntries(this.entries, this.input.value);
    this.found = found;
    this.at = 0;
    this.list.hidden = !this.input.value.trim();
    const more = total > found.length ? el('div', {}, el('small', {}, `and ${total - found.length} more; type more words`)) : null;
    fill(this.list, found.length ? found.map((entry, i) => el('div', {role: 'option', 'aria-selected': i === 0 ? 'true' : 'false',
      onclick: () => this.choose(entry.key)}, el('span', {}, entry.title), el('small', {}, entry.about)))
      : el('div', {}, el('small', {}, 'Nothing has this name at this step.')), more);
  }

  _key(event) {
    if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
      event.preventDefault();
      const rows = this.list.querySelectorAll('[role="option"]');
      rows[this.at]?.setAttribute('aria-selected', 'false');
      this.at = Math.min(Math.max(0, this.at + (event.key === 'ArrowDown' ? 1 : -1)), rows.length - 1);
      rows[this.at]?.setAttribute('aria-selected', 'true');
      rows[this.at]?.scrollIntoView({block: 'nearest'});
    } else if (event.key === 'Enter' && this.found[this.at]) {
      this.choose(this.found[this.at].key);
    } else if (event.key === 'Escape') {
      this.input.value = '';
      this.run();
      this.input.blur();
    }
  }
}
