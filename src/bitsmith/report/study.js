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
const draw = (id, traces, where) => Plotly.react(id, traces, where, {responsive: true, displaylogo: false});
const indices = () => data.artifacts.map((a, at) => at).filter(shown);

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
  const span = get => Math.max(...kept.map(get)) - Math.min(...kept.map(get)) || 1;
  const across = i => Math.log(data.artifacts[i][size]), up = i => {
    const v = value(data.artifacts[i])[0];
    return measure.log ? Math.log(v) : v;
  };
  const wide = span(across), high = span(up), named = new Set();
  for (const i of [...front, ...(kept.length <= 10 ? kept : [])])
    if (![...named].some(j => Math.abs(across(i) - across(j)) < wide / 6 && Math.abs(up(i) - up(j)) < high / 14))
      named.add(i);
  const traces = [{type: "scatter", mode: "lines", hoverinfo: "skip", name: "Pareto front",
    line: {color: GREY, width: 1, shape: "hv", dash: "dot"}, x: front.map(i => data.artifacts[i][size]),
    y: front.map(i => value(data.artifacts[i])[0])}];
  data.groups.forEach((group, g) => {
    const ids = kept.filter(i => data.artifacts[i].group === g);
    if (!ids.length) return;
    traces.push(trace(ids.map(i => data.artifacts[i]), group.name, group.colour,
      data.artifacts[ids[0]].original ? "star" : "circle",
      {mode: "markers+text", ids: ids.map(String), textposition: "top center", textfont: {size: 11}, cliponaxis: false,
        texttemplate: ids.map(i => named.has(i) ? "%{text}" : "")}));
  });
  const peers = data.peers.filter(good);
  if (peers.length) traces.push(trace(peers, "peer", GREY, "diamond-open"));
  draw(`pareto-${at}`, traces, layout(
    {...axis(size === "bytes" ? "bytes of the weight files" : "bits per weight", true),
      tickformat: size === "bytes" ? "~s" : "~g", ...(wide > 1.5 || kept.length < 2 ? {dtick: "D2"} : {})},
    axis(measure.label, measure.log)));
  const absent = rows.filter(i => !kept.includes(i)).map(i => data.artifacts[i].name);
  one(`pareto-note-${at}`).textContent = absent.length
    ? `Not drawn, unmeasured or 0 on a logarithmic axis: ${absent.join(", ")}.` : "";
}

function layers() {
  const what = one("layer-what").value, role = one("layer-role").value, traces = [];
  for (const at of indices()) for (const line of data.artifacts[at].layers) {
    if (line.what !== what || (line.role !== role && (role !== data.all_roles
        || data.artifacts[at].layers.some(l => l.what === what && l.role === role)))) continue;
    const style = lineOf(at), name = data.artifacts[at].label + (line.role === role ? "" : ` ${line.role}`);
    traces.push({type: "scatter", mode: "lines+markers", name, x: line.x, y: line.y, line: style,
      marker: {color: style.color, size: 7}, hovertemplate: "layer %{x}: %{y:.4g}",
      ...(line.low.every(v => v !== null) ? {error_y: {type: "data", symmetric: false, thickness: 1, width: 3,
        array: line.high.map((v, i) => v - line.y[i]), arrayminus: line.low.map((v, i) => line.y[i] - v)}} : {})});
  }
  if (traces.some(t => Math.max(...t.y) > 0.7) && what === data.weights_error)
    traces.push({type: "scatter", mode: "lines", name: "no closer than zeros", hovertemplate: "no closer than zeros",
      x: [...new Set(traces.flatMap(t => t.x))].sort((a, b) => a - b), line: {color: "#e45756", dash: "dash", width: 1.5},
      y: [...new Set(traces.flatMap(t => t.x))].map(() => 1)});
  draw("layers", traces, layout(depth_axis("layer", traces), {...axis(""), rangemode: "tozero"},
    {showlegend: traces.length > 0, legend: {orientation: "h", y: -0.25}}));
}

function components() {
  const traces = indices().filter(at => data.artifacts[at].components.length).map(at => {
    const found = data.artifacts[at].components.filter(c => c[one("component-what").value] !== null);
    const style = lineOf(at);
    return {type: "bar", name: data.artifacts[at].label, x: found.map(c => c.name), marker: {color: style.color},
      y: found.map(c => c[one("component-what").value]), hovertemplate: "%{x}: %{y:.4g}"};
  });
  draw("components", traces, layout(axis(""), {...axis("relative error"), rangemode: "tozero"},
    {barmode: "group", showlegend: traces.length > 0, legend: {orientation: "h", y: -0.25}}));
}

function map() {
  const choice = one("map-artifact");
  for (const option of choice.options) option.hidden = option.disabled = !shown(Number(option.value));
  if (choice.selectedOptions[0]?.disabled) choice.value = [...choice.options].find(o => !o.disabled)?.value ?? "";
  const found = choice.value === "" ? null : data.artifacts[Number(choice.value)].cells;
  one("map-none").hidden = found !== null;
  for (const part of [one("allocation"), one("map").parentElement]) part.hidden = found === null;
  if (found === null) return;
  const used = data.roles.map((r, c) => c).filter(c => found.bpw.some(line => line[c] !== null));
  const pick = lines => lines.map(line => used.map(c => line[c]));
  const flat = found.bpw.flat().filter(v => v !== null);
  draw("allocation", [{type: "heatmap", x: used.map(c => data.roles[c]), y: found.layers, z: pick(found.bpw),
    customdata: pick(found.types), colorscale: "Viridis", zmin: 0, zmax: Math.min(16, Math.max(...flat)), xgap: 2, ygap: 2,
    texttemplate: "%{z:.2f}", colorbar: {title: {text: "bpw"}, thickness: 14}, hoverongaps: false,
    hovertemplate: "%{y}, %{x}<br>%{z:.3f} bpw<br>%{customdata}<extra></extra>"}],
    layout({...axis(""), showgrid: false}, {...axis(""), autorange: "reversed", showgrid: false, type: "category"},
      {height: 110 + 24 * Math.max(4, found.layers.length)}));
  const cell = (tag, text, scope) => {
    const made = document.createElement(tag);
    made.textContent = text;
    if (scope) made.scope = scope;
    return made;
  };
  const table = one("map"), head = document.createElement("tr"), body = document.createElement("tbody");
  const names = one("roles").content.textContent.split("\n");
  head.append(cell("th", "layer", "col"), ...used.map(c => cell("th", names[c], "col")));
  found.bpw.forEach((line, r) => {
    const row = document.createElement("tr");
    row.append(cell("th", found.layers[r], "row"), ...used.map(c => cell("td", line[c] === null ? "" : line[c].toFixed(3))));
    body.append(row);
  });
  const top = document.createElement("thead");
  top.append(head);
  table.replaceChildren(table.caption, top, body);
}

function spectra() {
  const role = one("spectrum-role").value, what = one("spectrum-what").value;
  const of_role = data.spectra.map((s, at) => ({...s, at})).filter(s => role === data.all_roles || s.role === role);
  const roles = [...new Set(data.spectra.map(s => s.role))];
  const tone = s => data.palette[roles.indexOf(s.role) % data.palette.length];
  let traces, where;
  if (what === "sigma") {
    const drawn = of_role.filter(s => s.x.length), last = Math.max(1, ...drawn.map(s => s.layer ?? 0));
    const middle = roles.map(r => drawn.filter(s => s.role === r)).filter(l => l.length).map(l => l[l.length >> 1]);
    const depth = s => `hsl(${265 - 215 * (s.layer ?? 0) / last},62%,55%)`;
    traces = (role === data.all_roles ? middle : drawn).map(s => ({type: "scatter", mode: "lines", x: s.x, y: s.y,
      name: role === data.all_roles ? s.role : s.label, line: {width: 2, color: role === data.all_roles ? tone(s) : depth(s)},
      hovertemplate: `${s.label}<br>%{x:.3f}: %{y:.4g}<extra></extra>`}));
    where = layout(axis("index i / full rank"), axis("σ<sub>i</sub> / σ<sub>1</sub>", true));
  } else {
    const values = data.spectral.find(f => f.name === what).values;
    traces = roles.map(r => of_role.filter(s => s.role === r && values[s.at] !== null)).filter(l => l.length).map(l => ({
      type: "scatter", mode: l.length > 1 ? "lines+markers" : "markers", name: l[0].role, line: {color: tone(l[0]), width: 1.5},
      x: l.map(s => s.layer ?? -1), y: l.map(s => values[s.at]), text: l.map(s => s.label), marker: {size: 7, color: tone(l[0])},
      hovertemplate: "%{text}<br>%{y:.4g}<extra></extra>"}));
    where = layout(depth_axis("layer (-1: outside the layers)", traces), axis(what));
  }
  draw("spectra", traces, {...where, showlegend: true, height: 480});
}

function rows() {
  for (const row of all("[data-artifact], [data-how]")) {
    const at = row.dataset.artifact, table = row.closest("table");
    let hide = at !== undefined && !shown(Number(at));
    if (row.dataset.how !== undefined) hide ||= row.dataset.how !== one("sample-how").value;
    row.hidden = hide;
    if (table) row.dataset.off = hide ? "1" : "";
  }
  for (const box of all("[data-filters]")) {
    const table = one(box.dataset.filters);
    const controls = all(`[data-filters="${box.dataset.filters}"]`);
    let left = 0;
    for (const row of table.tBodies[0].rows) {
      row.hidden = row.dataset.off === "1" || controls.some(c => c.value && (c.tagName === "SELECT"
        ? ![...row.cells].some(td => td.textContent === c.value)
        : !row.textContent.toLowerCase().includes(c.value.toLowerCase())));
      left += row.hidden ? 0 : 1;
    }
    one(`${table.id}-count`).textContent = `${left} of ${table.tBodies[0].rows.length} lines`;
  }
  for (const row of all("tr[data-row]")) {
    const at = Number(row.dataset.row), on = chosen.rows.has(at);
    row.classList.toggle("out", !shown(at));
    row.classList.toggle("chosen", on);
    row.querySelector("button").setAttribute("aria-pressed", on);
  }
  for (const box of all(".sample")) box.hidden = box.dataset.prompt !== one("sample-prompt").value;
}

const PLOTS = {"pareto-0": () => pareto(0), "pareto-1": () => pareto(1), layers, components, allocation: map, spectra};
const OF_ARTIFACTS = ["pareto-0", "pareto-1", "layers", "components", "allocation"];
function refresh(names) {
  for (const button of all(".group")) button.setAttribute("aria-pressed", chosen.groups.has(Number(button.dataset.group)));
  one("status").textContent = `${indices().length} of ${data.artifacts.length} artifacts shown`;
  one("everything").disabled = free();
  rows();
  for (const name of names) if (one(name)) PLOTS[name]();
}
const toggle = (set, value) => { set.has(value) ? set.delete(value) : set.add(value); refresh(OF_ARTIFACTS); };
for (const button of all(".group")) button.addEventListener("click", () => toggle(chosen.groups, Number(button.dataset.group)));
for (const row of all("tr[data-row]")) row.addEventListener("click", () => {
  if (!String(getSelection())) toggle(chosen.rows, Number(row.dataset.row)); });
one("everything").addEventListener("click", () => { chosen.groups.clear(); chosen.rows.clear(); refresh(OF_ARTIFACTS);
  one("everything").disabled || one("everything").focus(); });
for (const select of all("select[data-redraws]")) select.addEventListener("change", () => {
  for (const name of select.dataset.redraws.split(" ")) PLOTS[name](); });
for (const box of all("[data-filters], #sample-prompt, #sample-how")) box.addEventListener("input", rows);
for (const button of all("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0], at = head.cellIndex;
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[at].dataset.value === undefined ? row.cells[at].textContent : Number(row.cells[at].dataset.value);
  const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
  body.append(...[...body.rows].sort((a, b) => (typeof key(a) === typeof key(b) && !up ? -1 : 1) * order(key(a), key(b))));
});
refresh(Object.keys(PLOTS));
for (const name of ["pareto-0", "pareto-1"]) one(name)?.on("plotly_click", event => {
  const id = event.points[0].id;
  if (id !== undefined) toggle(chosen.rows, Number(id)); });
