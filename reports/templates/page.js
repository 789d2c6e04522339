"use strict";

// Draws the histogram and the ROC curve, fills the tables, and applies the threshold that the reader sets.
// The element #data holds {threshold: number or null, rows: [{name, score, kind, image}, ...]}.
// kind is "good" or the name of a defect, and null without labels. image is a data URI, or "".

const TABLE_ROWS = 2000;  // longer tables take the browser seconds at each step of the slider
const BINS = 40;
const HISTOGRAM = { left: 30, right: 410, top: 20, bottom: 170 };  // the axes, in units of the drawing
const ROC = { left: 120, right: 300, top: 10, bottom: 185 };

const { rows, threshold: initialThreshold } = JSON.parse(byId("data").textContent);
const labelled = rows.some(row => row.kind !== null);
const defects = rows.filter(isDefect).length, goods = rows.length - defects;
const range = makeRange();
const order = [...rows];  // as the table shows them
const sorting = { key: "score", descending: true };
let threshold = initialThreshold;  // null: no decisions

function byId(id) {
  return document.getElementById(id);
}

function isDefect(row) {
  return row.kind !== null && row.kind !== "good";
}

function isCalled(row) {
  return threshold !== null && row.score > threshold;
}

// Appends an element, or an SVG element to an SVG parent.
function add(parent, tag, attributes = {}, text = undefined) {
  const isSvg = parent.namespaceURI.endsWith("svg");
  const element = isSvg ? document.createElementNS(parent.namespaceURI, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return parent.appendChild(element);
}

// Appends text that may break after each part of a path.
function addBreakable(parent, text) {
  text.split(/([/\\_]+)/).forEach((part, index) => {
    parent.append(part);
    if (index % 2) add(parent, "wbr");
  });
}

function addWords(tableRow, text) {
  addBreakable(add(tableRow, "td", { class: "words" }), text);
}

function addNumber(tableRow, text) {
  add(tableRow, "td", { class: "number" }, text);
}

// The slider's range: all scores, the initial threshold, and a margin. It moves in steps of a power of ten, so that the
// number field shows exactly the value that scores are compared with.
function makeRange() {
  const sorted = rows.map(row => row.score).sort((a, b) => a - b);
  const low = sorted.length ? sorted[0] : 0, high = sorted.length ? sorted.at(-1) : 1;
  const margin = (high - low) / 50 || 1;
  const from = Math.min(low - margin, initialThreshold ?? low);
  const to = Math.max(high + margin, initialThreshold ?? high);
  const power = Math.floor(Math.log10(to - from)) - 2;
  const step = Number("1e" + power), digits = Math.max(0, -power);
  return {
    start: Number((Math.floor(from / step) * step).toFixed(digits)),
    end: Number((Math.ceil(to / step) * step).toFixed(digits)),
    step, digits, highestScore: high,
  };
}

function formatScore(score) {
  return score.toFixed(Math.max(2, range.digits));
}

function formatPercent(count, total) {
  return (100 * count / total).toFixed(0) + " %";
}

// Histogram

function scoreToX(score) {
  return HISTOGRAM.left + (HISTOGRAM.right - HISTOGRAM.left) * (score - range.start) / (range.end - range.start);
}

function drawHistogram() {
  const svg = byId("histogram");
  const { left, right, top, bottom } = HISTOGRAM;
  const [normal, defective] = [countBins(row => !isDefect(row)), countBins(isDefect)];
  const highest = Math.max(1, ...normal.map((count, bin) => count + defective[bin]));
  const width = (right - left) / BINS, height = count => (bottom - top) * count / highest;
  for (let bin = 0; bin < BINS; bin++) {
    const h = height(normal[bin]), stacked = height(defective[bin]);
    const shared = { x: left + .5 + width * bin, width: width - 1 };
    add(svg, "rect", { ...shared, y: bottom - h, height: h, fill: "var(--bar)" });
    add(svg, "rect", { ...shared, y: bottom - h - stacked, height: stacked, fill: "var(--bad)" });
  }
  add(svg, "path", { d: `M${left} ${top}V${bottom}H${right}`, stroke: "currentColor", fill: "none" });
  add(svg, "text", { x: left, y: 14 }, highest + (highest === 1 ? " image" : " images"));
  add(svg, "text", { x: left - 5, y: bottom + 4, "text-anchor": "end" }, 0);
  drawTicks(svg);
  drawLegend(svg);
  const line = { stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "5 3" };
  add(svg, "line", { id: "mark", y1: top, y2: bottom, ...line });
}

// How many of the chosen rows fall into each bin.
function countBins(chosen) {
  const counts = Array(BINS).fill(0), width = (range.end - range.start) / BINS;
  for (const row of rows.filter(chosen)) {
    counts[Math.min(BINS - 1, Math.floor((row.score - range.start) / width))]++;
  }
  return counts;
}

// Numbers below the axis, at most six steps of 1, 2 or 5 times a power of ten apart.
function drawTicks(svg) {
  const smallest = (range.end - range.start) / 6;
  const power = Number("1e" + Math.floor(Math.log10(smallest)));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= smallest);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  for (let i = Math.ceil(range.start / step); scoreToX(i * step) < HISTOGRAM.right - 20; i++) {
    const place = { x: scoreToX(i * step), y: HISTOGRAM.bottom + 15, "text-anchor": "middle" };
    add(svg, "text", place, (i * step).toFixed(decimals));
  }
}

function drawLegend(svg) {
  const y = HISTOGRAM.bottom + 31;
  add(svg, "text", { x: HISTOGRAM.left, y }, "score (distance)");
  if (!labelled) return;
  const entry = { y, "text-anchor": "end" };
  add(svg, "text", { ...entry, x: HISTOGRAM.right - 80, style: "fill: var(--bar)" }, "\u25A0 normal");
  add(svg, "text", { ...entry, x: HISTOGRAM.right, style: "fill: var(--bad)" }, "\u25A0 defective");
}

// ROC curve

function rocPoint(falsePositiveRate, truePositiveRate) {
  return {
    x: ROC.left + (ROC.right - ROC.left) * falsePositiveRate,
    y: ROC.bottom - (ROC.bottom - ROC.top) * truePositiveRate,
  };
}

// Needs normal and defective images.
function drawRoc() {
  if (!defects || !goods || !labelled) return;
  byId("roc-part").hidden = false;
  const svg = byId("roc"), { left, right, top, bottom } = ROC;
  const points = list => list.map(([fpr, tpr]) => rocPoint(fpr, tpr)).map(({ x, y }) => `${x},${y}`).join(" ");
  const thin = { stroke: "var(--line)", fill: "none" };
  add(svg, "rect", { x: left, y: top, width: right - left, height: bottom - top, ...thin });
  add(svg, "polyline", { points: points([[0, 0], [1, 1]]), ...thin });
  const curve = { id: "curve", stroke: "var(--bad)", "stroke-width": 2, fill: "none" };
  add(svg, "polyline", { ...curve, points: points(rocCurve()) });
  add(svg, "text", { x: (left + right) / 2, y: bottom + 16, "text-anchor": "middle" }, "false-positive rate, 0 to 1");
  add(svg, "text", { x: left - 8, y: 92, "text-anchor": "end" }, "true-positive");
  add(svg, "text", { x: left - 8, y: 107, "text-anchor": "end" }, "rate, 0 to 1");
  add(svg, "circle", { id: "dot", r: 4, fill: "currentColor" });
}

// [false-positive rate, true-positive rate] above every score, from (0, 0) to (1, 1).
function rocCurve() {
  const descending = [...rows].sort((a, b) => b.score - a.score), curve = [[0, 0]];
  let found = 0, falseAlarms = 0;
  descending.forEach((row, index) => {
    if (isDefect(row)) found++; else falseAlarms++;
    if (descending[index + 1]?.score !== row.score) curve.push([falseAlarms / goods, found / defects]);
  });
  return curve;
}

// Tables

function makeTableRow(row) {
  const tableRow = document.createElement("tr"), first = add(tableRow, "td");
  if (row.image) {
    const button = add(first, "button", { type: "button", class: "thumb", "aria-label": "enlarge " + row.name });
    add(button, "img", { src: row.image, alt: "", loading: "lazy" });
    button.onclick = () => enlarge(row);
  }
  addWords(tableRow, row.name);
  if (labelled) addWords(tableRow, row.kind);
  addNumber(tableRow, formatScore(row.score));
  row.decision = add(tableRow, "td");
  return tableRow;
}

function enlarge(row) {
  const dialog = byId("large");
  dialog.querySelector("img").src = row.image;
  dialog.querySelector("p").textContent = `${row.name}, score ${formatScore(row.score)}`;
  dialog.showModal();
}

function sortTable() {
  const { key, descending } = sorting, sign = descending ? -1 : 1;
  order.sort((a, b) => sign * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0));
  const shown = order.slice(0, TABLE_ROWS);
  for (const row of shown) row.tableRow ??= makeTableRow(row);
  byId("pictures").tBodies[0].replaceChildren(...shown.map(row => row.tableRow));
  updateDecisions();
  for (const head of document.querySelectorAll("#pictures th[data-key]")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

// Sorts by a column. The column already sorted by changes its direction; scores begin with the highest.
function chooseColumn(key) {
  sorting.descending = key === sorting.key ? !sorting.descending : key === "score";
  sorting.key = key;
  sortTable();
}

function updateDecisions() {
  for (const row of order.slice(0, TABLE_ROWS)) {
    const text = threshold === null ? "" : isCalled(row) ? "defective" : "normal";
    if (row.decision.textContent !== text) row.decision.textContent = row.decision.className = text;
  }
}

function updateKinds() {
  if (!labelled) return;
  byId("kinds-part").hidden = byId("kind-head").hidden = false;
  const body = byId("kinds").tBodies[0];
  body.replaceChildren();
  for (const kind of [...new Set(rows.map(row => row.kind))].sort()) {
    const own = rows.filter(row => row.kind === kind), called = own.filter(isCalled).length;
    const tableRow = add(body, "tr");
    addWords(tableRow, kind);
    addNumber(tableRow, own.length);
    addNumber(tableRow, formatScore(own.reduce((sum, row) => sum + row.score, 0) / own.length));
    addNumber(tableRow, threshold === null ? "" : `${called} (${formatPercent(called, own.length)})`);
  }
}

// Threshold

// Recounts everything for a threshold, or for none.
function setThreshold(value) {
  threshold = value;
  byId("slider").value = threshold ?? range.highestScore;
  const called = rows.filter(isCalled), found = called.filter(isDefect).length;
  byId("counts").textContent = describeCounts(called.length, found);
  moveMarks(found, called.length - found);
  updateKinds();
  updateDecisions();
}

function describeCounts(called, found) {
  if (threshold === null) return "no threshold: move the slider or enter a number";
  const text = `${called} of ${rows.length} called defective`;
  if (!labelled) return text;
  const alarms = called - found, rate = goods ? ` (false-positive rate ${formatPercent(alarms, goods)})` : "";
  return `${text}; ${found} of ${defects} defects found, ${alarms} of ${goods} false alarms${rate}`;
}

// Places the threshold in the histogram and on the ROC curve.
function moveMarks(found, falseAlarms) {
  const line = byId("mark"), dot = byId("dot");  // no dot without a ROC curve
  for (const mark of [line, dot]) if (mark) mark.style.display = threshold === null ? "none" : "";
  if (threshold === null) return;
  for (const end of ["x1", "x2"]) line.setAttribute(end, scoreToX(threshold));
  if (!dot) return;
  const { x, y } = rocPoint(falseAlarms / goods, found / defects);
  dot.setAttribute("cx", x);
  dot.setAttribute("cy", y);
}

function resetThreshold() {
  byId("number").value = initialThreshold === null ? "" : Number(initialThreshold.toFixed(range.digits + 2));
  setThreshold(initialThreshold);
}

function connectControls() {
  const slider = byId("slider"), number = byId("number");
  Object.assign(slider, { min: range.start, max: range.end, step: range.step });
  slider.oninput = () => {
    number.value = slider.value;
    setThreshold(Number(slider.value));
  };
  number.onchange = () => {
    if (number.value === "") resetThreshold();
    else setThreshold(Number(number.value));
  };
  for (const button of document.querySelectorAll("#pictures th button")) {
    button.onclick = () => chooseColumn(button.parentElement.dataset.key);
  }
}

const heading = document.querySelector("h1");
heading.replaceChildren();
addBreakable(heading, document.title);
byId("left-out").hidden = rows.length <= TABLE_ROWS;
byId("left-out").textContent =
  `This table shows the first ${TABLE_ROWS} images in the chosen order. Figures and counts cover all ${rows.length}.`;
connectControls();
drawHistogram();
drawRoc();
sortTable();
resetThreshold();
