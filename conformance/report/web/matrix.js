// Implementation by stage and dtype: the worst fraction of a bound, or the checks that failed.

function drawFilters(wanted) {
  const options = { ...data.names, verdict: [...data.names.verdict].sort(), dialect: [...data.names.dialect].sort() };
  document.getElementById("filters").replaceChildren(...FILTERS.map((name) => {
    const select = make("select");
    select.id = "filter-" + name;
    select.append(new Option("all", ""), ...options[name].map((value) => new Option(value, value)));
    select.value = wanted[name];
    select.addEventListener("change", () => { choose(name, select.value); document.getElementById(select.id).focus(); });
    return make("label", name, "", select);
  }));
}

function drawMatrix(wanted) {
  const kept = cells.filter((cell) => keeps(cell, wanted) && (!wanted.verdict || cell.verdicts[wanted.verdict]));
  const places = new Map();
  for (const cell of kept) {
    const key = [cell.implementation, cell.dtype, cell.stage].join("\n");
    const place = places.get(key) || { bad: 0, ratio: 0, where: "" };
    place.bad += sum(Object.entries(cell.verdicts).filter(([verdict]) => !GOOD.includes(verdict)).map(([, count]) => count));
    if (cell.ratio >= place.ratio) Object.assign(place, { ratio: cell.ratio, where: cell.where });
    places.set(key, place);
  }
  const used = (name) => data.names[name].filter((value) => kept.some((cell) => cell[name] === value));
  const axes = { implementation: used("implementation"), dtype: used("dtype"), stage: used("stage") };
  const at = (...key) => entry(places.get(key.join("\n")));
  document.getElementById("matrix").replaceChildren(
    ...(!kept.length ? [make("p", "nothing")] : narrow.matches ? phoneTables(axes, at) : [wideTable(axes, at)]));
}

function entry(place) {
  if (!place) return make("td", "–", "none", unseen(" not claimed, or not asked"));
  const td = make("td");
  if (place.bad) {
    td.className = "failed";
    td.append("✗ " + place.bad.toLocaleString("en"), narrow.matches ? unseen(" failed") : " failed");
  } else {
    const near = place.ratio > 0.5;
    td.className = near ? "marginal" : "passed";
    td.append((near ? "≈ " : "✓ ") + place.ratio.toFixed(2), unseen(near ? " marginal" : " passed"));
    td.title = "the worst: " + place.where;
  }
  return td;
}

function header(text, scope) {
  const th = make("th", text);
  th.scope = scope;
  return th;
}

function wideTable(axes, at) {
  const table = make("table", undefined, "matrix");
  table.append(make("thead", undefined, "", make("tr", undefined, "",
    ...["implementation", "dtype", ...axes.stage].map((name) => header(name, "col")))));
  for (const name of axes.implementation) {
    const body = make("tbody");
    axes.dtype.forEach((dtype, k) => {
      const tr = make("tr");
      if (!k) {
        const th = header(name, "rowgroup");
        th.rowSpan = axes.dtype.length;
        tr.append(th);
      }
      tr.append(header(dtype, "row"), ...axes.stage.map((stage) => at(name, dtype, stage)));
      body.append(tr);
    });
    table.append(body);
  }
  return scrolling("Worst errors by implementation, dtype and stage", table);
}

function phoneTables(axes, at) {  // a table for each implementation, as wide as four dtypes
  return axes.implementation.map((name) => {
    const table = make("table", undefined, "matrix", make("caption", name));
    table.append(make("thead", undefined, "", make("tr", undefined, "",
      ...["stage", ...axes.dtype].map((text) => header(text, "col")))));
    table.append(make("tbody", undefined, "", ...axes.stage.map((stage) =>
      make("tr", undefined, "", header(stage, "row"), ...axes.dtype.map((dtype) => at(name, dtype, stage))))));
    return table;
  });
}
