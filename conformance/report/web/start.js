// Draws the page; what depends on the choice, on the scheme and on the width is drawn again when these change.

function draw() {
  const wanted = chosen();
  drawFilters(wanted);
  drawGroups(wanted);
  drawMatrix(wanted);
}
addEventListener("hashchange", draw);
dark.addEventListener("change", draw);
narrow.addEventListener("change", () => drawMatrix(chosen()));
drawTotal();
drawDiagnoses();
draw();
drawSkips();
drawSelftest();
drawRuns();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
