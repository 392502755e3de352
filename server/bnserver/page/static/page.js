// The page of `bnlayer serve --dashboard`. It asks only where it came from, and what it shows is put in as text.
"use strict";

const $ = (id) => document.getElementById(id);
const AGAIN_MS = 2000;
const RECENT_S = 300;
const state = { token: sessionStorage.getItem("token"), seen: null, job: null, layer: null, charts: {}, asking: false };

// ---- what comes in ----

async function ask(path) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const answer = await fetch(path, { headers, cache: "no-store" });
  if (answer.status === 401 || answer.status === 403) {
    const { error } = await answer.json();
    throw Object.assign(new Error(error), { refused: true });
  }
  if (!answer.ok) throw Object.assign(new Error(`status ${answer.status}`), { status: answer.status });
  return answer;
}

async function listen() {
  for (;;) {
    try {
      const reader = (await ask("events")).body.pipeThrough(new TextDecoderStream()).getReader();
      $("login").hidden = true;
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) throw new Error("the service hung up");
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        if (events.length) show(JSON.parse(events.at(-1).slice("data: ".length)));
      }
    } catch (error) {
      if (error.refused) return refuse(error.message);
      say(`no answer: ${error.message}; trying again`, true);
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
    }
  }
}

function refuse(text) {
  say("a token is needed", true);
  $("refusal").textContent = state.token ? text : "";
  state.token = null;
  sessionStorage.removeItem("token");
  $("login").hidden = false;
  $("token").focus();
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  sessionStorage.setItem("token", state.token);
  $("token").value = "";
  say("connecting …");
  listen();
});

function say(text, lost = false) {
  if ($("status").textContent !== text) $("status").textContent = text;
  $("status").classList.toggle("lost", lost);
}

// ---- what is shown ----

function show(seen) {
  state.seen = seen;
  const jobs = seen.jobs;
  const ranks = jobs.reduce((sum, job) => sum + job.ranks.length, 0);
  say(jobs.length ? `${jobs.length} job${jobs.length > 1 ? "s" : ""}, ${ranks} ranks` : "no job runs");
  if (!jobs.some((job) => job.job === state.job)) [state.job, state.layer] = [jobs[0]?.job ?? null, null];
  choices($("jobs"), jobs.map((job) => ({
    name: job.job,
    text: `${plain(job.job)}: ${job.state}, ${job.ranks.length} of ${job.world_size} ranks, version ${job.version}`,
    alarm: job.layers.some((layer) => layer.drifts.length) || job.ranks.some((rank) => rank.straggler),
  })), state.job, (name) => { [state.job, state.layer] = [name, null]; show(state.seen); });
  showAlarms(seen.alarms, jobs);
  $("failed").hidden = !seen.failures.length;
  list($("failures"), seen.failures.map((failure) => ({
    text: `${clock(failure.time)}  ${plain(failure.job)}, generation ${failure.generation}: ${failure.reason}: ${plain(failure.text)}`,
    name: seen.time - failure.time < RECENT_S ? "alarm" : "",
  })));
  const job = jobs.find((each) => each.job === state.job);
  $("job").hidden = !job;
  if (job) showJob(job, seen.bounds);
}

function showAlarms(alarms, jobs) {
  const now = jobs.flatMap((job) => job.layers.flatMap((layer) => layer.drifts.map((drift) => `${job.job}\n${layer.layer}\n${drift.what}`)));
  list($("alarms"), alarms.length ? alarms.map((alarm) => ({
    text: `${clock(alarm.time)}  ${plain(alarm.job)}, ${plain(alarm.layer)}, version ${alarm.version}: ` +
      `the moving ${alarm.what} of ${alarm.channels} channel${alarm.channels > 1 ? "s" : ""} left its recent band; ` +
      `channel ${alarm.channel}: ${short(alarm.before)} → ${short(alarm.now)}`,
    name: now.includes(`${alarm.job}\n${alarm.layer}\n${alarm.what}`) ? "alarm" : "",
  })) : [{ text: "none", name: "" }]);
}

function showJob(job, bounds) {
  put($("where"), job.where ? `Generation ${job.generation}, ${job.completed} operations; ${plain(job.where)}` : `Generation ${job.generation}`);
  rows($("ranks"), job.ranks.map((rank) => ({
    name: rank.straggler ? "straggler" : "",
    cells: [
      String(rank.rank),
      [rank.connected ? "" : "away", rank.straggler ? "◀ straggler" : "",
        rank.awaited_s > 1 ? `awaited for ${seconds(rank.awaited_s)}` : "",
        rank.waiting_s > 1 ? `waiting for ${seconds(rank.waiting_s)}` : ""].filter(Boolean).join(", "),
      seconds(rank.waited_s), seconds(rank.held_up_s), plain(rank.where),
    ],
  })));
  latency(job.took, bounds);
  if (!job.layers.some((layer) => layer.layer === state.layer)) state.layer = job.layers[0]?.layer ?? null;
  choices($("layers"), job.layers.map((layer) => ({
    name: layer.layer,
    text: `${plain(layer.layer)} (${layer.channels})${layer.drifts.length ? " drifts" : ""}`,
    alarm: layer.drifts.length > 0,
  })), state.layer, (name) => { state.layer = name; show(state.seen); });
  showLayer();
}

function latency(took, bounds) {
  const most = Math.max(...took, 1);
  const list = $("latency");
  while (list.children.length > took.length * 3) list.lastChild.remove();
  took.forEach((count, index) => {
    if (list.children.length <= index * 3) {
      list.append(document.createElement("dt"), document.createElement("dd"), document.createElement("dd"));
      list.children[index * 3 + 1].append(document.createElement("meter"));
    }
    const [name, bar, number] = [0, 1, 2].map((offset) => list.children[index * 3 + offset]);
    const upTo = index < bounds.length ? `≤ ${brief(bounds[index])}` : `> ${brief(bounds.at(-1))}`;
    put(name, upTo);
    [bar.firstChild.max, bar.firstChild.value] = [most, count];
    bar.firstChild.ariaLabel = `${upTo}: ${count}`;
    put(number, String(count));
  });
}

async function showLayer() {
  const { job, layer } = state;
  if (layer === null || state.asking) return;
  state.asking = true;
  try {
    const found = await (await ask(`series?${new URLSearchParams({ job, layer })}`)).json();
    if (state.job !== job || state.layer !== layer) return;
    put($("layer"), `${plain(layer)}, version ${found.version}`);
    for (const name of ["mean", "variance"]) {
      lines(name, [found.time, ...found[name]]);
      bars(`${name}-distribution`, found[`${name}_distribution`]);
    }
  } catch (error) {
    if (error.status !== 404) put($("layer"), `no answer: ${error.message}`);
  } finally {
    state.asking = false;
    if (state.layer !== layer || state.job !== job) showLayer();
  }
}

// ---- charts ----

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function draw(name, data, options) {
  const place = $(name);
  let chart = state.charts[name];
  if (!chart) {
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick)));
    chart = new uPlot({
      width: place.clientWidth || 300, height: 190, legend: { show: false }, cursor: { drag: { x: false, y: false } },
      ...options, axes: [{ ...axis, ...options.axis }, { ...axis, size: 64, values }],
    }, data, place);
    state.charts[name] = chart;
  } else chart.setData(data);
}

function lines(name, data) {
  const line = (label, width, stroke) => ({ label, width, stroke: colour(stroke), points: { show: data[0].length < 3 } });
  draw(name, data, { series: [
    {}, line("least", 1, "--soft"), line("25 %", 1, "--soft"), line("median", 2.5, "--mark"), line("75 %", 1, "--soft"), line("greatest", 1, "--soft"),
  ] });
}

function bars(name, distribution) {
  const centres = distribution.from.map((from, index) => (from + distribution.to[index]) / 2);
  const values = (_, ticks) => ticks.map(short);
  const width = distribution.to[0] - distribution.from[0] || 1;
  draw(name, [centres, distribution.channels], {
    scales: { x: { time: false, range: (_, low, high) => [low - width / 2, high + width / 2] }, y: { range: (_, low, high) => [0, high || 1] } }, axis: { values },
    series: [{}, { stroke: colour("--mark"), fill: colour("--soft"), points: { show: false }, paths: uPlot.paths.bars({ size: [0.9, 60] }) }],
  });
}

function anew() {
  for (const chart of Object.values(state.charts)) chart.destroy();
  state.charts = {};
  showLayer();
}

new ResizeObserver(() => {
  for (const [name, chart] of Object.entries(state.charts)) {
    const width = $(name).clientWidth;
    if (width && width !== chart.width) chart.setSize({ width, height: 190 });
  }
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", anew);

// ---- elements: what has not changed is left alone, so that focus and selection stay ----

function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function children(parent, count, make) {
  while (parent.children.length > count) parent.lastChild.remove();
  while (parent.children.length < count) parent.append(make());
  return [...parent.children];
}

function choices(parent, wanted, chosen, choose) {
  children(parent, wanted.length, () => Object.assign(document.createElement("button"), { type: "button" })).forEach((button, index) => {
    const { name, text, alarm } = wanted[index];
    put(button, text);
    button.ariaPressed = String(name === chosen);
    button.classList.toggle("alarm", alarm);
    button.onclick = () => choose(name);
  });
}

function list(parent, wanted) {
  children(parent, wanted.length, () => document.createElement("li")).forEach((item, index) => {
    put(item, wanted[index].text);
    item.className = wanted[index].name;
  });
}

function rows(parent, wanted) {
  children(parent, wanted.length, () => document.createElement("tr")).forEach((row, index) => {
    const { name, cells } = wanted[index];
    row.className = name;
    children(row, cells.length, () => document.createElement("td")).forEach((cell, column) => put(cell, cells[column]));
  });
}

// ---- numbers and names ----

const short = (number) => (number === 0 ? "0" : Math.abs(number) >= 1e5 || Math.abs(number) < 1e-3 ? number.toExponential(1) : String(Number(number.toPrecision(3))));
const brief = (time) => (time < 1 ? `${Number((time * 1000).toPrecision(2))} ms` : `${time} s`);
const seconds = (time) => (time < 60 ? `${time.toFixed(1)} s` : `${Math.floor(time / 60)} min ${Math.floor(time % 60)} s`);
const clock = (time) => new Date(time * 1000).toLocaleTimeString();
const plain = (text) => text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, "\uFFFD");

listen();
