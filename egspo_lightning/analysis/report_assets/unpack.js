"use strict";
// Unpacks the embedded data and Plotly, then draws. Text of the runs reaches the page through textContent alone.

/** Makes an element: make("p", {class: "note"}, "text", child, ...). */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** Makes a select with a label: options are pairs of value and text. */
function makeSelect(label, options, onchange) {
  const select = make("select", {}, ...options.map(([value, text]) => make("option", {value}, text)));
  select.addEventListener("change", () => onchange(select.value));
  return [make("label", {}, label + " ", select), select];
}

async function unpack(id) {
  const packed = atob(document.getElementById(id).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let i = 0; i < packed.length; i++) bytes[i] = packed.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

async function start() {
  const data = JSON.parse(await unpack("data"));
  performance.mark("data");
  if (data.completions) showCompletions(data);
  performance.mark("completions");
  const plotly = await unpack("plotly");
  performance.mark("plotly unpacked");
  document.head.append(make("script", {}, plotly));  // its hash is in the content security policy
  performance.mark("plotly");
  await drawCharts(data);
  performance.mark("charts");
  document.body.dataset.ready = "yes";
}

document.addEventListener("DOMContentLoaded", start);
