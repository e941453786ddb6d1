"use strict";
// Elements, tables and numbers. Text is only ever set as text.

const COLORS = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#9d755d", "#eeca3b",
  "#ff9da6", "#7f7f7f"];
const color = (i) => COLORS[i] || `hsl(${Math.round(137.5 * i) % 360} 55% 50%)`;

function element(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(settings)) {
    if (key === "class") node.className = value;
    else if (key === "style") node.style.cssText = value;
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function unpack(id) {
  const text = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

function show(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  for (const [limit, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"]]) {
    if (size >= limit) return Number((value / limit).toPrecision(digits)) + letter;
  }
  if (Number.isInteger(value)) return value.toLocaleString("en");
  if (size > 0 && size < 1e-3) return value.toExponential(digits - 2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(digits)));
}

function showBytes(count) {
  return count >= 2 ** 30 ? (count / 2 ** 30).toFixed(2) + " GiB" : (count / 2 ** 20).toFixed(1) + " MiB";
}

const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
const moment = (text) => (text ? text.slice(0, 19).replace("T", " ") : "–");

// columns: [{title, get(row) -> text, number or node; code, key, wide: classes of its cells; sort(row)}].
function table(columns, rows, { sorts = false, classOf = () => "" } = {}) {
  const body = element("tbody");
  const isNumber = columns.map((c) => rows.length > 0 && rows.every((r) => {
    const v = c.get(r);
    return v === null || v === undefined || typeof v === "number";
  }));
  const fill = (ordered) => {
    body.replaceChildren(...ordered.map((row) => element("tr", { class: classOf(row) },
      ...columns.map((c, i) => {
        const value = c.get(row);
        const kind = [isNumber[i] && "number", c.code && "code", c.key && "key", c.wide && "wide"].filter(Boolean).join(" ");
        return element("td", { class: kind }, value instanceof Node ? value : show(value, c.digits));
      }))));
  };
  let sorted = null, ascending = true;
  const heads = columns.map((c, i) => {
    const head = element("th", { class: (isNumber[i] ? "number " : "") + (sorts ? "sorts" : "") }, c.title);
    if (c.hint) head.title = c.hint;
    if (sorts) {
      head.addEventListener("click", () => {
        ascending = sorted === i ? !ascending : true;
        sorted = i;
        const value = c.sort || c.get;
        const known = rows.filter((r) => typeof value(r) !== "object" && value(r) !== undefined);
        const rest = rows.filter((r) => !known.includes(r));
        known.sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return ascending ? order : -order;
        });
        heads.forEach((h, j) => { h.textContent = columns[j].title + (j === i ? (ascending ? " ▲" : " ▼") : ""); });
        fill([...known, ...rest]);
      });
    }
    return head;
  });
  fill(rows);
  return element("div", { class: "wide" }, element("table", {}, element("thead", {}, element("tr", {}, ...heads)), body));
}

function choice(title, options, chosen, changed) {
  const select = element("select", {}, ...options.map(([value, text]) =>
    element("option", { value, selected: value === chosen }, text)));
  select.addEventListener("change", () => changed(select.value));
  return element("label", {}, title, select);
}

function checkbox(title, checked, changed) {
  const box = element("input", { type: "checkbox", checked });
  box.addEventListener("change", () => changed(box.checked));
  return element("label", {}, box, title);
}

// ---- Plotly in the colors of the page ----

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function layout(more = {}) {
  const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), automargin: true };
  const { xaxis = {}, yaxis = {}, ...rest } = more;
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: style("--text"), size: 12, family: "system-ui, sans-serif" },
    margin: { l: 52, r: 12, t: 24, b: 36 }, showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: style("--faint"), activecolor: style("--accent") },
    hoverlabel: { bgcolor: style("--card"), bordercolor: style("--line"), font: { color: style("--text") } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

// A list of buttons, since one of Plotly's own sends the data of a chart to its makers.
const BUTTONS = [["toImage", "zoomIn2d", "zoomOut2d", "resetScale2d"]];
const OPTIONS = { responsive: true, displaylogo: false, modeBarButtons: BUTTONS, plotlyServerURL: "" };

function draw(node, traces, more, options = {}) {
  return Plotly.react(node, traces, layout(more), { ...OPTIONS, ...options });
}

const legendBelow = { orientation: "h", x: 0, y: -0.18, yanchor: "top", font: { size: 11 } };
