// The figures, and how an element is made: for every page.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 44rem)");

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
