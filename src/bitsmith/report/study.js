"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const one = id => document.getElementById(id);
const all = selector => [...document.querySelectorAll(selector)];
const chosen = {groups: new Set(), rows: new Set()};
const free = () => !chosen.groups.size && !chosen.rows.size;
const shown = at => free() || chosen.groups.has(data.artifacts[at].group) || chosen.rows.has(at);
const colour = at => data.groups[data.artifacts[at].group].colour;
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash"];
const PALETTE = data.groups.length > 2 ? null : ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2",
"#eeca3b", "#9d755d"];
const lineOf = at => {
  const peers = data.artifacts.map((a, i) => i).filter(i => data.artifacts[i].group === data.artifacts[at].group);
  return {color: PALETTE && !data.artifacts[at].original ? PALETTE[at % PALETTE.length] : colour(at), width: 2,
    dash: PALETTE ? "solid" : DASHES[peers.indexOf(at) % DASHES.length]};
};
const GREY = "#8a93a3";
const axis = (text, log) => ({title: {text}, automargin: true, zeroline: false,
  ...(log ? {type: "log", tickformat: "~g"} : {})});
const depth_axis = (text, traces) => ({...axis(text), tickformat: "d",
  dtick: Math.max(1, Math.ceil(Math.max(1, ...traces.flatMap(t => t.x)) / 16))});
const layout = (x, y, more) => ({height: 430, margin: {l: 60, r: 15, t: 40, b: 50}, paper_bgcolor: "rgba(0,0,0,0)",
  plot_bgcolor: "rgba(0,0,0,0)", font: {family: "system-ui, sans-serif", size: 13, color: GREY}, xaxis: x, yaxis: y,
  showlegend: false, hovermode: "closest", hoverlabel: {namelength: -1}, ...more});
const narrow = () => document.documentElement.clientWidth < 600;
function draw(id, traces, where, says) {
  Plotly.react(id, traces, narrow() ? {...where, margin: {...where.margin, l: 40, r: 5}} : where,
    {responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtonsToRemove: data.tools});
  for (const svg of one(id).querySelectorAll("svg.main-svg")) svg.setAttribute("aria-hidden", "true");
  one(`${id}-says`).textContent = says;
}
const indices = () => data.artifacts.map((a, at) => at).filter(shown);
const short = v => v === 0 ? "0" : Math.abs(v) >= 1e5 || Math.abs(v) < 1e-3 ? v.toExponential(2) : String(Number(v.toPrecision(4)));
function ends(items, get, name) {
  const kept = items.filter(i => get(i) !== null && get(i) !== undefined).sort((a, b) => get(a) - get(b));
  if (!kept.length) return "Nothing to draw.";
  const [least, most] = [kept[0], kept.at(-1)];
  return `${kept.length} figures: least ${short(get(least))} (${name(least)}), most ${short(get(most))} (${name(most)}).`;
}
const LEGEND = {orientation: "h", y: -0.25};
function fill(id, heads, lines) {
  const cell = (tag, text, scope) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (scope) made.scope = scope;
    return made;
  };
  const table = one(id), head = document.createElement("tr"), top = document.createElement("thead");
  const body = document.createElement("tbody");
  head.append(...heads.map(text => cell("th", text, "col")));
  top.append(head);
  for (const [first, ...rest] of lines) {
    const row = document.createElement("tr");
    row.append(cell("th", first, "row"), ...rest.map(text => cell("td", text)));
    body.append(row);
  }
  table.replaceChildren(table.caption, top, body);
}

function pareto(at) {
  const measure = data.measures.find(m => m.key === one(`pareto-y-${at}`).value), size = one("pareto-x").value;
  const good = a => a[size] > 0 && a.measures[measure.key] && (!measure.log || a.measures[measure.key][0] > 0);
  const value = a => a.measures[measure.key];
  const rows = indices(), kept = rows.filter(i => good(data.artifacts[i]));
  const better = (a, b) => measure.falling ? a < b : a > b;
  const front = [];
  for (const i of [...kept].sort((a, b) => data.artifacts[a][size] - data.artifacts[b][size]
      || (better(value(data.artifacts[a])[0], value(data.artifacts[b])[0]) ? -1 : 1)))
    if (!front.length || better(value(data.artifacts[i])[0], value(data.artifacts[front.at(-1)])[0])) front.push(i);
  const trace = (items, name, tone, symbol, extra) => {
    const ys = items.map(a => value(a)[0]);
    const ends = items.map(a => value(a)[1] === null || value(a)[2] === null ? null : value(a));
    const floor = v => measure.log ? Math.max(v[1], v[0] / 1000) : v[1];
    return {type: "scatter", mode: "markers", name, x: items.map(a => a[size]), y: ys,
      text: items.map(a => a.label), marker: {color: tone, size: 9, symbol},
      error_y: {type: "data", symmetric: false, thickness: 1.2, width: 3, color: tone,
        array: ends.map(v => v ? Math.max(0, v[2] - v[0]) : 0),
        arrayminus: ends.map(v => v ? Math.max(0, v[0] - floor(v)) : 0)},
      customdata: ends.map(v => v ? `${v[1].toPrecision(5)} … ${v[2].toPrecision(5)}` : "interval unmeasured"),
      hovertemplate: `<b>%{text}</b><br>%{x:,.5~g} ${size}<br>%{y:.5g} (%{customdata})<extra>${name}</extra>`, ...extra};
  };
  const span = values => Math.max(...values) - Math.min(...values) || 1;
  const across = i => Math.log(data.artifacts[i][size]), up = i => raised(value(data.artifacts[i])[0]);
  const peers = data.peers.filter(good), raised = v => measure.log ? Math.log(Math.max(v, 1e-30)) : v;
  const xs = [...kept.map(across), ...peers.map(p => Math.log(p[size]))];
  const ys = [...kept.map(i => data.artifacts[i]), ...peers].flatMap(a => value(a).filter(v => v !== null).map(raised));
  const wide = span(xs), high = span(ys), left = Math.min(...xs), low = Math.min(...ys);
  const room = Math.max(120, one(`pareto-${at}`).clientWidth - 110), half = name => Math.min(name.length, 40) * 3.3 + 4;
  const boxes = [], named = new Map();
  const place = (key, name, x, y) => {
    const across = (x - left) / wide * room, centre = Math.max(half(name) - 30, Math.min(room + 30 - half(name), across));
    const box = [centre, (y - low) / high * 300, half(name)];
    if (boxes.some(b => Math.abs(b[0] - box[0]) < b[2] + box[2] && Math.abs(b[1] - box[1]) < 15)) return;
    boxes.push(box);
    named.set(key, centre > across + 8 ? "top right" : centre < across - 8 ? "top left" : "top center");
  };
  for (const i of [...front, ...(kept.length <= 12 ? kept.filter(i => !front.includes(i)) : [])])
    place(i, data.artifacts[i].name, across(i), up(i));
  if (peers.length <= 8) peers.forEach((p, i) => place(`p${i}`, p.name, Math.log(p[size]), raised(value(p)[0])));
  const traces = [{type: "scatter", mode: "lines", hoverinfo: "skip", name: "Pareto front",
    line: {color: GREY, width: 1, shape: "hv", dash: "dot"}, x: front.map(i => data.artifacts[i][size]),
    y: front.map(i => value(data.artifacts[i])[0])}];
  data.groups.forEach((group, g) => {
    const ids = kept.filter(i => data.artifacts[i].group === g);
    if (!ids.length) return;
    traces.push(trace(ids.map(i => data.artifacts[i]), group.name, group.colour,
      data.artifacts[ids[0]].original ? "star" : "circle",
      {mode: "markers+text", ids: ids.map(String), textposition: ids.map(i => named.get(i) ?? "top center"), textfont: {size: 11}, cliponaxis: false,
        texttemplate: ids.map(i => named.has(i) ? "%{text}" : "")}));
  });
  if (peers.length) traces.push(trace(peers, "peer", GREY, "diamond-open", {mode: "markers+text",
    textposition: peers.map((p, i) => named.get(`p${i}`) ?? "top center"), textfont: {size: 11}, cliponaxis: false,
    texttemplate: peers.map((p, i) => named.has(`p${i}`) ? p.label.split("<br>")[0] : "")}));
  draw(`pareto-${at}`, traces, layout(
    {...axis(size === "bytes" ? "bytes of the weight files" : "bits per weight", true),
      tickformat: size === "bytes" ? "~s" : "~g", ...(wide > 1.5 || xs.length < 2 ? {dtick: "D2"} : {})},
    {...axis(measure.label, measure.log), ...(measure.log && high > 1.5 ? {dtick: "D2"} : {})}), `${measure.label}: ${ends(kept, i => value(data.artifacts[i])[0], i =>
    data.artifacts[i].name)} On the front, smallest first: ${front.map(i => data.artifacts[i].name).join(", ") || "none"}.${
    peers.length ? ` Points of others: ${peers.map(p => p.name).join(", ")}.` : ""}`);
  const absent = rows.filter(i => !kept.includes(i)).map(i => data.artifacts[i].name);
  one(`pareto-note-${at}`).textContent = absent.length
    ? `Not drawn, unmeasured or 0 on a logarithmic axis: ${absent.join(", ")}.` : "";
}

const role_text = role => [...one("layer-role").options].find(o => o.value === role).textContent;
function layers() {
  const what = one("layer-what").value, role = one("layer-role").value, traces = [];
  for (const at of indices()) for (const line of data.artifacts[at].layers) {
    if (line.what !== what || (line.role !== role && (role !== data.all_roles
        || data.artifacts[at].layers.some(l => l.what === what && l.role === role)))) continue;
    const style = lineOf(at), name = data.artifacts[at].label + (line.role === role ? "" : ` ${line.role}`);
    traces.push({type: "scatter", mode: "lines+markers", meta: {at, name: data.artifacts[at].name
      + (line.role === role ? "" : ` ${role_text(line.role)}`)}, name, x: line.x, y: line.y, line: style,
      marker: {color: style.color, size: 7}, hovertemplate: "layer %{x}: %{y:.4g}",
      ...(line.low.every(v => v !== null) ? {error_y: {type: "data", symmetric: false, thickness: 1, width: 3,
        array: line.high.map((v, i) => v - line.y[i]), arrayminus: line.low.map((v, i) => line.y[i] - v)}} : {})});
  }
  if (traces.some(t => Math.max(...t.y) > 0.7) && what === data.weights_error)
    traces.push({type: "scatter", mode: "lines", name: "no closer than zeros", hovertemplate: "no closer than zeros",
      x: [...new Set(traces.flatMap(t => t.x))].sort((a, b) => a - b), line: {color: "#e45756", dash: "dash", width: 1.5},
      y: [...new Set(traces.flatMap(t => t.x))].map(() => 1)});
  const lines = traces.filter(t => t.meta !== undefined), points = lines.flatMap(t => t.x.map((x, i) => [t.meta.name, x, t.y[i]]));
  draw("layers", traces, layout(depth_axis("layer", traces), {...axis(""), rangemode: lines.some(t => Math.min(...t.y) > 0.5)
    && what !== data.weights_error ? "normal" : "tozero"}, {showlegend: traces.length > 0, legend: LEGEND}),
    `${one("layer-what").selectedOptions[0]?.textContent ?? ""}: ${ends(points, p => p[2], p => `${p[0]}, layer ${p[1]}`)}`);
  fill("layer-table", ["artifact", "layer", "figure"], points.map(p => [p[0], String(p[1]), short(p[2])]));
}

function components() {
  const traces = indices().filter(at => data.artifacts[at].components.length).map(at => {
    const found = data.artifacts[at].components.filter(c => c[one("component-what").value] !== null);
    const style = lineOf(at);
    return {type: "bar", meta: {at, name: data.artifacts[at].name}, name: data.artifacts[at].label, x: found.map(c => c.name), marker: {color: style.color},
      y: found.map(c => c[one("component-what").value]), hovertemplate: "%{x}: %{y:.4g}"};
  });
  const bars = traces.flatMap(t => t.x.map((x, i) => [t.meta.name, x, t.y[i]]));
  draw("components", traces, layout(axis(""), {...axis("relative error"), rangemode: "tozero"},
    {barmode: "group", showlegend: traces.length > 0, legend: LEGEND}),
    ends(bars, b => b[2], b => `${b[0]}, ${b[1]}`));
}

function map() {
  const choice = one("map-artifact");
  for (const option of choice.options) option.hidden = option.disabled = !shown(Number(option.value));
  if (choice.selectedOptions[0]?.disabled) choice.value = [...choice.options].find(o => !o.disabled)?.value ?? "";
  const found = choice.value === "" ? null : data.artifacts[Number(choice.value)].cells;
  one("map-none").hidden = found !== null;
  for (const part of ["allocation", "allocation-says", "map-box"]) one(part).hidden = found === null;
  if (found === null) return;
  const used = data.roles.map((r, c) => c).filter(c => found.bpw.some(line => line[c] !== null));
  const pick = lines => lines.map(line => used.map(c => line[c]));
  const flat = found.bpw.flat().filter(v => v !== null), names = data.role_names;
  const cells = found.bpw.flatMap((line, r) => used.map(c => [line[c], `${found.layers[r]}, ${names[c]}`]));
  const fits = one("allocation").clientWidth / Math.max(1, used.length) > 38;
  draw("allocation", [{type: "heatmap", x: used.map(c => data.roles[c]), y: found.layers, z: pick(found.bpw),
    customdata: pick(found.types), colorscale: "Viridis", zmin: 0, zmax: Math.min(16, Math.max(...flat)), xgap: 2, ygap: 2,
    texttemplate: fits ? "%{z:.2f}" : "", colorbar: {title: {text: "bpw"}, thickness: 14}, hoverongaps: false,
    hovertemplate: "%{y}, %{x}<br>%{z:.3f} bpw<br>%{customdata}<extra></extra>"}],
    layout({...axis(""), showgrid: false}, {...axis(""), autorange: "reversed", showgrid: false, type: "category"},
      {height: 150 + 24 * Math.max(4, found.layers.length)}),
    `${data.artifacts[Number(choice.value)].name}: bits per weight of ${ends(cells, c => c[0], c => c[1])}`);
  fill("map", ["layer", ...used.map(c => names[c])],
    found.bpw.map((line, r) => [found.layers[r], ...used.map(c => line[c] === null ? "" : line[c].toFixed(3))]));
}

function spectra() {
  const role = one("spectrum-role").value, what = one("spectrum-what").value;
  const of_role = data.spectra.map((s, at) => ({...s, at})).filter(s => role === data.all_roles || s.role === role);
  const roles = [...new Set(data.spectra.map(s => s.role))];
  const tone = s => data.palette[roles.indexOf(s.role) % data.palette.length];
  let traces, where, says;
  if (what === "sigma") {
    const drawn = of_role.filter(s => s.x.length), last = Math.max(1, ...drawn.map(s => s.layer ?? 0));
    const middle = roles.map(r => drawn.filter(s => s.role === r)).filter(l => l.length).map(l => l[l.length >> 1]);
    const depth = s => `hsl(${265 - 215 * (s.layer ?? 0) / last},62%,55%)`;
    traces = (role === data.all_roles ? middle : drawn).map(s => ({type: "scatter", mode: "lines", x: s.x, y: s.y,
      meta: {at: s.at}, name: role === data.all_roles ? s.role : s.label, line: {width: 2, color: role === data.all_roles ? tone(s) : depth(s)},
      hovertemplate: `${s.label}<br>%{x:.3f}: %{y:.4g}<extra></extra>`}));
    where = layout(axis("index i / full rank"), axis("σ<sub>i</sub> / σ<sub>1</sub>", true));
    const fallen = s => s.y.find((y, i) => s.x[i] >= 0.5) ?? null;
    says = `${role === data.all_roles ? "One matrix per role, from the middle layer" : "All of this role"}. Singular value at half of full `
      + `rank over the largest, ${ends(drawn, fallen, s => s.name)}`;
  } else {
    const values = data.spectral.find(f => f.name === what).values;
    traces = roles.map(r => of_role.filter(s => s.role === r && values[s.at] !== null)).filter(l => l.length).map(l => ({
      type: "scatter", mode: l.length > 1 ? "lines+markers" : "markers", name: l[0].role, line: {color: tone(l[0]), width: 1.5},
      ids: l.map(s => `s${s.at}`), x: l.map(s => s.layer ?? -1), y: l.map(s => values[s.at]), text: l.map(s => s.label), marker: {size: 7, color: tone(l[0])},
      hovertemplate: "%{text}<br>%{y:.4g}<extra></extra>"}));
    where = layout(depth_axis("layer (-1: outside the layers)", traces), axis(what));
    says = `${what}: ${ends(of_role, s => values[s.at], s => s.name)}`;
  }
  draw("spectra", traces, {...where, showlegend: true, height: 480, ...(narrow() ? {legend: LEGEND, height: 620} : {})}, says);
}

function cells(id, chart) {
  const columns = [...new Set(chart.curves.flatMap(c => c.x))], rows = chart.curves;
  const at = (row, column) => row.y[row.x.indexOf(column)] ?? null;
  const z = rows.map(row => columns.map(column => at(row, column)));
  const points = rows.flatMap(row => row.names.map((name, i) => [row.y[i], `${row.name}, ${name}`]));
  const fits = one(id).clientWidth / Math.max(1, columns.length) > 46, most = Math.max(0, ...z.flat().filter(v => v !== null));
  draw(id, [{type: "heatmap", x: columns, y: rows.map(row => row.label), z, colorscale: "Viridis", zmin: 0, zmax: most || 1,
    xgap: 2, ygap: 2, texttemplate: fits ? "%{z:.2~g}" : "", colorbar: {title: {text: chart.y}, thickness: 14}, hoverongaps: false,
    hovertemplate: "%{y}, %{x}: %{z:.4g}<extra></extra>"}], layout({...axis(""), showgrid: false, type: "category"},
    {...axis(""), autorange: "reversed", showgrid: false, type: "category"}, {height: 150 + 24 * Math.max(4, rows.length),
      title: {text: chart.title, font: {size: 14}, x: 0, xref: "paper", xanchor: "left"}}), `${chart.says}: ${ends(points, p => p[0], p => p[1])}`);
}
function chart(id) {
  const it = data.charts[id];
  if (it.kind === "cells") return cells(id, it);
  const flat = it.kind === "points", tones = ["#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2"];
  const traces = it.curves.map((line, at) => ({type: "scatter", mode: flat ? "markers" : "lines+markers", name: line.label, showlegend: it.curves.length > 1,
    x: flat ? line.y : line.x, y: flat ? line.x : line.y, line: {width: 2, color: tones[at % tones.length],
      dash: DASHES[Math.floor(at / tones.length) % DASHES.length]}, marker: {color: tones[at % tones.length], size: 8}, [flat ? "error_x" : "error_y"]: {type: "data", symmetric: false, thickness: 1.2,
      width: 4, color: tones[at % tones.length], array: line.y.map((v, i) => line.high[i] === null ? 0 : Math.max(0, line.high[i] - v)),
      arrayminus: line.y.map((v, i) => line.low[i] === null ? 0 : Math.max(0, v - line.low[i]))},
    customdata: line.y.map((v, i) => line.low[i] === null ? "interval unmeasured" : `${short(line.low[i])} … ${short(line.high[i])}`),
    hovertemplate: flat ? "%{y}: %{x:.5g} (%{customdata})<extra></extra>" : "%{x:,.5~g}: %{y:.5g} (%{customdata})"}));
  const rows = it.curves.flatMap(c => c.x), span = flat ? [] : [Math.min(...rows), Math.max(...rows)];
  const high = flat ? 150 + 26 * Math.max(3, rows.length) : 350 + 20 * Math.ceil(it.curves.length / 4);
  const cut = name => narrow() && name.length > 22 ? `${name.slice(0, 22).replace(/&[^;]*$/, "")}…` : name;
  const shapes = [], where = flat ? "x" : "y", across = flat ? "y" : "x";
  for (const mark of it.marks) for (const value of [mark.low, mark.high]) if (value !== null) {
    shapes.push({type: "line", [`${where}0`]: value, [`${where}1`]: value, [`${across}ref`]: `${across} domain`, [`${across}0`]: 0,
      [`${across}1`]: 1, line: {color: "#d0564e", width: 1.5, dash: "dash"}});
    if (!flat) traces.push({type: "scatter", mode: "lines", x: span, y: [value, value], showlegend: false, hoverinfo: "skip",
      line: {width: 0, color: "#d0564e"}, cliponaxis: false});
  }
  for (const mark of it.marks) traces.push({type: "scatter", mode: "lines", x: [null], y: [null], name: mark.name,
    line: {color: "#d0564e", width: 1.5, dash: "dash"}});
  const all_y = it.curves.flatMap(c => c.y), wide = Math.min(...all_y) > 0 && Math.max(...all_y) > 5 * Math.min(...all_y) && it.marks.length;
  const value = {...axis(flat ? it.x : it.y, wide), ...(wide ? {dtick: "D2"} : {})}, xs = [...new Set(rows)].sort((a, b) => a - b), points = it.curves.flatMap(c => c.y.map((v, i) => [v, c.names[i], c.name]));
  const names = it.curves.length > 1 ? p => `${p[2]}, ${p[1]}` : p => flat ? p[1] : `${it.plain} ${p[1]}`;
  draw(id, traces, layout(flat ? value : it.log ? {...axis(it.x, true), tickvals: xs, tickformat: "~s"} : it.x === "layer" ? depth_axis(it.x, it.curves) : axis(it.x),
    flat ? {...axis(""), type: "category", autorange: "reversed", tickvals: rows, ticktext: rows.map(cut)} : value, {height: high,
    shapes, title: {text: it.title, font: {size: 14}, x: 0, xref: "paper", xanchor: "left"}, showlegend: it.marks.length > 0 || it.curves.length > 1, legend: {...LEGEND, y: -80 / (high - 90)}}), `${it.says}: ${ends(points, p => p[0], names)}`
    + it.marks.map(mark => ` Dashed: ${mark.plain}.`).join(""));
}

const marks = new Set(data.marks);
class View {
  constructor(table) {
    const stored = data.tables[table.id];
    Object.assign(this, {table, body: table.tBodies[0], page: 0, by: -1, up: true, picks: "picks" in table.dataset});
    this.rows = stored ? stored.rows.map((cells, i) => ({cells, artifact: stored.artifacts[i]}))
      : [...this.body.rows].map(tr => ({tr, artifact: tr.dataset.artifact === undefined ? null : Number(tr.dataset.artifact),
        cells: [...tr.cells].map(c => c.dataset.value === undefined ? c.textContent : [c.textContent, Number(c.dataset.value)])}));
    this.controls = all(`[data-filters="${table.id}"]`);
    for (const box of this.controls) box.addEventListener("input", () => { this.page = 0; this.refresh(); });
    for (const turn of all(`#${table.id}-pager [data-turns]`)) turn.addEventListener("click", () => {
      this.page += Number(turn.dataset.turns); this.refresh(); this.table.parentElement.scrollTop = 0; });
    for (const head of table.tHead.rows[0].cells) head.firstChild.addEventListener("click", () => {
      this.up = this.by !== head.cellIndex || !this.up;
      this.by = head.cellIndex;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", this.up ? "ascending" : "descending");
      this.sort();
      this.refresh();
    });
    if (this.picks) this.body.addEventListener("click", event => {
      const row = event.target.closest("tr[data-row]");
      if (row && !String(getSelection())) toggle(chosen.rows, Number(row.dataset.row)); });
  }
  sort() {
    const key = row => { const c = row.cells[this.by]; return typeof c === "string" ? c : c[1]; };
    const order = (a, b) => a < b ? -1 : a > b ? 1 : 0, way = this.up ? 1 : -1;
    this.rows.sort((x, y) => { const a = key(x), b = key(y);
      return typeof a === typeof b ? way * order(a, b) : typeof a === "number" ? -1 : 1; });
  }
  says(row) { return row.says ??= row.cells.map(c => typeof c === "string" ? c : c[0]).join("\n").toLowerCase(); }
  keeps(row, search, equal) {
    return (this.picks || row.artifact === null || shown(row.artifact)) && (!search || this.says(row).includes(search))
      && equal.every(([at, text]) => (typeof row.cells[at] === "string" ? row.cells[at] : row.cells[at][0]) === text);
  }
  made(row) {
    if (row.tr) return row.tr;
    const tr = row.tr = document.createElement("tr");
    if (row.artifact !== null) tr.dataset.artifact = row.artifact;
    row.cells.forEach((given, at) => {
      const cell = document.createElement(at ? "td" : "th"), [text, value, mark] = typeof given === "string" ? [given] : given;
      if (!at) cell.scope = "row";
      if (!at && this.picks) {
        const pick = document.createElement("button");
        Object.assign(pick, {type: "button", className: "pick", textContent: text});
        tr.dataset.row = row.artifact;
        cell.append(pick);
      } else cell.textContent = text;
      if (value !== undefined && value !== null) { cell.dataset.value = value; cell.className = mark ? `number ${mark}` : "number"; }
      else if (mark) cell.className = mark;
      else if (marks.has(text)) cell.className = text.replaceAll(" ", "-");
      else if (text.length > 40) cell.className = "words";
      tr.append(cell);
    });
    return tr;
  }
  refresh() {
    const search = this.controls.find(c => c.type === "search")?.value.toLowerCase() ?? "";
    const equal = this.controls.filter(c => c.tagName === "SELECT" && c.value).map(c => [Number(c.dataset.column), c.value]);
    const kept = this.rows.filter(row => this.keeps(row, search, equal)), size = data.page_rows;
    this.page = Math.max(0, Math.min(this.page, Math.ceil(kept.length / size) - 1));
    const first = this.page * size, drawn = kept.slice(first, first + size);
    this.body.replaceChildren(...drawn.map(row => this.made(row)));
    if (this.picks) for (const row of drawn) {
      const on = chosen.rows.has(row.artifact);
      row.tr.classList.toggle("out", !shown(row.artifact));
      row.tr.classList.toggle("chosen", on);
      row.tr.querySelector("button").setAttribute("aria-pressed", on);
    }
    const [count, lines] = [one(`${this.table.id}-count`), one(`${this.table.id}-lines`)];
    if (count) count.textContent = `${kept.length} of ${this.rows.length} lines`;
    if (lines) lines.textContent = `lines ${kept.length ? first + 1 : 0} to ${first + drawn.length} of ${kept.length}`;
    for (const turn of all(`#${this.table.id}-pager [data-turns]`))
      turn.disabled = turn.dataset.turns === "1" ? first + size >= kept.length : !this.page;
  }
  filter(column, text) {
    for (const c of this.controls) if (c.tagName === "SELECT" && (column === undefined
        || this.table.tHead.rows[0].cells[c.dataset.column].textContent === column)) c.value = text;
  }
}
const views = new Map(all("table:not(.drawn)").map(table => [table.id, new View(table)]));
function samples() {
  for (const card of all("article[data-how]"))
    card.hidden = card.dataset.how !== one("sample-how").value
      || (card.dataset.artifact !== undefined && !shown(Number(card.dataset.artifact)));
  for (const box of all(".sample")) box.hidden = box.dataset.prompt !== one("sample-prompt").value;
}

const PLOTS = {...Object.fromEntries(Object.keys(data.charts).map(id => [id, () => chart(id)])), "pareto-0": () => pareto(0), "pareto-1": () => pareto(1), layers, components, allocation: map, spectra};
const OF_ARTIFACTS = ["pareto-0", "pareto-1", "layers", "components", "allocation"];
function refresh(names) {
  for (const button of all(".group")) button.setAttribute("aria-pressed", chosen.groups.has(Number(button.dataset.group)));
  if (one("status")) {
    one("status").textContent = `${indices().length} of ${data.artifacts.length} artifacts shown`;
    one("everything").disabled = free();
  }
  for (const view of views.values()) view.refresh();
  samples();
  for (const name of names) if (one(name)) PLOTS[name]();
}
const toggle = (set, value) => { set.has(value) ? set.delete(value) : set.add(value); refresh(OF_ARTIFACTS); };
for (const button of all(".group")) button.addEventListener("click", () => toggle(chosen.groups, Number(button.dataset.group)));
one("everything")?.addEventListener("click", () => { chosen.groups.clear(); chosen.rows.clear(); refresh(OF_ARTIFACTS);
  document.querySelector(".group").focus(); });
for (const select of all("select[data-redraws]")) select.addEventListener("change", () => {
  for (const name of select.dataset.redraws.split(" ")) PLOTS[name](); });
for (const box of all("#sample-prompt, #sample-how")) box.addEventListener("input", samples);

function open(id) { one(`${id}-box`).open = true; views.get(id).refresh(); one(`${id}-box`).scrollIntoView({block: "nearest"}); }
refresh(Object.keys(PLOTS));
for (const name of ["pareto-0", "pareto-1", "layers", "components"]) one(name)?.on("plotly_click", event => {
  const point = event.points[0], at = point.id ?? point.data.meta?.at;
  if (at !== undefined) toggle(chosen.rows, Number(at)); });
one("allocation")?.on("plotly_click", event => {
  const tensors = views.get("tensors"), names = data.role_names;
  const role = names[data.roles.indexOf(event.points[0].x)];
  tensors.filter(undefined, "");
  tensors.filter("artifact", data.artifacts[Number(one("map-artifact").value)].name);
  tensors.filter("role", role);
  tensors.filter("layer", String(event.points[0].y).replace(/^layer /, "").replace(/^outside$/, ""));
  open("tensors"); });
one("spectra")?.on("plotly_click", event => {
  const point = event.points[0], at = point.data.meta?.at ?? Number(String(point.id).slice(1)), view = views.get("spectrum-table");
  view.controls.find(c => c.type === "search").value = data.spectra[at].name;
  view.filter(undefined, "");
  open("spectrum-table"); });

const system = matchMedia("(prefers-color-scheme: dark)"), theme = one("theme");
const is_dark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
const tell_theme = () => theme.setAttribute("aria-pressed", is_dark());
theme.addEventListener("click", () => { document.documentElement.dataset.theme = is_dark() ? "light" : "dark"; tell_theme(); });
system.addEventListener("change", tell_theme);
tell_theme();

async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch {
    const box = document.createElement("textarea");
    box.value = text;
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  }
}
for (const button of all(".copy")) button.addEventListener("click", async () => {
  const lines = button.id === "copy-all" ? [...button.previousElementSibling.querySelectorAll("pre")] : [button.previousElementSibling];
  const done = await copy(lines.map(pre => pre.textContent).join("\n"));
  one("copied").textContent = done ? `Copied: ${lines.length} ${lines.length > 1 ? "commands" : "command"}`
    : "This browser does not let the page copy; select the text instead";
  button.focus(); });
const closed = [];
addEventListener("beforeprint", () => { for (const box of all("details:not([open])")) { box.open = true; closed.push(box); } });
addEventListener("afterprint", () => { while (closed.length) closed.pop().open = false; });
