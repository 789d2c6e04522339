// Draws the histogram and the ROC curve, fills the tables, and applies the threshold that the reader sets.
// The element #data holds {threshold, review, typical: number or null, adopt, references: [...]}, and each script.row at the end of
// the page one image. reports/page.py describes the fields. The script is a module: it runs when all rows are read.

const TABLE_ROWS = 2000;  // longer tables take the browser seconds at each step of the slider
const BINS = 40;
const HISTOGRAM = { left: 34, right: 410, top: 20, bottom: 170 };  // the axes, in units of the drawing
const LANE = 14;  // height of the row of marks of each role, below the axis
const ROC = { left: 120, right: 300, top: 10, bottom: 185 };
const ROLES = {  // of references: what the legend says, and the mark, around (0, 0)
  "support": { label: "support, leave-one-out", mark: "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0" },
  "calibration": { label: "calibration", mark: "M-4 3.5L0 -4L4 3.5Z" },
  "known defect": { label: "known defects", mark: "M-4 -4L4 4M-4 4L4 -4" },
};
const DECISIONS = ["normal", "review", "defective"];
const FILTERS = {
  "all": () => true,
  "defective": row => decide(row) === "defective",
  "review": row => decide(row) === "review",
  "normal": row => decide(row) === "normal",
  "wrong decision": row => decide(row) === (isDefect(row) ? "normal" : "defective"),
};

const { threshold: initialThreshold, review, typical, adopt, references } = JSON.parse(byId("data").textContent);
const everything = [...document.querySelectorAll("script.row")].flatMap(takeRow);
const scored = everything.filter(row => row.score !== null);
const labelled = scored.some(row => row.defect_type !== null), timed = scored.some(row => row.time);
const days = [...new Set(everything.map(dayOf).filter(Boolean))].sort().reverse();
const defects = scored.filter(isDefect).length, goods = scored.length - defects;
const hasReview = [...scored, ...references].some(row => row.decision === "review") || (review !== null && review < initialThreshold);
const scoredReferences = references.filter(row => row.score !== null).sort((a, b) => b.score - a.score);
const lanes = Object.keys(ROLES).filter(role => scoredReferences.some(row => row.role === role));
const order = [...scored];  // as the table is sorted
const sorting = { key: "score", descending: true };
const enlarged = { list: [], index: 0 };  // what the dialog shows
let day = days.length > 1 ? days[0] : "";  // "": all
let rows = scored.filter(isOfDay);
let shown = [];  // the rows of the table
let filter = "all";
let threshold = initialThreshold;  // null: no decisions
let addressTimer;
const range = makeRange();

function byId(id) {
  return document.getElementById(id);
}

// The row of a script element, which is removed. None if the file ends in the middle of it.
function takeRow(element) {
  element.remove();
  try {
    return [JSON.parse(element.textContent)];
  } catch {
    return [];
  }
}

function isDefect(row) {
  return row.defect_type !== undefined && row.defect_type !== null && row.defect_type !== "good";
}

function dayOf(row) {
  return row.time?.slice(0, 10);
}

function isOfDay(row) {
  return !day || dayOf(row) === day;
}

// "normal", "review", "defective", or "" without a threshold.
function decide(row) {
  if (row.decision) return row.decision;
  if (threshold === null || row.score === null) return "";
  if (row.score > threshold) return "defective";
  return review !== null && row.score > review ? "review" : "normal";
}

function reasonOf(row) {
  return row.reason ?? (decide(row) === "review" ? "just below the threshold" : "");
}

function isFlagged(row) {
  return decide(row) === "defective";
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

function addNumber(tableRow, text, column = "") {
  add(tableRow, "td", { class: `number ${column}` }, text);
}

// The slider's range: all scores, the initial threshold, and a margin. It moves in steps of a power of ten, so that the
// number field shows exactly the value that scores are compared with.
function makeRange() {
  const sorted = [...scored, ...scoredReferences].map(row => row.score).sort((a, b) => a - b);
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

// The axes, and everything that the threshold does not change. Bars of labels are fixed, those of decisions are not.
function drawHistogram() {
  const svg = byId("histogram"), { left, right, top, bottom } = HISTOGRAM;
  const end = bottom + LANE * lanes.length;
  svg.setAttribute("viewBox", `0 0 420 ${end + 36 + 14 * lanes.length}`);
  add(svg, "g", { id: "bars" });
  drawBars();
  add(svg, "path", { d: `M${left} ${top}V${bottom}H${right}`, stroke: "currentColor", fill: "none" });
  const highest = byId("bars").dataset.highest;
  add(svg, "text", { x: left, y: 14 }, highest + (highest === "1" ? " image" : " images"));
  add(svg, "text", { x: left - 5, y: bottom + 4, "text-anchor": "end" }, 0);
  drawTicks(svg, end + 15);
  drawLegend(svg, end + 31);
  lanes.forEach((role, lane) => drawLane(svg, role, bottom + LANE * (lane + .5) + 1, end + 31 + 14 * (lane + 1)));
  const line = { stroke: "currentColor", "stroke-width": 2, "stroke-dasharray": "5 3" };
  add(svg, "line", { id: "mark", y1: top, y2: end, ...line });
}

// What the bars are split by: labels where they are known, else decisions.
function groupOf(row) {
  return labelled ? (isDefect(row) ? "defective" : "normal") : decide(row) || "normal";
}

function drawBars() {
  const group = byId("bars"), { left, right, top, bottom } = HISTOGRAM;
  const counts = DECISIONS.map(decision => countBins(row => groupOf(row) === decision));
  const totals = counts[0].map((_, bin) => counts.reduce((sum, of) => sum + of[bin], 0));
  const highest = Math.max(1, ...totals), width = (right - left) / BINS;
  group.dataset.highest = highest;
  group.replaceChildren();
  for (let bin = 0; bin < BINS; bin++) {
    let y = bottom;
    DECISIONS.forEach((decision, index) => {
      if (!counts[index][bin]) return;
      const height = (bottom - top) * counts[index][bin] / highest;
      y -= height;
      add(group, "rect", { x: left + .5 + width * bin, y, width: width - 1, height, class: `bar-${decision}` });
    });
  }
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
function drawTicks(svg, y) {
  const smallest = (range.end - range.start) / 6;
  const power = Number("1e" + Math.floor(Math.log10(smallest)));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= smallest);
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  for (let i = Math.ceil(range.start / step); scoreToX(i * step) < HISTOGRAM.right - 20; i++) {
    add(svg, "text", { x: scoreToX(i * step), y, "text-anchor": "middle", class: "tick" }, (i * step).toFixed(decimals));
  }
}

function drawLegend(svg, y) {
  add(svg, "text", { x: HISTOGRAM.left, y }, "score (distance)");
  const names = hasReview && !labelled ? DECISIONS : labelled || initialThreshold !== null ? ["normal", "defective"] : [];
  names.forEach((name, index) => {
    const x = HISTOGRAM.right - 78 * (names.length - index);
    add(svg, "rect", { x, y: y - 9, width: 10, height: 10, class: `key bar-${name}` });
    add(svg, "text", { x: x + 14, y }, name);
  });
}

// A mark for each reference of a role below the axis, and its entry in the legend.
function drawLane(svg, role, y, legendY) {
  const { label, mark } = ROLES[role], own = scoredReferences.filter(row => row.role === role);
  for (const row of own) {
    const place = { d: mark, class: "reference", transform: `translate(${scoreToX(row.score)} ${y})` };
    add(add(svg, "path", place), "title", {}, `${row.name}: ${formatScore(row.score)}`);
  }
  add(svg, "path", { d: mark, class: "key-mark", transform: `translate(${HISTOGRAM.left + 5} ${legendY - 4})` });
  add(svg, "text", { x: HISTOGRAM.left + 14, y: legendY }, `${label} (${own.length})`);
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
  const svg = byId("roc"), { left, right, top, bottom } = ROC, curve = rocCurve(rows);
  const points = list => list.map(([fpr, tpr]) => rocPoint(fpr, tpr)).map(({ x, y }) => `${x},${y}`).join(" ");
  const thin = { stroke: "var(--line)", fill: "none" };
  add(svg, "rect", { x: left, y: top, width: right - left, height: bottom - top, ...thin });
  add(svg, "polyline", { points: points([[0, 0], [1, 1]]), ...thin });
  add(svg, "polyline", { id: "curve", stroke: "var(--bad)", "stroke-width": 2, fill: "none", points: points(curve) });
  add(svg, "text", { x: (left + right) / 2, y: bottom + 16, "text-anchor": "middle" }, "false-positive rate, 0 to 1");
  add(svg, "text", { x: left - 8, y: 92, "text-anchor": "end" }, "true-positive");
  add(svg, "text", { x: left - 8, y: 107, "text-anchor": "end" }, "rate, 0 to 1");
  add(svg, "circle", { id: "dot", r: 4, fill: "currentColor" });
  byId("auroc").textContent = "AUROC " + formatArea(curve);
}

// [false-positive rate, true-positive rate] above every score of `list`, from (0, 0) to (1, 1).
function rocCurve(list) {
  const descending = [...list].sort((a, b) => b.score - a.score), curve = [[0, 0]];
  const positives = list.filter(isDefect).length, negatives = list.length - positives;
  let found = 0, falsePositives = 0;
  descending.forEach((row, index) => {
    if (isDefect(row)) found++; else falsePositives++;
    if (descending[index + 1]?.score !== row.score) curve.push([falsePositives / negatives, found / positives]);
  });
  return curve;
}

// The area under a curve, as the tables of all rounds show it.
function formatArea(curve) {
  let area = 0;
  curve.slice(1).forEach(([x, y], index) => { area += (x - curve[index][0]) * (y + curve[index][1]) / 2; });
  return area.toFixed(4);
}

// Tables

function makeTableRow(row, list) {
  const tableRow = document.createElement("tr"), open = () => enlarge(list(), row);
  const verb = row.panels.length ? "enlarge" : "details of";
  const button = add(add(tableRow, "td"), "button", { type: "button", class: "thumb", "aria-label": `${verb} ${row.name}` });
  if (row.thumbnail) add(button, "img", { src: row.thumbnail, alt: "", loading: "lazy" });
  else button.textContent = "no image";
  button.tabIndex = -1;
  row.button = button;
  row.tableRow = tableRow;
  tableRow.onclick = open;  // also Enter and space on the button
  row.cell = add(tableRow, "td");
  addWords(tableRow, row.name);
  return tableRow;
}

function addResult(tableRow, row) {
  addNumber(tableRow, row.score === null ? "" : formatScore(row.score));
  if (typical) addNumber(tableRow, row.score === null ? "" : formatRatio(row.score), "ratio");
}

function formatRatio(score) {
  return (score / typical).toFixed(2);
}

function makeImageRow(row) {
  const tableRow = makeTableRow(row, () => shown);
  if (labelled) addWords(tableRow, row.defect_type ?? "");
  addResult(tableRow, row);
  if (timed) add(tableRow, "td", { class: "time" }, formatTime(row.time));
  return tableRow;
}

// The day is said once if it is the only one.
function formatTime(time) {
  return (time ?? "").slice(days.length > 1 && !day ? 0 : 11, 19).replace("T", " ");
}

// Fills the table with the rows of the filter in the chosen order.
function fillTable() {
  const { key, descending } = sorting, sign = descending ? -1 : 1;
  order.sort((a, b) => sign * (a[key] < b[key] ? -1 : a[key] > b[key] ? 1 : 0));
  const chosen = order.filter(isOfDay).filter(FILTERS[filter]);
  shown = chosen.slice(0, TABLE_ROWS);
  for (const row of shown) if (!row.tableRow) makeImageRow(row);
  const body = byId("images").tBodies[0];
  body.replaceChildren(...shown.map(row => row.tableRow));
  makeOneTabStop(body);
  byId("left-out").hidden = chosen.length <= TABLE_ROWS;
  byId("left-out").textContent = `This table shows the first ${TABLE_ROWS} images in the chosen order. ` +
    `Figures and counts cover all ${rows.length}.`;
  for (const head of document.querySelectorAll("#images th[data-key]")) {
    if (head.dataset.key === key) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
  updateDecisions(shown);
}

// Sorts by a column. The column already sorted by changes its direction; scores begin with the highest.
function chooseColumn(key) {
  sorting.descending = key === sorting.key ? !sorting.descending : key === "score";
  sorting.key = key;
  fillTable();
}

function updateDecisions(list) {
  for (const row of list) {
    if (!row.cell) continue;
    const text = decide(row);
    row.tableRow.dataset.decision = text;
    row.cell.replaceChildren();
    if (text) add(row.cell, "span", { class: text }, text);
    if (reasonOf(row)) add(row.cell, "small", {}, reasonOf(row));
  }
}

function updateDefectTypes() {
  if (!labelled) return;
  const body = byId("defect-types").tBodies[0], normal = rows.filter(row => !isDefect(row));
  const withArea = Boolean(defects && goods);
  document.querySelector(".defect-type-auroc").hidden = !withArea;
  body.replaceChildren();
  for (const type of [...new Set(rows.map(row => row.defect_type))].sort()) {
    const own = rows.filter(row => row.defect_type === type), flagged = own.filter(isFlagged).length;
    const tableRow = add(body, "tr");
    addWords(tableRow, type ?? "");
    addNumber(tableRow, own.length);
    addNumber(tableRow, formatScore(own.reduce((sum, row) => sum + row.score, 0) / own.length));
    addNumber(tableRow, threshold === null ? "" : `${flagged} (${formatPercent(flagged, own.length)})`);
    if (withArea) addNumber(tableRow, isDefect(own[0]) ? formatArea(rocCurve([...normal, ...own])) : "");
  }
}

// One element of a table is reached by Tab; the arrow keys lead to the others.
function makeOneTabStop(body) {
  const buttons = [...body.querySelectorAll(".thumb")];
  buttons.forEach((button, index) => { button.tabIndex = index ? -1 : 0; });
}

function connectArrows(table) {
  table.tBodies[0].onkeydown = event => {
    const buttons = [...table.querySelectorAll(".thumb")], at = buttons.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || !buttons[to]) return;
    event.preventDefault();
    focusRow(buttons[to]);
  };
}

function focusRow(button) {
  for (const other of button.closest("tbody").querySelectorAll(".thumb[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
}

// The verdict: a count of each decision, which is also the choice of what the table shows.

function makeFilters() {
  const names = Object.keys(FILTERS).filter(
    name => (name !== "review" || hasReview) && (name !== "wrong decision" || (labelled && defects && goods)));
  for (const name of names) {
    add(byId("filters"), "button", { type: "button", "data-filter": name }).onclick = () => {
      filter = name;
      updateFilters();
      fillTable();
    };
  }
  if (scored.length < everything.length) add(byId("filters"), "p", { id: "unread" });
}

function updateFilters() {
  for (const button of byId("filters").querySelectorAll("button")) {
    const name = button.dataset.filter;
    button.disabled = threshold === null && name !== "all" && !rows.some(FILTERS[name]);
    if (button.disabled && filter === name) filter = "all";
    fillTile(button, button.disabled ? "\u2013" : rows.filter(FILTERS[name]).length, name);
  }
  for (const button of byId("filters").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.filter === filter);
  }
  document.body.dataset.filter = filter;
  if (byId("unread")) fillTile(byId("unread"), countUnread(), "not scored");
}

function fillTile(tile, count, name) {
  tile.replaceChildren();
  add(tile, "strong", {}, count);
  tile.append(" ", name);
}

function countUnread() {
  return everything.filter(row => row.score === null && isOfDay(row)).length;
}

// Days

function makeDays() {
  byId("day-part").hidden = days.length < 2;
  for (const name of ["", ...days]) {
    const count = everything.filter(row => !name || dayOf(row) === name).length;
    add(byId("day"), "option", { value: name }, `${name || "all"} (${count})`);
  }
  byId("day").value = day;
  byId("day").onchange = () => {
    day = byId("day").value;
    rows = scored.filter(isOfDay);
    for (const row of scored) row.tableRow = row.cell = undefined;  // their times are written otherwise
    byId("histogram").replaceChildren();
    drawHistogram();
    fillFailed();
    setThreshold(threshold);
    fillTable();
  };
}

// References and failed images

function fillReferences() {
  if (!references.length) return;
  const support = references.filter(row => row.role === "support"), withScore = row => row.score !== null;
  byId("support-part").hidden = !support.some(row => row.thumbnail);
  for (const row of support.filter(row => row.thumbnail)) {
    const verb = `enlarge support image ${row.name}`;
    const button = add(byId("support"), "button", { type: "button", class: "thumb", "aria-label": verb, title: row.name });
    add(button, "img", { src: row.panels[0]?.[1] ?? row.thumbnail, alt: "", loading: "lazy" });  // without a heat map
    button.onclick = () => enlarge(support, row);
  }
  byId("references-part").hidden = false;
  const list = [...scoredReferences, ...references.filter(row => row.score === null)];
  const body = byId("references").tBodies[0];
  for (const row of list) {
    const tableRow = makeTableRow(row, () => list);
    addWords(tableRow, row.role);
    addResult(tableRow, row);
    body.append(tableRow);
  }
  makeOneTabStop(body);
  byId("references-part").open = references.length <= 10;
  const counts = Object.keys(ROLES).map(role => [references.filter(row => row.role === role).length, role]);
  byId("references-count").textContent = counts.filter(([count]) => count).map(countRole).join(", ");
  const normal = references.filter(row => withScore(row) && row.role !== "known defect").map(row => row.score);
  byId("normal-range").hidden = !normal.length;
  byId("normal-range").textContent = `Scores of ${normal.length} normal images: ` +
    `${formatScore(Math.min(...normal))} to ${formatScore(Math.max(...normal))}.`;
}

function countRole([count, role]) {
  return role === "known defect" ? `${count} known defect${count === 1 ? "" : "s"}` : `${count} ${role}`;
}

function fillFailed() {
  const withError = everything.filter(row => row.error && isOfDay(row));
  byId("failed").replaceChildren();
  byId("failed-part").hidden = !withError.length;
  for (const row of withError) {
    const item = add(byId("failed"), "li");
    addBreakable(item, row.name);
    item.append(": ", row.error ?? "");
  }
}

// The enlarged view

function enlarge(list, row) {
  enlarged.list = list;
  showLarge(list.indexOf(row));
  byId("large").showModal();
}

function showLarge(index) {
  enlarged.index = index;
  const row = enlarged.list[index], decision = decide(row);
  byId("large-name").replaceChildren();
  addBreakable(byId("large-name"), row.name);
  const label = row.role ?? (labelled ? row.defect_type : null);
  const ratio = typical && row.score !== null ? `${formatRatio(row.score)} times a typical normal score` : "";
  const limit = threshold === null ? "" : `threshold ${formatScore(threshold)}`;
  const result = byId("large-result");
  result.replaceChildren();
  if (decision) add(result, "span", { class: decision }, decision);
  if (reasonOf(row)) result.append(`: ${reasonOf(row)}`);
  const time = row.time ? row.time.slice(0, 19).replace("T", " ") : "";
  const texts = [row.score === null ? "no score" : `score ${formatScore(row.score)}`, ratio, limit, label ?? "", time];
  result.append((decision ? ", " : "") + texts.filter(Boolean).join(", "));
  byId("large-error").hidden = !row.error;
  byId("large-error").textContent = row.error ?? "";
  byId("place").textContent = `${index + 1} of ${enlarged.list.length}`;
  byId("previous").disabled = index === 0;
  byId("next").disabled = index === enlarged.list.length - 1;
  if (document.activeElement.disabled) byId("close").focus();
  showPanels(row);
  showBoxes(row.boxes ?? []);
}

function showPanels(row) {
  byId("panels").replaceChildren();
  for (const [title, image] of row.panels) {
    const figure = add(byId("panels"), "figure");
    add(figure, "figcaption", {}, title);
    add(figure, "img", { src: image, alt: `${title} of ${row.name}` });
  }
  if (!row.panels.length) add(byId("panels"), "p", {}, "This page holds no view of this image.");
}

function showBoxes(boxes) {
  byId("boxes").hidden = !boxes.length;
  const body = byId("boxes").tBodies[0];
  body.replaceChildren();
  boxes.forEach(([x, y, width, height, area, peak], index) => {
    const tableRow = add(body, "tr");
    add(tableRow, "td", {}, index + 1);
    for (const text of [`${x}, ${y}`, `${width} \u00D7 ${height}`, area, formatScore(peak)]) addNumber(tableRow, text);
  });
}

function step(by) {
  const index = enlarged.index + by;
  if (enlarged.list[index]) showLarge(index);
}

function connectDialog() {
  const dialog = byId("large");
  byId("previous").onclick = () => step(-1);
  byId("next").onclick = () => step(1);
  dialog.onkeydown = event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    step(by);
  };
  dialog.onclose = () => {  // back to the row that was shown last
    const row = enlarged.list[enlarged.index];
    if (row.button?.isConnected && document.activeElement.closest("tbody")) focusRow(row.button);
  };
}

// Threshold

// Recounts everything for a threshold, or for none.
function setThreshold(value) {
  threshold = value;
  if (byId("day-said") && days.length) byId("day-said").textContent = `, ${day || [...new Set([days.at(-1), days[0]])].join(" to ")}`;
  byId("slider").value = threshold ?? range.highestScore;
  showMoved();
  const flagged = rows.filter(isFlagged), found = flagged.filter(isDefect).length;
  byId("counts").textContent = describeCounts(flagged.length, found);
  moveMarks(found, flagged.length - found);
  if (!labelled) drawBars();
  updateDefectTypes();
  updateFilters();
  if (filter === "all") updateDecisions(shown);
  else fillTable();
  updateDecisions(references);
}

function describeCounts(flagged, found) {
  const known = references.filter(row => row.role === "known defect");
  const hits = known.filter(row => ["defective", "review"].includes(decide(row))).length;
  const unsure = rows.filter(FILTERS.review).length, unread = countUnread();
  const others = (unsure ? `; ${unsure} for review` : "") + (unread ? `; ${unread} not scored` : "") +
    (known.length && threshold !== null ? `; ${hits} of ${known.length} known defects found` : "");
  if (threshold === null) return "no threshold: move the slider or enter a number" + others;
  const text = `${flagged} of ${rows.length} flagged as defective${others}`;
  if (!labelled) return text;
  const falsePositives = flagged - found, rate = goods ? ` (false-positive rate ${formatPercent(falsePositives, goods)})` : "";
  return `${text}; ${found} of ${defects} defects found, ${falsePositives} of ${goods} false positives${rate}`;
}

// Places the threshold in the histogram and on the ROC curve.
function moveMarks(found, falsePositives) {
  const line = byId("mark"), dot = byId("dot");  // no dot without a ROC curve
  for (const mark of [line, dot]) if (mark) mark.style.display = threshold === null ? "none" : "";
  if (threshold === null) return;
  for (const end of ["x1", "x2"]) line.setAttribute(end, scoreToX(threshold));
  if (!dot) return;
  const { x, y } = rocPoint(falsePositives / goods, found / defects);
  dot.setAttribute("cx", x);
  dot.setAttribute("cy", y);
}

function showNumber(value) {
  byId("number").value = value === null ? "" : Number(value.toFixed(range.digits + 2));
  byId("number").removeAttribute("aria-invalid");
}

function resetThreshold() {
  showNumber(initialThreshold);
  setThreshold(initialThreshold);
}

// A moved threshold is kept in the address, so that it survives a reload and can be passed on.
function showMoved() {
  const isMoved = threshold !== initialThreshold;
  byId("moved").hidden = !isMoved;
  if (byId("adopt")) byId("adopt").textContent = adopt.replace("{}", threshold ?? "");
  clearTimeout(addressTimer);  // browsers refuse many changes of the address
  addressTimer = setTimeout(() => {
    history.replaceState(null, "", isMoved ? `#threshold=${threshold}` : location.href.split("#")[0]);
  }, 200);
}

function storedThreshold() {
  const found = Number(new URLSearchParams(location.hash.slice(1)).get("threshold") ?? NaN);
  return Number.isFinite(found) ? found : initialThreshold;
}

// The number that was typed, with a point or a comma; null for none, NaN for anything else.
function typedNumber() {
  const text = byId("number").value.trim().replace(",", ".");
  return text === "" ? null : Number(text);
}

function connectControls() {
  const slider = byId("slider"), number = byId("number");
  Object.assign(slider, { min: range.start, max: range.end, step: range.step });
  slider.oninput = () => {
    number.value = slider.value;
    number.removeAttribute("aria-invalid");
    setThreshold(Number(slider.value));
  };
  number.onchange = () => {
    const typed = typedNumber();
    if (typed === null) return resetThreshold();
    number.toggleAttribute("aria-invalid", !Number.isFinite(typed));
    if (Number.isFinite(typed)) setThreshold(typed);
    else byId("counts").textContent = `${number.value} is not a number`;
  };
  byId("reset").onclick = resetThreshold;
  window.onbeforeprint = () => document.querySelectorAll("img[loading=lazy]").forEach(img => { img.loading = "eager"; });
  for (const button of document.querySelectorAll("#images th button")) {
    button.onclick = () => chooseColumn(button.parentElement.dataset.key);
  }
  connectArrows(byId("images"));
  connectArrows(byId("references"));
  connectDialog();
}

const heading = document.querySelector("h1");
heading.replaceChildren();
addBreakable(heading, document.title);
byId("defect-types-part").hidden = document.querySelector("#images .defect-type").hidden = !labelled;
for (const head of document.querySelectorAll("th.ratio")) head.hidden = !typical;
document.querySelector("th.time").hidden = !timed;
connectControls();
drawHistogram();
drawRoc();
fillReferences();
fillFailed();
makeFilters();
makeDays();
fillTable();
const stored = storedThreshold();
showNumber(stored);
setThreshold(stored);
