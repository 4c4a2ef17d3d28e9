// The totals above, and below what wasn't claimed, the mutants, and the settings and versions that ran.

function drawTotal() {
  const counts = {};
  for (const cell of cells) for (const [v, n] of Object.entries(cell.verdicts)) counts[v] = (counts[v] || 0) + n;
  const said = Object.entries(counts).sort().map(([v, n]) => `${n.toLocaleString("en")} ${v}`).join(", ") || "nothing checked";
  document.getElementById("total").textContent =
    `${several(data.names.implementation.length, "implementation")}; checks: ${said}; corpus ${data.corpus.slice(0, 12)}`;
  document.getElementById("warnings").append(...data.warnings.map((line) => make("li", line, "bad")));
}

function drawSkips() {
  const box = document.getElementById("skips");
  if (!data.skips.length) { box.append(make("p", "everything was")); return; }
  const items = sum(data.skips.map((s) => s.count));
  box.append(onOpen(make("details", undefined, "", make("summary", `${several(items, "item")}, and why`)), () => {
    const table = make("table", undefined, "", make("thead", undefined, "", make("tr", undefined, "",
      ...["implementation", "items", "reason"].map((name) => header(name, "col")))));
    table.append(make("tbody", undefined, "", ...data.skips.map((s) => make("tr", undefined, "",
      header(s.implementation, "row"), make("td", s.count), make("td", s.reason)))));
    return [scrolling("Items that weren't claimed", table)];
  }));
}

const listed = (value) => Array.isArray(value) ? value.map(listed).join(", ") : value !== null && typeof value === "object" ?
  Object.entries(value).map(([k, v]) => `${k} ${listed(v)}`).join(", ") : String(value);

function drawRuns() {
  document.getElementById("runs").append(...data.runs.flatMap((run) => {
    const list = make("dl");
    const add = (term, value) => { if (value) list.append(make("dt", term), make("dd", value)); };
    add("corpus", run.corpus);
    add("asked for", listed(Object.fromEntries(Object.entries(run.asked).filter(([, value]) => listed(value ?? "")))));
    add("versions", listed(run.versions));
    add("Python", run.python);
    add("machine", [run.system, run.machine, run.processors ? several(run.processors, "processor") : ""].filter(Boolean).join(", "));
    add("environment", listed(run.environment));
    for (const [name, settings] of Object.entries(run.implementations)) add(name, listed(settings));
    return [make("h3", run.file), list];
  }));
}

function drawSelftest() {
  if (!data.selftest) return;
  const box = document.getElementById("selftest"), columns = ["float32", "bfloat16", "float16"];
  const table = (title, label, rows) => {
    const made = make("table", undefined, "", make("thead", undefined, "", make("tr", undefined, "",
      ...[title, ...columns.map((d) => `${d}: ${label}, multiple of the bound`)].map((name) => header(name, "col")))));
    made.append(make("tbody", undefined, "", ...rows));
    return scrolling(title, made);
  };
  const row = (m, of) => make("tr", undefined, "", header(m.name, "row"), ...columns.map((d) => {
    const [text, where, className] = m.blind[d] ? ["same bits", m.blind[d], ""] : of(m.figures[d]);
    const td = make("td", text, className);
    td.title = where;
    return td;
  }));
  box.hidden = false;
  box.append(make("p", data.selftest.honest), table("mutant", "cases", data.selftest.mutants.map((m) =>
    row(m, (f) => [`${f.cases}, ${figure(f.ratio)}`, f.where, ""]))));
  if (!data.selftest.where.length) return;
  box.append(table("mutant of where", "killed by", data.selftest.where.map((m) => row(m, (f) => f ?
    [`${[f.tier, ...f.places.slice(0, 1)].filter(Boolean).join(": ")}, ${figure(f.ratio)}`, `${f.where}; ${f.places.join(", ")}`, ""] :
    ["✗ survives", "", "failed"]))));
}
