// Why it failed, then the failures in groups: those that lead, and folded under them those that only follow.

function drawDiagnoses() {
  const box = document.getElementById("diagnoses");
  const checks = sum(cells.flatMap((cell) => Object.values(cell.verdicts)));
  if (!data.diagnoses.length) {
    box.append(make("p", `✓ Nothing failed: ${several(checks, "check")} of ` +
      `${several(data.names.implementation.length, "implementation")} passed.`, "good"));
  }
  box.append(...data.diagnoses.map((diagnosis) => make("article", undefined, "diagnosis",
    make("h3", "✗ " + diagnosis.implementation), make("p", diagnosis.cause, diagnosis.found ? "cause" : "cause faint"),
    ...(diagnosis.lines.length ? [make("ul", undefined, "", ...diagnosis.lines.map((line) => make("li", line)))] : []))));
}

function onOpen(details, fill) {  // what is folded is made when it is opened
  let filled = false;
  details.addEventListener("toggle", () => {
    if (details.open && !filled) { filled = true; details.append(...fill()); }
  });
  return details;
}

function drawGroups(wanted) {
  const kept = data.groups.map((group) => ({ ...group, count: sum(group.counts.filter(([dialect, dtype, verdict]) =>
    keeps({ implementation: group.implementation, dialect, dtype }, wanted) && (!wanted.verdict || verdict === wanted.verdict))
    .map(([, , , count]) => count)) })).filter((group) => group.count);
  const sections = unique(kept.map((group) => group.implementation)).flatMap((name) => {
    const mine = kept.filter((group) => group.implementation === name);
    const leaders = mine.filter((group) => !group.follows), followers = mine.filter((group) => group.follows);
    const folded = followers.length ? [onOpen(make("details", undefined, "followers", make("summary",
      `${several(sum(followers.map((group) => group.count)), "failure")} of ${several(followers.length, "more group")} only ` +
      `${followers.length === 1 ? "follows" : "follow"} from ${leaders.length ? "these" : "others"}`)),
      () => followers.map((group) => groupBox(group, wanted)))] : [];
    return [make("h3", name), ...leaders.map((group) => groupBox(group, wanted)), ...folded];
  });
  const hidden = data.hidden ? [make("p", `${several(data.hidden, "failure")} more are counted here and not shown one by ` +
    "one; the files of run --jsonl have them.", "faint")] : [];
  document.getElementById("groups").replaceChildren(...(sections.length ? sections : [make("p", "none")]), ...hidden);
}

function groupBox(group, wanted) {
  const dtypes = data.names.dtype.filter((dtype) => group.dtypes.includes(dtype));
  const said = [`✗ ${group.verdicts.join(", ")}`, several(group.count, "check"), dtypes.join(", "), few(group.dialects)];
  if (group.verdicts.includes("failed")) said.push(`up to ${figure(group.ratio)} times the bound`);
  if (group.families.length) said.push(`cases of ${few(group.families)}`);
  if (group.modes.length) said.push(`only called otherwise: ${group.modes.join(", ")}`);
  if (group.follows) said.push(`follows from ${group.follows}`);
  const shown = group.shown.map((place) => data.failures[place]).filter((failure) =>
    keeps({ ...failure, dtype: failure.x }, wanted) && (!wanted.verdict || failure.verdict === wanted.verdict));
  const box = make("article", undefined, "group", make("h4", undefined, "", `${group.stage}: `, make("code", group.tensor)),
    make("p", said[0], "bad"), make("p", said.slice(1).join("; ")));
  if (group.message) box.append(make("p", group.message));
  if (group.reproduce) box.append(make("pre", group.reproduce, "reproduce"));
  if (shown.length) {
    box.append(failureBox(shown[0], "The smallest of them: ", group));
    if (shown.length > 1) {
      box.append(onOpen(make("details", undefined, "", make("summary", `${shown.length - 1} more of the ${group.count}`)),
        () => shown.slice(1).map((failure) => failureBox(failure, "", group))));
    }
  }
  return box;
}

function failureBox(failure, before, group) {  // what the group says already isn't said again
  const mode = failure.mode ? ` (${failure.mode})` : "";
  const ratio = failure.worst.length ? `, ${figure(failure.ratio)} times the bound` : "";
  const summary = make("summary", `${before}${failure.case}, ${failure.variant}: ${failure.verdict}${mode}${ratio}`);
  return onOpen(make("details", undefined, "failure", summary), () => {
    const parts = [];
    if (failure.message && failure.message !== group.message) parts.push(make("p", failure.message));
    if (failure.trace.length) parts.push(make("pre", failure.trace.join("\n"), "trace"));
    if (failure.worst.length) parts.push(elements(failure));
    if (failure.reproduce !== group.reproduce) parts.push(make("pre", failure.reproduce, "reproduce"));
    return [...parts, charts(failure)];
  });
}

function elements(failure) {
  const table = make("table", undefined, "elements");
  table.append(make("thead", undefined, "", make("tr", undefined, "",
    ...["element", "got", "expected", "off by"].map((name) => header(name, "col")))));
  table.append(make("tbody", undefined, "", ...failure.worst.map((w) => make("tr", undefined, "",
    header(`[${w.index.join(", ")}]`, "row"),
    ...[w.actual ?? "not finite", w.expected ?? "not finite", figure(w.error)].map((text) => make("td", text, "figure"))))));
  const said = `The elements that are furthest off; the bound is ${figure(failure.bound)}`;
  return make("div", undefined, "", make("p", said, "faint"), scrolling(said, table));
}
