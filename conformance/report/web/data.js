// The cells of a report, and what the reader has chosen of them.
const GOOD = ["passed", "marginal"];
const FILTERS = ["implementation", "dialect", "dtype", "verdict"];

// A row of `data.cells` has places in `data.names`, the worst ratio and its place, then verdicts with their counts.
const cells = data.cells.map(([implementation, stage, dtype, dialect, ratio, where, ...counts]) => {
  const verdicts = {};
  for (let k = 0; k < counts.length; k += 2) verdicts[data.names.verdict[counts[k]]] = counts[k + 1];
  return { implementation: data.names.implementation[implementation], stage: data.names.stage[stage],
    dtype: data.names.dtype[dtype], dialect: data.names.dialect[dialect], ratio, where, verdicts };
});

function chosen() {
  const parameters = new URLSearchParams(location.hash.slice(1));
  return Object.fromEntries(FILTERS.map((name) => [name, parameters.get(name) || ""]));
}
function choose(name, value) {
  const wanted = { ...chosen(), [name]: value };
  const parameters = new URLSearchParams(Object.entries(wanted).filter(([, v]) => v));
  history.replaceState(null, "", "#" + parameters);
  draw();
}
const keeps = (row, wanted) =>
  ["implementation", "dialect", "dtype"].every((name) => !wanted[name] || row[name] === wanted[name]);
