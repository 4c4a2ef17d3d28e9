// The health of a model: warnings, curves over the sites, and the figures themselves.

const LINES = { light: ["#0b57a4", "#b3261e", "#146c2e", "#7a4a9e", "#8a5a00", "#0b7285", "#a0336b", "#444a52"],
  dark: ["#8ab8f0", "#ff8a80", "#7fd695", "#d0a6ee", "#f0b45a", "#6fd3e0", "#f29ac6", "#c3c9d1"] };
const MARKS = [["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"], ["x", "✕"], ["cross", "✚"],
  ["star", "★"], ["triangle-down", "▼"]];
const DASHES = [["solid", "solid"], ["dot", "dotted"], ["dash", "dashed"], ["dashdot", "dash-dotted"]];
const SIDES = {
  forward: "The forward sums drift with depth where H hasn’t converged; the backward sums stay at 1.",
  backward: "The backward sums drift with depth where H hasn’t converged; the forward sums stay at 1.",
  neither: "Neither side drifts: H is doubly stochastic by construction.",
};

// Gains are near 1, and what matters is how near.
const gain = (value) => value === null || value >= 1e4 ? figure(value) : value.toLocaleString("en", { maximumSignificantDigits: 5 });

// Each curve has a colour, a mark and a dash of its own, so that none of them has to be told by the colour.
function style(k) {
  const [symbol, sign] = MARKS[k % MARKS.length], [dash, named] = DASHES[(k + Math.floor(k / 8)) % DASHES.length];
  return { color: LINES[dark.matches ? "dark" : "light"][k % 8], symbol, sign, dash, named };
}

function curves(stack, kind, caption, axis, lines, more = {}) {
  const names = stack.sites.map((site) => site.name), x = names.map((_, k) => k + 1);
  const size = names.length > 60 ? 4 : 6, { threshold, ...scale } = more;
  const traces = lines.map(([name, values], k) => {
    const { color, symbol, dash } = style(k);
    return { type: "scatter", mode: "lines+markers", name, x, y: scale.type === "log" ? values.map((v) => Math.max(v, 1e-17)) : values,
      line: { color, dash, width: 2 }, marker: { symbol, size },
      text: names.map((site, s) => `${site}<br>${name} ${figure(values[s])}`), hoverinfo: "text" };
  });
  const key = lines.map(([name], k) => { const { color, sign, named } = style(k); return keyed(color, `${name} (${sign} ${named})`); });
  const shown = threshold !== undefined && (scale.type === "log" || Math.max(...lines.flatMap(([, v]) => v)) > 0.7 * threshold);
  if (shown) {
    const ink = getComputedStyle(document.body).color;
    traces.push({ type: "scatter", mode: "lines", x: [0.5, names.length + 0.5], y: [threshold, threshold], hoverinfo: "skip",
      line: { color: ink, dash: "longdash", width: 1 } });
    key.push(keyed(ink, `threshold ${figure(threshold)} (thin, no marks)`));
  }
  const said = lines.map(([name, values]) => `${name} from ${figure(values[0])} to ${figure(values[values.length - 1])}, ` +
    `at most ${figure(Math.max(...values))}`).join("; ");
  const build = () => ({ traces, layout: layout({ title: "site", tickformat: "d", range: [0.5, names.length + 0.5],
    ...(names.length > 8 ? { nticks: 6 } : { dtick: 1 }) }, { title: axis, nticks: 6, exponentformat: "power", ...scale }) });
  return chart(kind, caption, `${caption}. ${said}.`, build, key);
}

function pictures(stack) {
  const of = (get) => stack.sites.map(get), one = { range: [-0.03, 1.03] };
  const each = (get) => stack.sites[0].share.map((_, i) => [`stream ${i}`, of((site) => get(site)[i])]);
  const composite = (side) => [side, stack.composite.map((gains) => gains[side])];
  const projected = Object.keys(stack.sites[0].alpha);
  const largest = (get) => of((site) => Math.max(...get(site)));
  const box = make("div", undefined, "charts");
  box.append(
    curves(stack, "composite", "Gain of the composite of all sites so far", "largest sum", [composite("forward"), composite("backward")],
      { threshold: data.thresholds.gain }),
    curves(stack, "off", "Distance of H’s sums from 1, site by site", "largest |sum − 1|",
      [["H", of((site) => site.gains.off)], ["composite", stack.composite.map((gains) => gains.off)]],
      { type: "log", threshold: data.thresholds["not-converged"] }),
    curves(stack, "sharpness", "How sharp H is", "fraction", [["entropy", of((s) => s.matrix.entropy)],
      ["from a permutation", of((s) => s.matrix.from_permutation)], ["from 1/n", of((s) => s.matrix.from_uniform)],
      ["from the identity", of((s) => s.matrix.from_identity)]], one),
    curves(stack, "pre", "pre: mean of each gate’s sigmoid", "sigmoid", each((site) => site.pre.mean), one),
    curves(stack, "post", "post: mean of each gate’s sigmoid", "sigmoid", each((site) => site.post.mean), one),
    curves(stack, "saturation", "Tokens for which a gate is closed or open, worst gate", "fraction of tokens",
      [["pre closed", largest((s) => s.pre.closed)], ["post closed", largest((s) => s.post.closed)],
        ["pre open", largest((s) => s.pre.open)], ["post open", largest((s) => s.post.open)]],
      { ...one, threshold: data.thresholds["closed-gate"] }),
    curves(stack, "share", "Share of each stream in the squares of x", "share", each((site) => site.share), { rangemode: "tozero" }),
    curves(stack, "alpha", "Gating scalars α", "α", projected.map((part) => [part, of((site) => site.alpha[part])])),
    curves(stack, "spread", "Deviation over tokens", "standard deviation", [["pre", of((s) => s.pre.spread)],
      ["post", of((s) => s.post.spread)], ["H", of((s) => s.matrix.spread)]], { rangemode: "tozero" }),
  );
  return box;
}

const COLUMNS = [
  ["composite, forward", (site, so) => so.forward, gain], ["composite, backward", (site, so) => so.backward, gain],
  ["H, forward", (site) => site.gains.forward, gain], ["H, backward", (site) => site.gains.backward, gain], ["sums off 1", (site) => site.gains.off],
  ["logits’ deviation", (site) => site.deviation], ["entropy", (site) => site.matrix.entropy],
  ["from a permutation", (site) => site.matrix.from_permutation], ["from 1/n", (site) => site.matrix.from_uniform],
  ["from the identity", (site) => site.matrix.from_identity], ["closed", (site) => Math.max(...site.pre.closed, ...site.post.closed)],
  ["open", (site) => Math.max(...site.pre.open, ...site.post.open)],
];

function header(text, scope) {
  const cell = make("th", text);
  cell.scope = scope;
  return cell;
}

function figures(stack) {
  const table = make("table", undefined, "elements", make("thead", undefined, "",
    make("tr", undefined, "", ...["site", "warnings", ...COLUMNS.map(([name]) => name)].map((name) => header(name, "col")))));
  table.append(make("tbody", undefined, "", ...stack.sites.map((site, k) => {
    const names = unique(data.warnings.filter((w) => w.stack === stack.name && w.places.some((place) => place.split(" ")[0] === site.name))
      .map((warned) => warned.name));
    return make("tr", undefined, "", header(site.name, "row"), make("td", names.length ? `✗ ${names.join(", ")}` : "✓", names.length ? "bad" : ""),
      ...COLUMNS.map(([, get, said = figure]) => make("td", said(get(site, stack.composite[k])), "figure")));
  })));
  return scrolling(`Figures of ${stack.name}`, table);
}

function folded(title, fill, open) {  // what is folded is made when it is opened
  const details = make("details", undefined, "", make("summary", title));
  let filled = false;
  const show = () => { if (details.open && !filled) { filled = true; details.append(...fill()); } };
  details.addEventListener("toggle", show);
  details.open = open;
  show();
  return details;
}

function drawWarnings() {
  const box = document.getElementById("found");
  box.replaceChildren(...data.warnings.map((warned) => make("article", undefined, "diagnosis",
    make("h3", `✗ ${warned.name}: ${warned.stack}`), make("p", `${warned.said[0].toUpperCase()}${warned.said.slice(1)}.`, "cause"),
    make("p", `Figure ${figure(warned.value)}, threshold ${figure(warned.threshold)}: ${warned.reason}.`),
    ...(warned.places.length ? [folded(several(warned.places.length, "place"), () => [make("p", warned.places.join(", "))], false)] : []))));
  if (!data.warnings.length) box.append(make("p", "✓ No warnings: every figure is on the healthy side of its threshold.", "good"));
}

function drawStacks() {
  document.getElementById("stacks").replaceChildren(make("p", SIDES[data.drifts]), ...data.stacks.flatMap((stack, k) => {
    const last = stack.composite[stack.composite.length - 1];
    const said = `${stack.name}: ${several(stack.sites.length, "site")}, gain ${gain(last.forward)} forward and ${gain(last.backward)} backward`;
    return [folded(said, () => [pictures(stack), folded("Figures of each site", () => [figures(stack)], false)], k === 0)];
  }));
}

function drawAbout() {
  const list = make("dl"), add = (term, value) => list.append(make("dt", term), make("dd", value));
  add("checkpoint", data.checkpoint);
  add("dialect", `${data.dialect}${data.assumed ? ", an assumption" : ""} (${data.told_by})`);
  add("layout", data.layout);
  add("sizes", `n = ${data.streams}, C = ${data.dim}`);
  add("streams", `${data.activations}; ${several(data.tokens, "token")}`);
  if (data.own !== null) add("the model’s own H", `differs by at most ${figure(data.own)}`);
  for (const head of data.heads) {
    add(head.name, `gates ${head.gate.mean.map(figure).join(", ")}; share of the streams ${head.share.map(figure).join(", ")}; α ${figure(head.alpha)}`);
  }
  for (const note of data.notes) add("note", note);
  document.getElementById("about").replaceChildren(list);
}

function drawHealth() {
  const sites = data.stacks.reduce((total, stack) => total + stack.sites.length, 0);
  document.getElementById("total").textContent = `${several(sites, "site")} of ${data.dialect}, n = ${data.streams}: ` +
    (data.warnings.length ? several(data.warnings.length, "warning") : "no warnings");
  drawWarnings();
  drawStacks();
  drawAbout();
}
dark.addEventListener("change", drawHealth);
drawHealth();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
