// Search as you type: symbols first, each opening at its line, then pages by their words.
const root = document.getElementById("search-script").dataset.root;
const input = document.getElementById("search");
const results = document.getElementById("results");
const SYMBOLS_SHOWN = 12;
const PAGES_SHOWN = 8;

const shards = new Map();
let words;
let round = 0;

const shardOf = (name) => {
  const key = name.replace(/^[_.~]+/, "").toLowerCase().slice(0, 2);
  return /^[a-z0-9]{2}$/.test(key) ? key : "other";
};

const loadShard = (key) => {
  if (!shards.has(key)) {
    shards.set(key, fetch(`${root}_symbols/${key}.json`).then((r) => (r.ok ? r.json() : []), () => []));
  }
  return shards.get(key);
};

const rank = (name, term) => {
  if (name === term) return 0;
  const lower = name.toLowerCase();
  const wanted = term.toLowerCase();
  if (lower === wanted) return 1;
  if (lower.startsWith(wanted)) return 2;
  return lower.includes(wanted) ? 3 : -1;
};

const findSymbols = async (term) => {
  const last = term.split(/\.|::/).pop() || term;
  const found = (await loadShard(shardOf(last)))
    .map((symbol) => ({ symbol, at: rank(symbol[0], last) }))
    .filter(({ symbol, at }) => at >= 0 && symbol[1].toLowerCase().includes(term.toLowerCase()));
  found.sort((a, b) => a.at - b.at || a.symbol[0].length - b.symbol[0].length || (a.symbol[1] < b.symbol[1] ? -1 : 1));
  return found.slice(0, SYMBOLS_SHOWN).map(({ symbol: [, qualname, kind, path, line, url] }) => ({
    title: qualname,
    note: `${kind} · ${path}:${line}`,
    url: `${root}${url}#L${line}`,
  }));
};

const findPages = async (term) => {
  words ??= import(new URL(`${root}_pagefind/pagefind.js`, document.baseURI)).catch(() => null);
  const engine = await words;
  const found = engine ? await engine.search(term) : null;
  if (!found) return [];
  const pages = await Promise.all(found.results.slice(0, PAGES_SHOWN).map((r) => r.data()));
  return pages.map((page) => ({
    title: page.meta.title || page.url,
    excerpt: page.excerpt,
    url: page.url,
  }));
};

const row = ({ title, note, excerpt, url }) => {
  const link = document.createElement("a");
  link.href = url;
  const head = document.createElement("b");
  head.textContent = title;
  link.append(head);
  const more = document.createElement("span");
  if (note) more.textContent = note;
  if (excerpt) more.innerHTML = excerpt; // escaped by the indexer; only <mark> is markup
  link.append(more);
  return link;
};

const show = (symbols, pages) => {
  results.replaceChildren();
  for (const [title, rows] of [["Symbols", symbols], ["Pages", pages]]) {
    if (rows.length) {
      const head = document.createElement("h2");
      head.textContent = title;
      results.append(head, ...rows.map(row));
    }
  }
  if (!results.childElementCount) results.textContent = "Nothing found.";
  results.hidden = false;
};

const search = async () => {
  const term = input.value.trim();
  const mine = ++round;
  if (term.length < 2) {
    results.hidden = true;
    return;
  }
  const symbols = await findSymbols(term);
  if (mine !== round) return;
  if (symbols.length) show(symbols, []);
  const pages = await findPages(term);
  if (mine === round) show(symbols, pages);
};

input.addEventListener("input", search);
input.addEventListener("focus", search);
addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "/" && !typing) {
    event.preventDefault();
    input.focus();
  } else if (event.key === "Escape") {
    results.hidden = true;
    input.blur();
  } else if (event.key === "Enter" && document.activeElement === input) {
    results.querySelector("a")?.click();
  } else if ((event.key === "ArrowDown" || event.key === "ArrowUp") && !results.hidden) {
    const links = [input, ...results.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    if (at >= 0) {
      event.preventDefault();
      links[(at + (event.key === "ArrowDown" ? 1 : links.length - 1)) % links.length].focus();
    }
  }
});
addEventListener("click", (event) => {
  if (!event.target.closest(".search")) results.hidden = true;
});
