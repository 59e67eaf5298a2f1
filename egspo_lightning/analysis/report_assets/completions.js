// Completions: one rollout batch or one problem at a time, grouped by problem, with a hover box for each token.

const VERDICTS = {all: "right and wrong", right: "right only", wrong: "wrong only"};
const COLOR_NAMES = {entropy: "entropy", phi: "phi", token_weight: "weight", advantage: "advantage"};
const UNITS = {entropy: " nats"};
const ORANGE = "230 120 0", BLUE = "0 114 178";
const DARKEST = 0.85;  // dark text on it keeps a contrast above 5 to 1

function showCompletions(data) {
  const all = data.completions;
  const rows = all.completions;
  const starts = [0];
  for (const length of rows.length) starts.push(starts[starts.length - 1] + length);
  const state = {run: rows.run[0], by: "batch", page: 0, verdict: "all", color: "entropy", pages: []};
  const view = {data, all, rows, starts, state};
  const render = () => renderPage(view);
  const repage = () => { state.pages = pagesOf(view); state.page = Math.min(state.page, state.pages.length - 1); render(); };
  view.tools = completionTools(view, render, repage);
  state.pages = pagesOf(view);
  watchTokens(view);
  render();
}

/** Lists the row numbers of each page: a rollout batch of a run, or a problem in all its rollout batches. */
function pagesOf({rows, state}) {
  const keys = state.by === "batch" ? rows.batch : rows.problem;
  const pages = new Map();
  rows.run.forEach((run, row) => {
    if (run !== state.run) return;
    if (!pages.has(keys[row])) pages.set(keys[row], []);
    pages.get(keys[row]).push(row);
  });
  return [...pages.values()];
}

function completionTools(view, render, repage) {
  const {data, rows, state} = view;
  const place = document.getElementById("completion-tools");
  const set = (name, act) => value => { state[name] = value; act(); };
  const turn = by => () => { state.page = Math.max(0, Math.min(state.page + by, state.pages.length - 1)); render(); };
  const slider = make("input", {type: "range", min: 0, step: 1, "aria-label": "page"});
  slider.addEventListener("input", () => { state.page = Number(slider.value); render(); });
  const label = make("output", {});
  const back = make("button", {type: "button", onclick: turn(-1), "aria-label": "back"}, "\u2190");
  const next = make("button", {type: "button", onclick: turn(1), "aria-label": "next"}, "\u2192");
  const runs = [...new Set(rows.run)].map(run => [run, data.runs[run]]);
  const [run] = makeSelect("run", runs, value => { state.run = Number(value); state.page = 0; repage(); });
  const kinds = [["batch", "rollout batch"], ["problem", "problem"]];
  const [by] = makeSelect("page by", kinds, value => { state.by = value; state.page = 0; repage(); });
  const [verdict] = makeSelect("show", Object.entries(VERDICTS), set("verdict", render));
  const [color] = makeSelect("color by", Object.entries(COLOR_NAMES), set("color", render));
  const scale = make("span", {class: "scale"});
  const choices = make("div", {}, ...(runs.length > 1 ? [run] : []), by, verdict, color, scale);
  place.append(make("div", {}, back, slider, next, label), choices);
  return {slider, label, scale};
}

function renderPage(view) {
  const {all, rows, state, tools} = view;
  const page = state.pages[state.page];
  const isShown = row => state.verdict === "all" || (state.verdict === "right") === Boolean(rows.right[row]);
  const groups = new Map();
  for (const row of page) {
    const key = `${rows.batch[row]} ${rows.problem[row]}`;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  tools.slider.max = state.pages.length - 1;
  tools.slider.value = state.page;
  tools.label.textContent = pageLabel(view, page);
  renderScale(view);
  const made = [...groups.values()].filter(group => group.some(isShown)).map(group => groupOf(view, group, isShown));
  const none = make("p", {}, `No completion of this page is ${state.verdict}.`);
  document.getElementById("problems").replaceChildren(...(made.length ? made : [none]));
  document.getElementById("hover").hidden = true;
}

function pageLabel({rows, state}, page) {
  const right = page.filter(row => rows.right[row]).length;
  const first = page[0];
  const where = `rollout batch ${rows.batch[first]}, after ${rows.steps[first]} optimizer steps`;
  const what = state.by === "batch" ? where : `problem ${state.page + 1} of ${state.pages.length}`;
  return `${what}: ${right} of ${page.length} right`;
}

function groupOf(view, group, isShown) {
  const {all, rows, state} = view;
  const right = group.filter(row => rows.right[row]).length;
  const facts = make("div", {class: "facts"}, `gold answer: ${rows.gold[group[0]]}`, make("b", {}, `${right} of ${group.length} right`));
  if (state.by === "problem") facts.prepend(`rollout batch ${rows.batch[group[0]]}`);
  const problem = make("div", {class: "problem", dir: "auto"}, all.problems[rows.problem[group[0]]]);
  const made = group.filter(isShown).map(row => completionOf(view, row));
  return make("section", {class: "group"}, problem, facts, make("div", {class: "completions"}, ...made));
}

function completionOf(view, row) {
  const {rows} = view;
  const notes = [
    rows.right[row] ? "right" : "wrong",
    rows.extracted[row] === null ? "no answer found" : `answer ${rows.extracted[row]}`,
    `reward ${rows.reward[row]}`,
    `${rows.length[row]} tokens`,
    ...(rows.truncated[row] ? ["cut at the length limit"] : []),
    ...(rows.masked[row] ? ["masked: not in the loss"] : []),
  ];
  const text = make("div", {class: "text", dir: "auto"});
  for (let i = view.starts[row]; i < view.starts[row + 1]; i++) text.append(tokenOf(view, row, i));
  const verdict = make("div", {class: "verdict", dir: "auto"}, notes.join(" \u00b7 "));
  return make("article", {class: rows.right[row] ? "completion right" : "completion"}, verdict, text);
}

function tokenOf({all, state}, row, i) {
  const token = make("span", {class: all.tokens.high[i] === "1" ? "t high" : "t"}, all.texts[all.tokens.text[i]] || "\u2205");
  const share = Math.max(-1, Math.min((all.tokens[state.color][i] ?? 0) / all.scales[state.color], 1));
  token.style.backgroundColor = colorOf(share);
  token.dataset.row = row;
  token.dataset.token = i;
  return token;
}

function colorOf(share) {
  return `rgb(${share < 0 ? BLUE : ORANGE} / ${(DARKEST * Math.abs(share)).toFixed(2)})`;
}

function renderScale({all, state, tools}) {
  const most = all.scales[state.color], unit = UNITS[state.color] || "";
  const bar = make("i", {class: "bar"});
  const isSigned = state.color === "advantage";
  bar.style.background = `linear-gradient(90deg, ${(isSigned ? [-1, 0, 1] : [0, 1]).map(colorOf).join(", ")})`;
  tools.scale.replaceChildren(isSigned ? `-${most}` : "0", bar, `${most}${unit} and more`);
}

/** Opens the hover box over tokens. */
function watchTokens(view) {
  const box = document.getElementById("hover");
  const place = document.getElementById("problems");
  place.addEventListener("mouseover", event => {
    const token = event.target.closest(".t");
    box.hidden = !token;
    if (!token) return;
    box.textContent = valuesOf(view, Number(token.dataset.row), Number(token.dataset.token)).join("\n");
    const at = token.getBoundingClientRect();
    const below = at.bottom + 6 + box.offsetHeight < innerHeight;
    box.style.left = `${Math.max(4, Math.min(at.left, innerWidth - box.offsetWidth - 8))}px`;
    box.style.top = `${below ? at.bottom + 6 : Math.max(4, at.top - box.offsetHeight - 6)}px`;
  });
  place.addEventListener("mouseleave", () => { box.hidden = true; });
  addEventListener("scroll", () => { box.hidden = true; }, {passive: true});
}

function valuesOf({data, all, rows, starts}, row, i) {
  const {tokens} = all;
  const width = Math.max(...data.fields.map(field => field.label.length)) + 1;
  const gate = rows.masked[row] ? "masked" : tokens.high[i] === "1" ? "high" : "low";
  const text = all.texts[tokens.text[i]].replaceAll(" ", "\u2423").replaceAll("\n", "");
  const valueOf = ({column}) => column in tokens ? tokens[column][i] : rows[column][row];
  const line = (label, value) => label.padEnd(width) + value;
  return [
    `token \u201c${text}\u201d, id ${tokens.id[i]}`,
    line("position", i - starts[row]),
    line("gate", data.gates[gate]),
    ...data.fields.map(field => line(field.label, `${valueOf(field) ?? "not finite"} ${field.unit}`.trim())),
    `problem ${rows.problem_id[row]}, completion ${rows.id[row]}`,
  ];
}
