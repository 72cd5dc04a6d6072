"use strict";
// Tables sort by a column, and the player shows a text as its steps brought it, next to plain decoding.

const SVG = "http://www.w3.org/2000/svg";

function sortTable(button) {
  const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0];
  const column = [...head.parentNode.children].indexOf(head);
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b), p = parseFloat(x), q = parseFloat(y);
    const order = Number.isNaN(p) || Number.isNaN(q) ? x.localeCompare(y) : p - q;
    return down ? -order : order;
  });
  body.append(...rows);
}

for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sortTable(button));

const store = document.getElementById("player-data");
if (store) startPlayer(JSON.parse(store.textContent));

function startPlayer(data) {
  const byId = (id) => document.getElementById(id);
  const choice = byId("choice"), play = byId("play"), pace = byId("pace");
  let shown = null, seconds = 0, running = false, before = 0;

  data.generations.forEach((one, index) => choice.add(new Option(one.label, index)));

  function pick() {
    const one = data.generations[choice.value];
    shown = { ours: laidOut(one), vanilla: one.vanilla ? laidOut(one.vanilla) : null, tree: data.trees[one.arm] };
    seconds = 0;
    running = false;
    byId("ours-name").textContent = one.arm + ": " + one.tokens_per_step + " tokens/step";
    byId("vanilla-pane").hidden = !shown.vanilla;
    byId("vanilla-name").textContent = one.vanilla ? one.vanilla.arm + ", at its measured pace" : "";
    byId("why").textContent = one.why;
    drawTree(byId("tree"), shown.tree);
    show();
  }

  // Each step's tokens, and the second at which the step was done.
  function laidOut(one) {
    let at = 0, token = 1, clock = 0;
    const parts = [{ text: data.texts[one.ids[0]] ?? "", done: 0, step: 0, path: [] }];
    one.kept.forEach((kept, step) => {
      clock += one.ms[step] / 1000;
      let text = "";
      for (let n = 0; n < kept; n++) text += data.texts[one.ids[token + n]] ?? "";
      token += kept;
      parts.push({ text, done: clock, step: ++at, path: one.paths ? one.paths[step] : [] });
    });
    return { parts, end: clock };
  }

  function show() {
    const latest = fill(byId("ours"), shown.ours);
    if (shown.vanilla) fill(byId("vanilla"), shown.vanilla);
    light(byId("tree"), latest.path);
    byId("clock").textContent = seconds.toFixed(2) + " s, step " + latest.step;
    play.textContent = running ? "Pause" : "Play";
  }

  function fill(pane, laid) {
    const until = laid.parts.filter((part) => part.done <= seconds + 1e-9);
    pane.replaceChildren(...until.map((part) => {
      const span = document.createElement("span");
      span.textContent = part.text;
      span.className = "s" + (part.step % 4);
      span.title = "step " + part.step;
      return span;
    }));
    return until[until.length - 1];
  }

  function tick(now) {
    if (!running) return;
    seconds += ((now - before) / 1000) * parseFloat(pace.value);
    before = now;
    if (seconds >= Math.max(shown.ours.end, shown.vanilla ? shown.vanilla.end : 0)) running = false;
    show();
    if (running) requestAnimationFrame(tick);
  }

  function toggle() {
    running = !running;
    if (running && seconds >= shown.ours.end && (!shown.vanilla || seconds >= shown.vanilla.end)) seconds = 0;
    before = performance.now();
    show();
    if (running) requestAnimationFrame(tick);
  }

  function stepBy(direction) {
    running = false;
    const ends = shown.ours.parts.map((part) => part.done);
    const next = direction > 0 ? ends.find((end) => end > seconds + 1e-9) : ends.filter((end) => end < seconds - 1e-9).pop();
    seconds = next ?? (direction > 0 ? shown.ours.end : 0);
    show();
  }

  choice.addEventListener("change", pick);
  play.addEventListener("click", toggle);
  byId("back").addEventListener("click", () => stepBy(-1));
  byId("forward").addEventListener("click", () => stepBy(1));
  byId("player").addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT") return;
    if (event.key === "ArrowRight") stepBy(1);
    else if (event.key === "ArrowLeft") stepBy(-1);
    else if (event.key === " " && event.target.tagName !== "BUTTON") toggle();
    else return;
    event.preventDefault();
  });
  pick();
}

function drawTree(home, tree) {
  home.replaceChildren();
  if (!tree) return;
  const [width, height] = tree.size;
  const picture = document.createElementNS(SVG, "svg");
  picture.setAttribute("viewBox", "-8 -8 " + (width + 16) + " " + (height + 16));
  picture.setAttribute("width", width + 16);
  picture.setAttribute("height", height + 16);
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", "the tree of " + tree.nodes.length + " nodes, the accepted path lit");
  for (const node of tree.nodes) {
    if (node.parent === null) continue;
    const line = document.createElementNS(SVG, "line"), from = tree.nodes[node.parent];
    for (const [name, value] of [["x1", from.x], ["y1", from.y], ["x2", node.x], ["y2", node.y]]) line.setAttribute(name, value);
    line.dataset.path = node.path.join(",");
    picture.append(line);
  }
  for (const node of tree.nodes) {
    const circle = document.createElementNS(SVG, "circle");
    for (const [name, value] of [["cx", node.x], ["cy", node.y], ["r", 4]]) circle.setAttribute(name, value);
    circle.dataset.path = node.path.join(",");
    picture.append(circle);
  }
  home.append(picture);
}

function light(home, path) {
  const lit = new Set(path === null ? [] : [""]);
  (path ?? []).forEach((_, depth) => lit.add(path.slice(0, depth + 1).join(",")));
  for (const part of home.querySelectorAll("[data-path]")) part.classList.toggle("lit", lit.has(part.dataset.path));
}
