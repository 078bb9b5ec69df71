// The dashboard's page. It follows the chosen runs by server-sent events,
// keeps what it was told of each, and draws at most once a frame. All text
// from a run goes through textContent.

const $ = (id) => document.getElementById(id);
const palette = ["#2f7dd1", "#d9822b", "#3d9c5f", "#b0459a", "#8a6d3b", "#5b5bd6", "#c23b3b", "#2a9d9d"];
const stepColours = {
  compute: "#2f7dd1", gather: "#9ec5ec", ballot: "#d9822b", fetch: "#b0459a", apply: "#3d9c5f", record: "#e2b93b", pause: "#8b95a1", pursue: "#c23b3b",
};
const stepNames = {
  compute: "compute gradients", gather: "gather averages", ballot: "ballot", fetch: "fetch", apply: "aggregate and update", record: "sign the record", pause: "pause", pursue: "fetch state",
};
const runs = new Map(); // by name, in the order of choice
const charts = {};
let all = [];
let drawn = false;
let shown = ""; // the run whose details are shown

function el(name, text, cls) {
  const e = document.createElement(name);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  while (n >= 1000 && i < units.length - 1) { n /= 1000; i++; }
  return `${n.toFixed(i === 0 || n >= 100 ? 0 : 1)} ${units[i]}`;
}

function seconds(s) {
  if (!(s > 0)) return "–";
  if (s < 60) return `${s.toFixed(1)} s`;
  const m = Math.floor(s / 60);
  return m < 60 ? `${m} min ${Math.round(s % 60)} s` : `${Math.floor(m / 60)} h ${m % 60} min`;
}

function usd(v) {
  v = Number(v);
  if (!v) return "$0";
  return v >= 1 ? `$${v.toFixed(2)}` : `$${Number(v.toPrecision(3)).toFixed(Math.min(12, 2 - Math.floor(Math.log10(v))))}`;
}

const percent = (v) => (v === undefined || v === null ? "–" : `${(100 * v).toFixed(2)} %`);
const count = (n) => Math.round(n).toLocaleString("en");
const lastOf = (c) => (c && c.values.length ? c.values[c.values.length - 1] : undefined);

// merge takes an update into what is known of a run.
function merge(run, u) {
  if (u.full) {
    run.curves = u.curves;
    run.peers = new Map();
    run.faults = [];
    if (u.prices) run.prices = u.prices;
  } else {
    for (const [name, c] of Object.entries(u.curves)) {
      if (!c.rounds.length) continue;
      const known = run.curves[name];
      let keep = known.rounds.length;
      while (keep > 0 && known.rounds[keep - 1] >= c.rounds[0]) keep--;
      known.rounds.length = keep;
      known.values.length = keep;
      known.rounds.push(...c.rounds);
      known.values.push(...c.values);
    }
  }
  for (const p of u.peers || []) {
    const before = run.peers.get(p.peer);
    p.rounds = [...(before ? before.rounds : []), ...(p.rounds || [])].slice(-64);
    run.peers.set(p.peer, p);
  }
  run.faults = [...run.faults, ...(u.faults || [])].slice(-200);
  if (u.info) run.info = u.info;
  run.now = u;
  document.documentElement.dataset.serial = String(Number(document.documentElement.dataset.serial || 0) + 1);
  schedule();
}

function follow(name) {
  const run = { name, colour: palette[runs.size % palette.length], curves: {}, peers: new Map(), faults: [], now: null };
  runs.set(name, run);
  run.source = new EventSource(`api/runs/${encodeURIComponent(name)}/events`);
  run.source.onmessage = (m) => { run.lost = false; merge(run, JSON.parse(m.data)); };
  run.source.onerror = () => { run.lost = true; schedule(); }; // it connects again by itself, and gets all anew
  if (!shown) shown = name;
}

function leave(name) {
  runs.get(name)?.source.close();
  runs.delete(name);
  if (shown === name) shown = runs.keys().next().value || "";
}

function schedule() {
  if (drawn) return;
  drawn = true;
  requestAnimationFrame(() => { drawn = false; draw(); });
}

// clockAt returns the seconds at which a round was finished.
function clockAt(run, round) {
  const c = run.curves.clock;
  if (!c || !c.rounds.length) return null;
  let lo = 0, hi = c.rounds.length - 1;
  while (lo < hi) {
    const mid = (lo + hi) >> 1;
    if (c.rounds[mid] < round) lo = mid + 1; else hi = mid;
  }
  return c.values[lo];
}

// table aligns the curves of several runs on one axis, as uPlot wants them.
function table(curves, byTime) {
  const lines = curves.map(({ run, curve }) => {
    const c = run.curves[curve] || { rounds: [], values: [] };
    return [byTime ? c.rounds.map((r) => clockAt(run, r)) : c.rounds, c.values];
  });
  if (lines.length === 1) return [lines[0][0], lines[0][1]];
  return uPlot.join(lines.map((l) => [l[0], l[1]]));
}

function chart(id, curves, options) {
  const box = $(id), byTime = document.querySelector("input[name=axis]:checked").value === "time", log = options.log && $("log").checked;
  const key = JSON.stringify([curves.map((c) => [c.run.name, c.curve]), byTime, log, box.clientWidth]);
  const data = table(curves, byTime);
  if (charts[id]?.key === key) { charts[id].plot.setData(data); return; }
  charts[id]?.plot.destroy();
  const style = getComputedStyle(document.documentElement), ink = style.getPropertyValue("--soft"), line = style.getPropertyValue("--line");
  const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
  const plot = new uPlot({
    width: Math.max(200, box.clientWidth), height: 260,
    scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: options.range } },
    axes: [{ ...axis, label: byTime ? "seconds" : "round", labelSize: 18, size: 34 }, { ...axis, size: 56, values: options.values }],
    series: [{ label: byTime ? "s" : "round" }, ...curves.map((c) => ({
      label: c.label, stroke: c.colour, width: c.curve === "loss" ? 1.2 : 2, dash: c.dash, spanGaps: true, points: { show: (u, i) => u.data[i].length < 60 && c.curve !== "loss" },
      value: (_, v) => (v == null ? "–" : options.format(v)),
    }))],
    cursor: { drag: { x: true, y: false } },
  }, data, box);
  charts[id] = { key, plot };
}

function drawCurves() {
  if (typeof uPlot === "undefined") return;
  const known = [...runs.values()].filter((r) => r.now);
  const label = (r, what) => (known.length > 1 ? `${r.name}: ${what}` : what);
  chart("loss", known.flatMap((r) => [
    { run: r, curve: "loss", label: label(r, "training loss"), colour: r.colour },
    { run: r, curve: "validation_loss", label: label(r, "validation loss"), colour: known.length > 1 ? r.colour : palette[1], dash: [6, 4] },
  ]), { format: (v) => v.toFixed(4), log: true });
  chart("accuracy", known.map((r) => ({ run: r, curve: "accuracy", label: label(r, "validation accuracy"), colour: r.colour })), {
    format: percent, values: (_, t) => t.map((v) => `${+(100 * v).toFixed(1)} %`), range: (_, lo, hi) => (lo == null ? [0, 1] : [Math.max(0, lo - 0.02), Math.min(1, hi + 0.01)]),
  });
}

function fill(parent, rows) {
  parent.replaceChildren(...rows);
}

function rowsOf(tbl, head, rows) {
  const caption = tbl.querySelector("caption"), top = el("tr");
  for (const h of head) { const th = el("th", h); th.scope = "col"; top.append(th); }
  const thead = el("thead"), body = el("tbody");
  thead.append(top);
  for (const r of rows) {
    const tr = el("tr");
    for (const c of r) tr.append(c instanceof Node ? c : el("td", c));
    body.append(tr);
  }
  tbl.replaceChildren(caption, thead, body);
}

const bad = new Set(["lost", "crashed", "failed", "expelled", "stopped"]);

function drawPeers(run) {
  const peers = [...run.peers.values()];
  const top = Math.max(0, ...peers.map((p) => p.round));
  rowsOf($("peers"), ["peer", "state", "round", "behind", "s/round", "loss", "sent", "received"], peers.map((p) => {
    const td = el("td", p.waiting ? `${p.state || "–"}; ${p.waiting}` : p.state || "–", bad.has(p.state) ? "bad" : p.waiting ? "warn" : "good");
    const sum = (o) => Object.values(o || {}).reduce((a, b) => a + b, 0);
    return [String(p.peer), td, count(p.round), count(top - p.round), p.seconds.toFixed(3), p.loss.toFixed(4), bytes(sum(p.out)), bytes(sum(p.in))];
  }));
  rowsOf($("functions"), ["peer", "invocations", "cold", "failed", "billed", "mean", "queue", "peak", "alive"], [...peers.map((p) => [p, p.functions, String(p.peer), String(p.instances)]), [null, run.now.functions, "all", ""]].map(([, f, name, alive]) => {
    const n = Math.max(1, f.invocations);
    return [name, count(f.invocations), count(f.cold), el("td", count(f.failed), f.failed ? "bad" : ""), seconds(f.billed_ms / 1000), `${(f.ms / n).toFixed(1)} ms`, `${(f.queue_ms / n).toFixed(1)} ms`, f.peak_mb ? `${f.peak_mb} MB` : "–", alive];
  }));
}

const svgNS = "http://www.w3.org/2000/svg";
function svg(name, attributes, text) {
  const e = document.createElementNS(svgNS, name);
  for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
  if (text !== undefined) e.textContent = text;
  return e;
}

function drawGraph(run) {
  const peers = [...run.peers.values()], n = peers.length, w = 520, h = 300, cx = w / 2, cy = h / 2, rx = n > 1 ? 190 : 0, ry = n > 1 ? 105 : 0, r = n > 16 ? 9 : 20;
  const at = new Map(peers.map((p, i) => [p.peer, [cx + rx * Math.sin((2 * Math.PI * i) / n), cy - ry * Math.cos((2 * Math.PI * i) / n)]]));
  const root = svg("svg", { viewBox: `0 0 ${w} ${h}`, role: "img", "aria-label": "Peers and the bytes between them" });
  let most = 1;
  for (const p of peers) for (const v of Object.values(p.out || {})) most = Math.max(most, v);
  for (const p of peers) {
    for (const [to, v] of Object.entries(p.out || {})) {
      const a = at.get(p.peer), b = at.get(Number(to));
      if (!b || !v) continue;
      const mx = (a[0] + b[0]) / 2 + (b[1] - a[1]) * 0.08, my = (a[1] + b[1]) / 2 - (b[0] - a[0]) * 0.08;
      const path = svg("path", { d: `M${a[0]} ${a[1]}Q${mx} ${my} ${b[0]} ${b[1]}`, "stroke-width": (0.6 + 4 * v / most).toFixed(2) });
      path.append(svg("title", {}, `peer ${p.peer} to peer ${to}: ${bytes(v)}`));
      root.append(path);
      if (n <= 6) root.append(svg("text", { class: "soft", x: mx * 0.7 + a[0] * 0.3, y: my * 0.7 + a[1] * 0.3, "text-anchor": "middle" }, bytes(v)));
    }
  }
  for (const p of peers) {
    const [x, y] = at.get(p.peer);
    const c = svg("circle", { cx: x, cy: y, r, class: bad.has(p.state) ? "bad" : p.state === "finished" ? "done" : "" });
    c.append(svg("title", {}, `peer ${p.peer}: ${p.state}, round ${p.round}`));
    root.append(c, svg("text", { x, y: y + 4, "text-anchor": "middle" }, String(p.peer)));
    if (n <= 16) root.append(svg("text", { class: "soft", x, y: y + r + 13, "text-anchor": "middle" }, p.state || "–"));
  }
  $("graph").replaceChildren(root);
}

function drawTimeline(run) {
  const canvas = $("timeline"), peers = [...run.peers.values()], n = Number($("zoom").value), scale = window.devicePixelRatio || 1;
  const row = 26, width = canvas.clientWidth, height = peers.length * row + 22;
  canvas.style.height = `${height}px`;
  if (canvas.width !== width * scale || canvas.height !== height * scale) { canvas.width = width * scale; canvas.height = height * scale; }
  const g = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  g.setTransform(scale, 0, 0, scale, 0, 0);
  g.clearRect(0, 0, width, height);
  const top = Math.max(0, ...peers.map((p) => p.round));
  const spans = peers.map((p) => p.rounds.filter((r) => r.round > top - n).map((r) => ({ round: r.round, at: Date.parse(r.began), steps: r.steps || [] })));
  let from = Infinity, to = -Infinity;
  for (const list of spans) for (const r of list) {
    from = Math.min(from, r.at);
    for (const s of r.steps) to = Math.max(to, r.at + s.at + s.ms);
  }
  if (!(to > from)) return;
  const left = 52, x = (t) => left + ((t - from) / (to - from)) * (width - left - 4);
  g.font = "12px system-ui, sans-serif";
  g.textBaseline = "middle";
  spans.forEach((list, i) => {
    const y = i * row;
    g.fillStyle = style.getPropertyValue("--soft");
    g.fillText(`peer ${peers[i].peer}`, 0, y + row / 2);
    for (const r of list) {
      for (const s of r.steps) {
        g.fillStyle = stepColours[s.step] || "#888";
        g.fillRect(x(r.at + s.at), y + 4, Math.max(0.5, x(r.at + s.at + s.ms) - x(r.at + s.at)), row - 8);
      }
      g.fillStyle = style.getPropertyValue("--ink");
      g.fillRect(x(r.at), y + 2, 0.7, row - 4);
    }
  });
  g.fillStyle = style.getPropertyValue("--soft");
  const first = Math.min(...spans.flat().map((r) => r.round)), last = Math.max(...spans.flat().map((r) => r.round));
  g.fillText(`rounds ${first} to ${last}, ${((to - from) / 1000).toFixed(2)} s`, left, peers.length * row + 11);
}

function drawFaults(run) {
  const causes = Object.entries(run.now.causes || {}).sort((a, b) => b[1] - a[1]);
  $("causes").textContent = causes.length ? causes.map(([c, n]) => `${c || "other"}: ${count(n)}`).join(" · ") : "none";
  fill($("faults"), run.faults.slice(-100).reverse().map((f) => {
    const li = el("li"), t = el("time", new Date(f.time).toLocaleTimeString());
    t.dateTime = f.time;
    const who = f.about ? `peer ${f.about}${f.peer && f.peer !== f.about ? `, says peer ${f.peer}` : ""}` : `peer ${f.peer}`;
    li.append(t, el("b", f.cause || "warning", "warn"), `${who}: ${f.message}`);
    return li;
  }));
}

function drawDetails(run) {
  const u = run.now, info = run.info, job = info?.job || {}, rounds = job.Rounds || 0;
  const tiles = [
    ["round", rounds ? `${count(u.round)} / ${count(rounds)}` : count(u.round)], ["loss", lastOf(run.curves.loss)?.toFixed(4) ?? "–"],
    ["accuracy", percent(u.done?.accuracy ?? lastOf(run.curves.accuracy))], ["images/s", count(u.samples_per_second)], ["elapsed", seconds(u.elapsed)],
    ["left", u.done ? "–" : seconds(u.left)], ["functions", count(u.functions.invocations)], ["GB-seconds", u.gb_seconds.toFixed(2)], ["cost", usd(u.total_usd)], ["final up to", count(u.final)],
  ];
  fill($("tiles"), tiles.map(([k, v]) => { const d = el("div"); d.append(el("dt", k), el("dd", v)); return d; }));
  drawPeers(run);
  drawGraph(run);
  drawTimeline(run);
  const sum = (u.step_ms || []).reduce((a, b) => a + b, 0);
  $("split").textContent = sum ? `All rounds: ${u.steps.map((s, i) => [s, u.step_ms[i]]).filter((s) => s[1] > 0).map(([s, ms]) => `${stepNames[s]} ${((100 * ms) / sum).toFixed(1)} %`).join(" · ")}` : "";
  const kinds = { functions_usd: "functions, memory x time", requests_usd: "functions, requests", peers_usd: "peers", databases_usd: "databases", transfer_usd: "transfer" };
  rowsOf($("cost"), ["", "US dollars"], [...Object.entries(kinds).map(([k, name]) => [name, usd(u.cost[k])]), ...[...run.peers.values()].map((p) => [`peer ${p.peer}, all kinds`, usd(p.cost_usd)]), ["all", usd(u.total_usd)]]);
  $("prices").textContent = run.prices ? `What the run would cost by the prices of ${run.prices.name}, ${run.prices.date}.` : "";
  drawFaults(run);
  if (info) {
    const h = info.hardware || {};
    const rows = [["state", u.done ? `${info.state}: ${u.done.stop_reason}` : info.state], ["model", job.Model], ["data", job.Data], ["optimizer", `${job.Optimizer}, lr ${job.LearningRate}`],
      ["minibatches", `${job.BatchesPerRound} x ${job.BatchSize} a peer and round`], ["seed", job.Seed], ["version", info.version], ["platform", `${info.platform}, ${info.go}`],
      ["hardware", [h.cpu, h.cores && `${h.cores} cores`, h.memory_mb && `${h.memory_mb} MB`].filter(Boolean).join(", ")], ["started", new Date(info.started).toLocaleString()], ["model hash", u.done?.model || [...run.peers.values()][0]?.model]];
    fill($("info"), rows.filter((r) => r[1] !== undefined && r[1] !== "").flatMap(([k, v]) => [el("dt", k), el("dd", String(v))]));
  }
}

function draw() {
  const run = runs.get(shown);
  if (!run) { $("status").textContent = "no run is chosen"; return; }
  $("title").textContent = run.name;
  document.title = `${run.name} – SPIRT`;
  if (run.lost) $("status").textContent = "the dashboard's server does not answer; trying again";
  else if (run.now?.error) $("status").textContent = run.now.error;
  else if (run.now) $("status").textContent = run.now.done ? `the run is over: ${run.now.done.stop_reason}` : "live";
  if (!run.now) return;
  drawCurves();
  drawDetails(run);
}

function drawKey() {
  fill($("key"), Object.entries(stepNames).map(([s, name]) => {
    const span = el("span"), i = el("i");
    i.style.setProperty("background", stepColours[s]);
    span.append(i, name);
    return span;
  }));
}

function drawChoice() {
  fill($("runs"), all.map((r) => {
    const label = el("label"), box = el("input");
    box.type = "checkbox";
    box.checked = runs.has(r.name);
    box.onchange = () => { if (box.checked) { if (runs.size >= 5) leave(runs.keys().next().value); follow(r.name); drawChoice(); shown = r.name; } else leave(r.name); schedule(); };
    label.append(box, ` ${r.name} ${r.model ? `(${r.model}, ${r.state})` : ""}`);
    return label;
  }));
  $("choose").hidden = all.length < 2;
}

for (const e of document.querySelectorAll("input[name=axis], #log, #zoom")) e.addEventListener("input", schedule);
window.addEventListener("resize", schedule);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { for (const c of Object.values(charts)) c.key = ""; schedule(); });
window.addEventListener("load", schedule);

drawKey();
try {
  all = await (await fetch("api/runs")).json();
  const several = all.length > 1 && all.length <= 4 && all.every((r) => r.state);
  for (const r of several ? all : all.slice(0, 1)) follow(r.name);
  drawChoice();
} catch {
  $("status").textContent = "the dashboard's server does not answer";
}
