// The figures, what the reader has chosen of them, and how an element is made.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const GOOD = ["passed", "marginal"];
const FILTERS = ["implementation", "dialect", "dtype", "verdict"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 44rem)");

// A row of `data.cells` has places in `data.names`, the worst ratio and its place, then verdicts with their counts.
const cells = data.cells.map(([implementation, stage, dtype, dialect, ratio, where, ...counts]) => {
  const verdicts = {};
  for (let k = 0; k < counts.length; k += 2) verdicts[data.names.verdict[counts[k]]] = counts[k + 1];
  return { implementation: data.names.implementation[implementation], stage: data.names.stage[stage],
    dtype: data.names.dtype[dtype], dialect: data.names.dialect[dialect], ratio, where, verdicts };
});

function make(tag, text, className, ...children) {
  const element = document.createElement(tag);
  if (text !== undefined && text !== null) element.textContent = text;
  if (className) element.className = className;
  element.append(...children);
  return element;
}
const unseen = (text) => make("span", text, "unseen");
const unique = (values) => [...new Set(values)];
const sum = (values) => values.reduce((total, value) => total + value, 0);
const several = (count, word, more = word + "s") => `${count.toLocaleString("en")} ${count === 1 ? word : more}`;
const figure = (value) => value === null || value === undefined ? "∞" : value === 0 ? "0" :
  value >= 0.001 && value < 1e6 ? Number(value.toPrecision(3)).toLocaleString("en", { maximumFractionDigits: 6 }) :
  value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
const few = (names, most = 4) => names.length <= most + 1 ? names.join(", ") :
  `${names.slice(0, most).join(", ")} and ${names.length - most} more`;

function scrolling(label, content) {  // a wide table: the keyboard can scroll it too
  const box = make("div", undefined, "wide", content);
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", label);
  return box;
}

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
