// Curves of all runs: zoom, smoothing, and a common axis of steps, tokens or hours.

const AXES = [["step", "steps"], ["tokens", "tokens seen"], ["hours", "hours of training"]];
const EXACT = ["learning_rate", "goodput"]; // nothing to smooth
const FEW = 20; // values, which are shown as they are

// The exponential moving average without the bias of its start, as TensorBoard has it.
function smoothed(values, decay) {
  let sum = 0, weight = 0;
  return values.map((v) => {
    sum = decay * sum + (1 - decay) * v;
    weight = decay * weight + (1 - decay);
    return sum / weight;
  });
}

function interpolate(x, from, to) {
  let low = 0, high = from.length - 1;
  if (high < 0) return null;
  if (x <= from[0]) return from[0] > 0 && to[0] !== null ? to[0] * x / from[0] : to[0];
  if (x >= from[high]) return to[high];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (from[middle] <= x) low = middle; else high = middle;
  }
  if (to[low] === null || to[high] === null) return null;
  return to[low] + (to[high] - to[low]) * (x - from[low]) / (from[high] - from[low]);
}

// One standard error to either side of a curve.
function band(x, trace, fillcolor) {
  const edge = (sign) => trace.y.map((y, i) => y + sign * (trace.error[i] || 0));
  return {
    x: [...x, ...x.toReversed()], y: [...edge(1), ...edge(-1).toReversed()], mode: "lines", line: { width: 0 },
    fill: "toself", fillcolor, opacity: 0.2, hoverinfo: "skip", showlegend: false,
  };
}

class Curves {
  constructor(page) {
    this.page = page;
    this.axis = "step";
    this.smoothing = 0.6;
    this.isLog = false;
    this.hidden = new Set();
    this.plots = new Map(); // chart -> node
    this.range = null;
    this.isFollowing = false;
  }

  section() {
    const { charts, runs } = this.page;
    const slider = element("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: this.smoothing, ariaLabel: "smoothing" });
    const value = element("span", {}, String(this.smoothing));
    slider.addEventListener("input", () => {
      this.smoothing = Number(slider.value);
      value.textContent = slider.value;
      this.drawAll();
    });
    const reset = element("button", {}, "reset zoom");
    reset.addEventListener("click", () => { this.range = null; this.drawAll(); });
    const controls = element("div", { class: "controls" },
      choice("over", AXES, this.axis, (axis) => { this.axis = axis; this.range = null; this.drawAll(); }),
      element("label", {}, "smoothing", slider, value),
      checkbox("log scale", this.isLog, (on) => { this.isLog = on; this.drawAll(); }),
      reset);
    const card = (chart) => {
      const node = element("div", { class: "plot" });
      this.plots.set(chart, node);
      const unit = chart.unit ? element("span", { class: "note" }, " · " + chart.unit) : null;
      return element("div", {}, element("h3", {}, chart.title, unit), node);
    };
    const more = charts.filter((c) => !c.main);
    const rest = element("details", {}, element("summary", {}, `${more.length} more curves`),
      element("div", { class: "grid" }, ...more.map(card)));
    rest.addEventListener("toggle", () => this.drawAll());
    const [first] = runs;
    const marks = runs.length > 1 ? ["dotted: validation"] : [];
    if (runs.length === 1 && first.starts.length > 1) marks.push("dotted lines: restarts of the run");
    if (runs.length === 1 && first.skipped.length) marks.push("red lines: windows with skipped updates");
    return [
      controls,
      element("p", { class: "note" }, ["Drag over a curve to zoom all of them, double-click to go back; thin: every value (of long runs the lowest and highest of each interval), bold: smoothed", ...marks].join("; ") + "."),
      runs.length > 1 ? this.legend() : null,
      element("div", { class: "grid" }, ...charts.filter((c) => c.main).map(card)),
      more.length ? rest : null,
    ];
  }

  legend() {
    return element("div", { class: "parts" }, ...this.page.runs.map((run, i) => {
      const label = checkbox("", true, (on) => {
        if (on) this.hidden.delete(i); else this.hidden.add(i);
        this.drawAll();
      });
      label.append(element("span", { class: "dot", style: `background:${color(i)};margin-left:4px` }), run.name);
      return label;
    }));
  }

  x(run, steps) {
    if (this.axis === "step") return steps;
    const { step } = run.scales;
    return steps.map((s) => interpolate(s, step, run.scales[this.axis]));
  }

  traces(chart) {
    const found = [], { runs } = this.page;
    runs.forEach((run, i) => {
      if (this.hidden.has(i)) return;
      const own = run.charts[chart.id] || [];
      const evals = own.filter((t) => t.kind === "eval");
      own.forEach((trace) => {
        const number = trace.kind === "train" ? 0 : 1 + evals.indexOf(trace);
        const name = runs.length === 1 ? trace.name : own.length > 1 ? `${run.name}: ${trace.name}` : run.name;
        const line = { color: color(runs.length === 1 ? number : i), width: 2 };
        const common = { name, line, hovertemplate: "%{y:.5g}<extra>%{fullData.name}</extra>" };
        if (trace.kind === "eval") {
          line.dash = runs.length > 1 && own.some((t) => t.kind === "train") ? "dot" : "solid";
          const x = this.x(run, trace.x);
          if (trace.error) found.push(band(x, trace, line.color));
          found.push({ ...common, x, y: trace.y, mode: "lines+markers", marker: { size: 5 } });
        } else if (this.smoothing === 0 || EXACT.includes(chart.id) || trace.y.length < FEW) {
          found.push({ ...common, x: this.x(run, trace.x), y: trace.y, mode: trace.y.length < 4 ? "lines+markers" : "lines" });
        } else {
          found.push({ x: this.x(run, trace.x), y: trace.y, mode: "lines", line: { ...line, width: 1 }, opacity: 0.3, hoverinfo: "skip", showlegend: false });
          found.push({ ...common, x: this.x(run, trace.mx || trace.x), y: smoothed(trace.my || trace.y, this.smoothing), mode: "lines" });
        }
      });
    });
    return found;
  }

  tickFormat(traces) {
    return traces.some((t) => t.y.some((v) => v >= 1e4)) ? "~s" : ".4~g"; // 25k; and 0.0003, not 300µ
  }

  // The range of values without the first ones of a loss, which are far above all others.
  yRange(chart, traces) {
    if (chart.id !== "loss" || this.isLog) return {};
    const values = traces.flatMap((t) => t.y).filter((v) => v !== null).sort((a, b) => a - b);
    if (values.length < 20) return {};
    const [low, high] = [values[0], values[Math.floor(0.97 * (values.length - 1))]];
    const pad = 0.05 * (high - low || 1);
    return { range: [low - pad, high + pad] };
  }

  marks(chart) {
    const [run] = this.page.runs;
    if (this.page.runs.length > 1 || !["loss", "grad_norm"].includes(chart.id)) return [];
    const line = (step, more) => {
      const [x] = this.x(run, [step]);
      return { type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, layer: "below", line: { width: 1, ...more } };
    };
    return [
      ...run.starts.slice(1, 60).map((s) => line(s.from, { color: style("--faint"), dash: "dot" })),
      ...run.skipped.slice(0, 60).map((s) => line(s, { color: style("--bad") })),
    ];
  }

  drawAll() {
    for (const [chart, node] of this.plots) {
      if (node.offsetParent === null) continue; // below "more", which is closed
      const traces = this.traces(chart);
      const title = AXES.find(([id]) => id === this.axis)[1];
      const many = traces.length > 12;
      draw(node, traces, {
        xaxis: { title: { text: title, font: { size: 11 } }, ...(this.range ? { range: this.range } : {}) },
        yaxis: { type: this.isLog ? "log" : "linear", tickformat: this.tickFormat(traces), ...this.yRange(chart, traces) },
        hovermode: many ? "closest" : "x unified",
        showlegend: this.page.runs.length === 1 && traces.filter((t) => t.name).length > 1,
        legend: { x: 1, xanchor: "right", y: 1, font: { size: 11 }, bgcolor: "rgba(0,0,0,0)" },
        shapes: this.marks(chart),
      });
      if (!node.follows) {
        node.follows = true;
        node.on("plotly_relayout", (event) => this.follow(node, event));
      }
    }
  }

  follow(source, event) {
    if (this.isFollowing) return;
    const [low, high] = [event["xaxis.range[0]"], event["xaxis.range[1]"]];
    if (low === undefined && !event["xaxis.autorange"]) return;
    this.range = low === undefined ? null : [low, high];
    this.isFollowing = true;
    const changes = [...this.plots.values()].filter((n) => n !== source && n.offsetParent !== null).map((n) =>
      Plotly.relayout(n, this.range ? { "xaxis.range": [...this.range] } : { "xaxis.autorange": true }));
    Promise.all(changes).then(() => { this.isFollowing = false; });
  }
}
