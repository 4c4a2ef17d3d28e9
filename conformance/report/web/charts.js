// The pictures of a failure. Each is drawn when it has its place, and again when that changes: drawn before, it would
// keep the width that it had alone, and lie on top of its neighbour.

function library() {  // it is large, so it is read when the first picture is asked for
  if (!window.Plotly) {
    const script = make("script", document.getElementById("plotly").textContent);
    document.head.append(script);
  }
  return window.Plotly;
}

function chart(kind, caption, description, build, key = []) {
  const plot = make("div", undefined, "plot");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", description);
  let drawn = false;
  new ResizeObserver(() => {
    if (!plot.clientWidth) return;
    const { traces, layout } = build(plot.clientWidth);
    if (drawn) Plotly.relayout(plot, { width: plot.clientWidth, height: plot.clientHeight });
    else library().newPlot(plot, traces, { ...layout, width: plot.clientWidth, height: plot.clientHeight },
      { displayModeBar: false });
    drawn = true;
  }).observe(plot);
  const children = key.length ? [make("ul", undefined, "key", ...key)] : [];
  return make("figure", undefined, "chart " + kind, make("figcaption", caption), plot, ...children);
}

function layout(x, y) {
  const ink = getComputedStyle(document.body).color, grid = "rgba(128,128,128,.3)";
  const axis = (more) => ({ gridcolor: grid, zeroline: false, automargin: true, fixedrange: true, ...more,
    title: { text: more.title, standoff: 8 } });
  return { margin: { l: 10, r: 12, t: 8, b: 10 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: ink, size: 12 }, showlegend: false, dragmode: false, xaxis: axis(x), yaxis: axis(y) };
}

function keyed(color, text) {
  const swatch = make("span", undefined, "swatch");
  swatch.style.background = color;
  return make("li", undefined, "", swatch, text);
}

function histogram(failure) {
  const edges = data.edges.map(figure), counts = failure.histogram;
  const bins = edges.map((edge, k) => k + 1 < edges.length ? `${edge} to ${edges[k + 1]}` : `over ${edge}`);
  const within = sum(counts.filter((_, k) => data.edges[k] < 1)), all = sum(counts);
  const [fine, beyond] = dark.matches ? ["#7fb0ee", "#ff8a80"] : ["#2f6db5", "#b3261e"];
  const build = () => ({
    traces: [{ type: "bar", orientation: "h", y: bins, x: counts, text: counts.map((n) => n ? n.toLocaleString("en") : ""),
      textposition: "outside", cliponaxis: false, hoverinfo: "x+y",
      marker: { color: data.edges.map((edge) => edge >= 1 ? beyond : fine) } }],
    layout: layout({ title: "elements", showticklabels: false, range: [0, Math.max(...counts) * 1.35] },
      { title: "error in units of the bound", autorange: "reversed", tickmode: "array", tickvals: bins }),
  });
  const said = `${(all - within).toLocaleString("en")} of ${several(all, "element")} ${all === 1 ? "is" : "are"} beyond the bound`;
  return chart("histogram", `Elements by error: ${said}`, `Histogram: ${said}.`, build,
    [keyed(fine, "within the bound"), keyed(beyond, "beyond it (1 and above)")]);
}

function sinkhorn(failure) {
  const picture = data.sinkhorn[failure.case];
  const colors = dark.matches ? ["#7fb0ee", "#f0b45a"] : ["#2f6db5", "#9a5b00"];
  const line = (name, k) => ({ type: "scatter", mode: "lines+markers", name, x: picture.iterations,
    line: { color: colors[k], dash: k ? "dot" : "solid" }, marker: { symbol: k ? "square" : "circle", size: 6 },
    y: picture[name].map((value) => Math.max(value, 1e-17)) });
  const build = () => ({
    traces: [line("rows", 0), line("columns", 1)],
    layout: layout({ title: "iterations", nticks: 6, tickformat: "d" },
      { title: "largest |sum − 1|", type: "log", exponentformat: "power", nticks: 6 }),
  });
  const last = (name) => figure(picture[name][picture[name].length - 1]);
  return chart("sinkhorn", "Sinkhorn on this case, with true values",
    `After ${several(picture.iterations.length, "iteration")} row sums are ${last("rows")} from 1 and column sums ` +
    `${last("columns")}.`, build,
    [keyed(colors[0], "rows (● solid)"), keyed(colors[1], "columns (■ dotted)")]);
}

// Levels of the heat map: up to so many units of the bound. The last is for what isn't finite.
const LEVELS = [0.01, 0.1, 1, 2, 10, 100, 1e4, Infinity, null];
const SHADES = {
  light: ["#f4f6f8", "#dde5ec", "#bccbd8", "#fcd38a", "#f3a04e", "#dc6a2c", "#b23a1e", "#78190f", "#000000"],
  dark: ["#1f242a", "#2c3742", "#40515f", "#8a4a14", "#bb6420", "#e08a35", "#f4b25e", "#fbdca4", "#ffffff"],
};
const levelOf = (value) => value === null ? LEVELS.length - 1 : LEVELS.findIndex((edge) => value <= edge);
const levelSaid = (k) => LEVELS[k] === null ? "not finite, or no units" : LEVELS[k] === Infinity ? "more" :
  `to ${figure(LEVELS[k])}` + (LEVELS[k] === 1 ? " (the bound)" : "");

function heatMap(failure) {
  const { tokens, rows, columns, cells: values } = failure.map;
  const shades = SHADES[dark.matches ? "dark" : "light"], [down, across] = tokens ? ["token", "channel"] : ["row", "column"];
  const edges = (total, count) => Array.from({ length: count + 1 }, (_, k) => Math.floor(k * total / count) - 0.5);
  const y = edges(rows, values.length), x = edges(columns, values[0].length);
  const range = (name, e, k) => e[k + 1] - e[k] > 1 ? `${name}s ${e[k] + 0.5} to ${e[k + 1] - 0.5}` : `${name} ${e[k] + 0.5}`;
  const text = values.map((row, r) => row.map((value, c) => `${range(down, y, r)}<br>${range(across, x, c)}<br>` +
    (value === null ? "not finite, or no units" : `up to ${figure(value)} times the bound`)));
  const scale = shades.flatMap((shade, k) => [[k / shades.length, shade], [(k + 1) / shades.length, shade]]);
  const ticks = (total) => total > 8 ? { nticks: 6, tickformat: "d" } : { dtick: 1, tickformat: "d" };
  const build = () => ({
    traces: [{ type: "heatmap", x, y, z: values.map((row) => row.map(levelOf)), text, hoverinfo: "text", showscale: false,
      zmin: -0.5, zmax: shades.length - 0.5, colorscale: scale, xgap: 1, ygap: 1 }],
    layout: layout({ title: across, showgrid: false, ...ticks(columns) },
      { title: down, showgrid: false, autorange: "reversed", ...ticks(rows) }),
  });
  const bad = sum(values.map((row) => row.filter((value) => value === null || value > 1).length));
  const said = bad ? `beyond the bound in the cells of ${failure.place} (${bad.toLocaleString("en")} of ${several(values.length * values[0].length, "cell")})` :
    "no cell is beyond the bound";
  const present = unique(values.flat().map(levelOf)).sort((a, b) => a - b);
  return chart("heat", `Worst error in units of the bound; ${said}`, `Map of errors by ${down} and ${across}: ${said}.`, build,
    present.map((k) => keyed(shades[k], levelSaid(k))));
}

function charts(failure) {
  const box = make("div", undefined, "charts");
  if (failure.map) box.append(heatMap(failure));
  if (failure.histogram && failure.histogram.length) box.append(histogram(failure));
  if (data.sinkhorn[failure.case]) box.append(sinkhorn(failure));
  return box;
}
