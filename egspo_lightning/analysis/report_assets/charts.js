// Charts: a card a chart, an x axis for all, and a switch for each run.

const PLOTLY_OPTIONS = {
  responsive: true,
  displaylogo: false,
  modeBarButtons: [["toImage", "resetScale2d"]],
};
const FIRST_ROW = 3;
const X_AXES = {steps: "optimizer steps", batches: "rollout batches"};
const COLORS_OF_DASHES = {solid: "solid", dash: "dashed", dot: "dotted"};

async function drawCharts(data) {
  const place = document.getElementById("charts");
  const state = {x: "steps", hidden: new Set()};
  place.replaceChildren();
  if (!data.charts.length) place.append(make("p", {}, "No metrics were logged."));
  const cards = data.charts.map(chart => card(chart, place));
  const redraw = () => cards.forEach(one => draw(one, state));
  if (cards.length) chartTools(data, state, redraw);
  for (const [number, one] of cards.entries()) {
    draw(one, state);
    if (number === FIRST_ROW - 1) performance.mark("first charts");
    if (number >= FIRST_ROW - 1) await new Promise(resolve => setTimeout(resolve));  // the page stays responsive
  }
}

function card(chart, place) {
  const plot = make("div", {class: "plot"});
  const key = chart.lines.map(line => {
    const sample = make("i", {});
    sample.style.borderTop = `2px ${COLORS_OF_DASHES[line.dash]} ${line.color}`;
    return make("span", {}, sample, line.label);
  });
  const about = make("div", {class: "key"}, make("span", {}, chart.unit), ...key);
  place.append(make("article", {class: "card"}, make("h3", {}, chart.title), about, plot));
  const shown = chart.figure.data.map(trace => ({...trace, steps: trace.x, batches: trace.meta.batches}));
  return {plot, traces: shown, layout: chart.figure.layout};
}

function draw({plot, traces, layout}, state) {
  const data = traces.filter(trace => !state.hidden.has(trace.meta.run)).map(trace => ({...trace, x: trace[state.x]}));
  const marks = state.x === "steps" ? layout.shapes || [] : [];
  const shapes = marks.filter(shape => !state.hidden.has(Number(shape.name)));
  const title = {text: X_AXES[state.x], standoff: 6, font: {size: 11}};
  Plotly.react(plot, data, {...layout, shapes, xaxis: {...layout.xaxis, title}}, PLOTLY_OPTIONS);
}

function chartTools(data, state, redraw) {
  const tools = document.getElementById("chart-tools");
  const [axis] = makeSelect("over", Object.entries(X_AXES), value => { state.x = value; redraw(); });
  const colors = [...document.querySelectorAll(".run")].map(run => run.style.getPropertyValue("--run"));
  const switches = data.runs.map((name, number) => {
    const box = make("input", {type: "checkbox", checked: true});
    box.addEventListener("change", () => {
      box.checked ? state.hidden.delete(number) : state.hidden.add(number);
      redraw();
    });
    const sample = make("i", {class: "swatch"});
    sample.style.background = colors[number];
    return make("label", {}, box, sample, name);
  });
  tools.append(...(data.runs.length > 1 ? switches : []), axis);
  tools.hidden = false;
}
