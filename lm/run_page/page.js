// The sections of the page.

const PHASES = {
  step: ["training", "#54a24b"], redone: ["training, done again later", "#f58518"],
  evaluate: ["evaluating", "#72b7b2"], save: ["saving", "#4c78a8"], data: ["waiting for data", "#eeca3b"],
  restore: ["reading a checkpoint", "#9d755d"], investigate: ["looking into a bad step", "#ff9da6"],
  init: ["making the first state", "#7f7f7f"], compile: ["compiling", "#b279a2"], start: ["starting", "#bab0ac"],
  down: ["nothing ran", "#e45756"],
};
const KINDS = { compute: "#54a24b", communication: "#f58518", host: "#4c78a8", idle: "#bab0ac" };

function section(id, title, about, ...content) {
  return element("section", { id }, element("h2", {}, title), about ? element("p", { class: "note" }, about) : null, ...content);
}

function badge(kind, text) {
  return element("span", { class: `state ${kind}` }, text || kind);
}

function warningList(run) {
  return run.warnings.map((w) => element("div", { class: `warning ${w.level}` },
    element("b", {}, w.title), w.text ? element("pre", {}, w.text) : null));
}

function tiles(run) {
  return element("div", { class: "tiles" }, ...run.summary.map(([label, value, note]) =>
    element("div", { class: "tile" }, element("span", {}, label), element("b", {}, value), element("span", {}, note))));
}

function runsTable(page) {
  const keys = Object.keys(page.runs[0].row).filter((key) => page.runs.some((r) => r.row[key] !== null));
  return table([
    { title: "run", get: (r) => element("span", { class: "name" }, element("span", { class: "dot", style: `background:${color(page.runs.indexOf(r))}` }), r.name), sort: (r) => r.name },
    { title: "state", get: (r) => badge(r.state.kind), sort: (r) => r.state.kind },
    ...keys.map((key) => ({ title: key, get: (r) => r.row[key] })),
  ], page.runs, { sorts: true });
}

// ---- wall time ----

function timeline(run) {
  const line = run.timeline;
  const node = element("div", { class: "strip" });
  const total = Object.values(line.seconds).reduce((a, b) => a + b, 0) || 1;
  const parts = Object.entries(line.seconds).sort((a, b) => b[1] - a[1]).map(([phase, seconds]) => element("span", {},
    element("span", { class: "dot", style: `background:${PHASES[phase][1]}` }), `${PHASES[phase][0]} ${percent(seconds / total)}`));
  const paint = () => {
    const count = Object.values(line.bins)[0].length, width = line.wall / count;
    const date = (seconds) => new Date(1000 * seconds).toISOString().slice(0, 23);
    const x = Array.from({ length: count }, (_, i) => date(line.start + (i + 0.5) * width));
    const bars = Object.entries(line.bins).map(([phase, seconds]) => ({
      type: "bar", name: PHASES[phase][0], x, y: seconds.map((s) => 100 * s / width), width: 1000 * width,
      marker: { color: PHASES[phase][1], line: { width: 0 } }, hovertemplate: "%{y:.0f}%<extra>%{fullData.name}</extra>",
    }));
    const began = run.starts.map((s) => s.began.slice(0, 19));
    bars.push({
      x: began, y: began.map(() => 104), mode: "markers", name: "start",
      marker: { symbol: "triangle-down", size: 10, color: style("--text") },
      text: run.starts.map((s) => `start ${s.number} from step ${s.from}`), hovertemplate: "%{text}<extra></extra>",
    });
    draw(node, bars, {
      barmode: "stack", bargap: 0, yaxis: { range: [0, 110], tickvals: [0, 50, 100], ticktext: ["0%", "50%", "100%"] },
      xaxis: { type: "date", title: { text: "time (UTC)", font: { size: 11 } } },
      hovermode: run.starts.length > 40 ? "closest" : "x unified",
    });
  };
  const starts = table([
    { title: "start", get: (s) => s.number },
    { title: "began (UTC)", get: (s) => moment(s.began), key: true },
    { title: "ended (UTC)", get: (s) => moment(s.ended), key: true },
    { title: "from step", get: (s) => s.from },
    { title: "to step", get: (s) => s.to },
    { title: "end", get: (s) => element("span", { class: s.good ? "" : "bad" }, s.end), wide: true },
    ...(run.starts.some((s) => s.error) ? [{ title: "error", get: (s) => s.error, code: true }] : []),
    { title: "host", get: (s) => (s.processes > 1 ? `${s.host}, ${s.processes} processes` : s.host) },
  ], run.starts);
  return [node, element("div", { class: "parts" }, ...parts), starts, paint];
}

// ---- layers ----

function heatMaps(run) {
  const statistics = [...new Set(run.heat.map((h) => h.statistic))];
  const grid = element("div", { class: "grid" });
  let chosen = statistics[0], isLog = true;
  const paint = () => {
    const maps = run.heat.filter((h) => h.statistic === chosen);
    grid.replaceChildren(...maps.map((h) => {
      h.node = element("div", { class: "plot" });
      return element("div", {}, element("h3", {}, h.group || "by group"), h.node);
    }));
    for (const h of maps) {
      const values = h.z.flat().filter((v) => v !== null);
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const log = isLog && low > 0 && high > 10 * low;
      const ticks = [];
      for (let p = Math.floor(Math.log10(low)); log && p <= Math.log10(high); p += 1) ticks.push(p);
      draw(h.node, [{
        type: "heatmap", x: h.x, y: h.rows, text: h.z, colorscale: "Viridis",
        z: log ? h.z.map((row) => row.map((v) => (v === null ? null : Math.log10(v)))) : h.z,
        hovertemplate: "step %{x}, %{y}: %{text}<extra></extra>",
        colorbar: { thickness: 10, outlinewidth: 0, ...(log && ticks.length > 1 ? { tickvals: ticks, ticktext: ticks.map((p) => `1e${p}`) } : {}), ...(log && ticks.length < 2 ? { tickformat: ".2f", title: { text: "log10", font: { size: 10 } } } : {}) },
      }], { xaxis: { title: { text: "step", font: { size: 11 } } }, yaxis: { autorange: true, type: "category" } });
    }
  };
  const controls = element("div", { class: "controls" },
    choice("statistic", statistics.map((s) => [s, s]), chosen, (s) => { chosen = s; paint(); }),
    checkbox("colors by the logarithm, where all values are positive", isLog, (on) => { isLog = on; paint(); }));
  return [controls, grid, paint];
}

// ---- tables ----

function evaluations(run) {
  const best = (pair) => (pair ? `${show(pair[0])} at ${pair[1].toLocaleString("en")}` : "–");
  return table([
    { title: "source", get: (e) => e.source },
    { title: "metric", get: (e) => e.metric },
    { title: "last value", get: (e) => (e.error === null ? show(e.value, 5) : `${show(e.value, 5)} ± ${show(e.error, 2)}`), sort: (e) => e.value },
    { title: "after step", get: (e) => e.step },
    ...(run.evals.some((e) => e.examples) ? [{ title: "examples", get: (e) => e.examples || "–" }] : []),
    { title: "lowest", get: (e) => best(e.lowest), sort: (e) => e.lowest && e.lowest[0] },
    { title: "highest", get: (e) => best(e.highest), sort: (e) => e.highest && e.highest[0] },
  ], run.evals, { sorts: true });
}

function dataTable(run) {
  return table([
    { title: "source", get: (s) => s.name },
    { title: "rows", get: (s) => s.rows },
    { title: "share of examples", get: (s) => percent(s.share), sort: (s) => s.share },
    { title: "epochs up to now", get: (s) => s.epochs },
    { title: "epochs of the whole run", get: (s) => s.planned },
    { title: "path", get: (s) => s.path, code: true },
  ], run.data, { sorts: run.data.length > 1 });
}

function checkpoints(run) {
  return table([
    { title: "step", get: (c) => c.step },
    { title: "saved (UTC)", get: (c) => moment(c.saved), key: true },
    { title: "size", get: (c) => showBytes(c.size), key: true, sort: (c) => c.size },
    { title: "verified", get: (c) => (c.fault ? element("span", { class: "bad" }, `damaged: ${c.fault}`) : element("span", { class: c.verified ? "finished" : "unknown" }, c.verified ? "yes, read back" : "not yet")) },
    { title: "tokens seen", get: (c) => c.tokens },
    ...(run.checkpoints.some((c) => c.parent) ? [{ title: "started from", get: (c) => c.parent, code: true }] : []),
  ], run.checkpoints);
}

function samples(run) {
  const items = run.samples.map((s) => element("div", {},
    element("h3", {}, [s.title, `step ${s.step.toLocaleString("en")}`].filter(Boolean).join(" · ")), element("pre", {}, s.text)));
  const rest = items.splice(6);
  return [...items, rest.length ? element("details", {}, element("summary", {}, `${rest.length} more`), ...rest) : null];
}

// For each fixed prompt a folded table of its continuations.
function sampled(run) {
  return run.sampled.map((s, i) => element("details", { open: i === 0 },
    element("summary", {}, `${s.name}: ${s.prompt}`),
    table([
      { title: "step", get: (row) => row[0] },
      { title: "continuation", get: (row) => element("pre", {}, row[1]), wide: true },
    ], s.rows)));
}

function profiles(run) {
  return run.profiles.map((p) => element("div", {},
    element("h3", {}, `Steps ${p.steps}: ${show(p.seconds)} s`),
    element("div", { class: "bar" }, ...Object.entries(p.shares).map(([kind, share]) =>
      element("div", { style: `width:${100 * share}%;background:${KINDS[kind]}`, title: kind }))),
    element("div", { class: "parts" }, ...Object.entries(p.shares).map(([kind, share]) => element("span", {},
      element("span", { class: "dot", style: `background:${KINDS[kind]}` }), `${kind} ${percent(share)}`))),
    table([
      { title: "share", get: (o) => percent(o.share), sort: (o) => o.share },
      { title: "source line", get: (o) => o.source || "–", code: true },
      { title: "operations", get: (o) => o.name + (o.others ? ` and ${o.others} more` : ""), code: true },
      { title: "kind", get: (o) => o.kind },
      { title: "runs", get: (o) => o.runs },
    ], p.operations, { sorts: true })));
}

function configTable(page) {
  const { runs, explained } = page;
  const paths = [...new Set(runs.flatMap((r) => Object.keys(r.config)))];
  const rows = paths.map((path) => {
    const values = runs.map((r) => r.config[path]);
    const [normal, meaning] = explained[path] || [undefined, ""];
    return { path, values, normal, meaning, differs: new Set(values).size > 1,
      changed: normal !== undefined && values.some((v) => v !== undefined && v !== normal) };
  });
  const box = element("div");
  const options = [["changed", "what is not the default"], ["all", "everything"]];
  if (runs.length > 1) options.unshift(["differs", "what differs between the runs"]);
  let kind = options[0][0], words = "";
  const paint = () => {
    const kept = rows.filter((r) => (kind === "all" || r[kind]) && (r.path + r.meaning).toLowerCase().includes(words));
    const shown = runs.slice(0, 8);
    box.replaceChildren(table([
      { title: "key", get: (r) => r.path, code: true, key: true },
      ...shown.map((run, i) => ({ title: runs.length > 1 ? run.name : "value", code: true, get: (r) => element("code", { class: r.values[i] !== r.normal ? "running" : "" }, r.values[i] === undefined ? "–" : r.values[i]) })),
      { title: "default", get: (r) => (r.normal === undefined ? "–" : r.normal), code: true },
      { title: "meaning", get: (r) => r.meaning, wide: true },
    ], kept), element("p", { class: "note" }, `${kept.length} of ${rows.length} keys${runs.length > shown.length ? `, of the first ${shown.length} runs` : ""}.`));
  };
  const search = element("input", { type: "search", placeholder: "search keys", ariaLabel: "search keys" });
  search.addEventListener("input", () => { words = search.value.toLowerCase(); paint(); });
  paint();
  return [element("div", { class: "controls" }, choice("show", options, kind, (k) => { kind = k; paint(); }), search), box];
}

// ---- several runs ----

const isLogarithmic = (values) => values.every((v) => typeof v === "number" && v > 0) && Math.max(...values) >= 8 * Math.min(...values);

function dimension(label, values) {
  const known = values.filter((v) => v !== null);
  const distinct = [...new Set(known)];
  if (known.every((v) => typeof v === "number") && known.length === values.length) {
    const log = isLogarithmic(known);
    const at = (v) => (log ? Math.log10(v) : v);
    const few = distinct.length <= 8 ? distinct.sort((a, b) => a - b) : null;
    return { label, values: values.map(at), ...(few ? { tickvals: few.map(at), ticktext: few.map((v) => show(v)) } : log ? { tickformat: ".2f", label: `log10 ${label}` } : {}) };
  }
  const names = [...new Set(values.map((v) => (v === null ? "unset" : String(v))))];
  return { label, values: values.map((v) => names.indexOf(v === null ? "unset" : String(v))), tickvals: names.map((_, i) => i), ticktext: names };
}

const short = (key) => key.split(".").slice(-1)[0];

function comparison({ axes, rows }) {
  const done = rows.filter((r) => r.loss !== null);
  const lines = element("div", { class: "plot", style: `height:360px;min-width:${130 * (axes.length + 1)}px` });
  const slices = axes.map(() => element("div", { class: "plot" }));
  const losses = done.map((r) => r.loss).sort((a, b) => a - b);
  const low = losses[0], middle = losses[losses.length >> 1], last = losses[losses.length - 1];
  const top = middle > low ? Math.min(last, middle + 3 * (middle - low)) : last;
  const pad = 0.06 * (top - low || 0.1 * low);
  const paint = () => {
    const canDraw = document.createElement("canvas").getContext("webgl") !== null;
    if (canDraw && done.length > 1) {
      draw(lines, [{
        type: "parcoords", labelfont: { size: 11 },
        line: { color: done.map((r) => Math.min(r.loss, top)), colorscale: [[0, color(1)], [0.5, color(0)], [1, style("--faint")]], showscale: false },
        dimensions: [...axes.map((key, i) => dimension(short(key), done.map((r) => r.values[i]))),
          { label: "validation loss", values: done.map((r) => Math.min(r.loss, top + pad)) }],
      }], { margin: { l: 60, r: 60, t: 50, b: 20 } }, { displayModeBar: false });
    } else {
      lines.replaceChildren(element("p", { class: "note" }, "The lines need two finished runs and a browser with WebGL."));
    }
    axes.forEach((key, i) => {
      const numeric = rows.every((r) => typeof r.values[i] === "number");
      const at = (r) => (numeric ? r.values[i] : r.values[i] === null ? "unset" : String(r.values[i]));
      const rest = rows.filter((r) => r.loss === null);
      const best = new Map();
      done.forEach((r) => best.set(at(r), Math.min(r.loss, best.get(at(r)) ?? Infinity)));
      const points = [...best.entries()].sort((a, b) => a[0] - b[0]);
      const traces = [{
        x: done.map(at), y: done.map((r) => Math.min(r.loss, top + pad)), text: done.map((r) => `${r.name}: ${show(r.loss, 5)}`), mode: "markers",
        marker: { size: 8, opacity: 0.75, color: color(0) }, hovertemplate: "%{text}<extra></extra>",
      }, {
        x: rest.map(at), y: rest.map(() => top + 2 * pad), text: rest.map((r) => `${r.name}: ${r.status}`), mode: "markers",
        marker: { size: 9, symbol: "x", color: style("--bad") }, hovertemplate: "%{text}<extra></extra>",
      }];
      if (points.length <= 12) traces.push({ x: points.map((p) => p[0]), y: points.map((p) => Math.min(p[1], top + pad)), mode: "lines", line: { color: color(1), width: 1.5 }, hoverinfo: "skip" });
      draw(slices[i], traces, {
        xaxis: { type: !numeric ? "category" : isLogarithmic(rows.map((r) => r.values[i])) ? "log" : "linear", ...(numeric && points.length <= 8 ? { tickvals: points.map((p) => p[0]), ticktext: points.map((p) => show(p[0])) } : {}) },
        yaxis: { range: [low - pad, top + 3 * pad], title: { text: "validation loss", font: { size: 11 } } },
      });
    });
  };
  const ranking = table([
    { title: "run", get: (r) => r.name, code: true },
    { title: "status", get: (r) => element("span", { class: r.status, title: r.message }, r.status), sort: (r) => r.status },
    { title: "validation loss", get: (r) => r.loss, digits: 5 },
    ...axes.map((key, i) => ({ title: key, get: (r) => r.values[i] })),
    ...(rows.some((r) => r.message) ? [{ title: "message", get: (r) => r.message || "", code: true }] : []),
  ], [...done].sort((a, b) => a.loss - b.loss).concat(rows.filter((r) => r.loss === null)), { sorts: true });
  return { lines, slices, ranking, paint };
}

// ---- the whole ----

function build(page) {
  const main = document.getElementById("page"), sections = [], paints = [];
  const add = (id, title, about, ...content) => {
    const functions = content.flat().filter((c) => typeof c === "function");
    paints.push(...functions);
    const made = section(id, title, about, ...content.flat().filter((c) => typeof c !== "function"));
    made.label = title;
    sections.push(made);
    return made;
  };
  const [first] = page.runs, many = page.runs.length > 1;
  const kinds = page.runs.map((r) => r.state.kind);
  const subtitle = many
    ? `${page.sweep ? "a sweep, " : ""}${page.runs.length} runs${page.count > page.runs.length ? ` of ${page.count}, those of lowest loss` : ""}: ${[...new Set(kinds)].map((k) => `${kinds.filter((x) => x === k).length} ${k}`).join(", ")}`
    : first.workdir;
  main.replaceChildren(element("h1", {}, page.title, " ", many ? "" : badge(first.state.kind)),
    element("p", {}, many ? "" : first.state.text),
    element("p", { class: "note" }, `${subtitle} · page made ${moment(page.made)} UTC`), element("nav"));

  if (!many) {
    if (first.warnings.length) add("warnings", "Warnings", "", ...warningList(first));
    add("summary", "Summary", "", tiles(first));
  }
  if (page.sweep) {
    const { lines, slices, ranking, paint } = comparison(page.sweep);
    add("ranking", "Ranking", "All runs, the lowest validation loss first; a click on a title sorts. Runs that diverged or failed have no loss.", ranking);
    add("parallel", "Parallel coordinates", "Each line is a finished run; orange: low loss, grey: high. Drag along an axis to keep the lines that pass there, click on it to undo; losses far above the others are drawn at the top.", element("div", { class: "wide" }, lines), paint);
    add("slices", "Slices", "Each dot is a run; the line joins the best at each value; × marks runs without a loss, such as diverged ones.", element("div", { class: "grid" }, ...slices.map((node, i) => element("div", {}, element("h3", {}, page.sweep.axes[i]), node))));
  }
  if (many) add("runs", "Runs", "A click on a title sorts.", runsTable(page));
  if (page.charts.length) {
    const curves = new Curves(page);
    add("curves", "Curves", "", ...curves.section(), () => curves.drawAll());
  }
  if (many) add("config", "Config", "Colored values are not the default.", ...configTable(page));

  const own = element("div"); // the sections of one run
  const showRun = (run) => {
    sections.length = 0;
    paints.length = 0;
    if (many) {
      if (run.warnings.length) add("warnings", "Warnings", "", ...warningList(run));
      add("summary", "Summary", run.state.text, tiles(run));
    }
    if (run.evals.length) add("evaluations", "Evaluations", "± is a standard error, where one was recorded. A click on a title sorts.", evaluations(run));
    if (run.timeline) add("time", "Where the time went", `Goodput ${percent(run.timeline.goodput)}: the share of the wall time since the first start in which steps were trained that lasted. Triangles: starts of the run.`, ...timeline(run));
    if (run.heat.length) add("layers", "Layers", "A row is a layer or a group of parameters, a column a measured step.", ...heatMaps(run));
    if (run.samples.length) add("samples", "Samples", "", ...samples(run));
    if (run.sampled.length) add("sampled", "Samples over time", "Continuations of fixed prompts inside the run, the newest first.", ...sampled(run));
    if (run.data.length) add("data", "Data", "", dataTable(run));
    if (run.checkpoints.length) add("checkpoints", "Checkpoints", "The newest first; verified: all files were read back and have the manifest's checksums.", checkpoints(run));
    if (run.profiles.length) add("profile", "Profile", "Shares of the devices' time: compute; communication that no compute hides; transfers between host and device; and no operation at all. Operations: shares of their own time, without that of operations inside.", ...profiles(run));
    own.replaceChildren(...sections);
  };
  const top = [...sections];
  main.append(...top);
  const later = [...paints];
  if (many) {
    const names = page.runs.map((r, i) => [String(i), r.name]);
    main.append(element("section", { id: "run" }, element("h2", {}, "One run"), element("div", { class: "controls" }, choice("show", names, "0", (i) => { showRun(page.runs[Number(i)]); paints.forEach((p) => p()); }))));
  }
  main.append(own);
  showRun(first);
  const links = [...top, ...(many ? [element("section", { id: "run", label: "One run" })] : sections)].map((s) => [s.id, s.label]);
  if (!many) {
    const made = section("config", "Config", "Colored values are not the default.", ...configTable(page));
    main.append(made);
    links.push(["config", "Config"]);
  }
  main.querySelector("nav").append(...links.map(([id, label]) => element("a", { href: `#${id}` }, label)));
  const paintAll = () => [...later, ...paints].forEach((paint) => paint());
  paintAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paintAll);
  document.body.dataset.ready = "yes";
}

(async () => {
  try {
    const page = JSON.parse(await unpack("data"));
    document.head.append(element("script", { textContent: await unpack("plotly") }));
    build(page);
  } catch (error) {
    document.getElementById("page").replaceChildren(element("p", { class: "bad" }, `This page could not be drawn (browsers since 2023 can): ${error}`));
    throw error;
  }
})();
