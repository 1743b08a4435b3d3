// The page: what a person does, and which part of the page answers.

import { $, announce, download, element, fail, opens } from "./dom.js";
import { ShotList } from "./film.js";
import { Player } from "./player.js";
import { Server } from "./protocol.js";
import { Schedule } from "./shots.js";
import { Stats } from "./stats.js";
import { theme } from "./theme.js";
import { StartImage } from "./upload.js";
import { World } from "./world.js";

const root = document.documentElement;
const server = new Server();
const player = new Player(server, $("#screen"));
const stats = new Stats($("#numbers"));
const schedule = new Schedule((shot, at) => film(shot, at));
const shots = new ShotList(schedule);
const world = new World({ player, stats, start: (body) => begin(body) });
const image = new StartImage(server, () => info.limits, () => model.name);
let info = { models: [], limits: {} };
let model = null;
const prompts = new Map(); // event -> words, until applied

const mode = () => $("input[name=mode]:checked").value;
const live = () => root.dataset.state === "live";
const number = (name) => ($(name).value === "" ? undefined : Number($(name).value));

// ---- a stream begins, is found again, ends

async function begin(body) {
  const next = info.models.find(({ name }) => name === body.model);
  if (!next) {
    fail(`This server has no model ${body.model}.`);
    return false;
  }
  $("#go").disabled = true;
  try {
    const { id, position } = await server.post("streams", body);
    if (live()) await end();
    choose(next);
    await attach(id, next, body);
    image.clear(); // an upload begins one stream
    if (position) notice(`Place ${position} in the queue`);
    return true;
  } catch (error) {
    fail(error);
    return false;
  } finally {
    $("#go").disabled = false;
  }
}

async function attach(id, next, body) {
  model = next;
  stats.reset();
  prompts.clear();
  state("live");
  await player.open(id, model);
  world.begin(model, body);
  const kept = { id, model: model.name, prompt: body?.prompt };
  if (body) sessionStorage.setItem("longlive.stream", JSON.stringify(kept));
}

/** The stream of before a reload, if the server still has it. */
async function resume() {
  const kept = JSON.parse(sessionStorage.getItem("longlive.stream") ?? "null");
  const next = info.models.find(({ name }) => name === kept?.model);
  if (!next) return;
  try {
    const found = await server.json(`streams/${kept.id}`);
    if (found.state === "ended") throw new Error(found.reason);
    choose(next);
    schedule.begin(kept.prompt ?? "A script", null);
    await attach(kept.id, next, null);
    shots.render();
  } catch {
    sessionStorage.removeItem("longlive.stream");
  }
}

async function end() {
  const id = player.id;
  player.close();
  world.end();
  state("idle");
  notice("");
  sessionStorage.removeItem("longlive.stream");
  schedule.done = [];
  schedule.end = null;
  shots.render();
  stats.reset();
  $("#screen").setAttribute("aria-label", "No picture yet");
  try {
    await server.request(`streams/${id}`, { method: "DELETE" });
  } catch { /* it is gone already */ }
}

function state(name) {
  root.dataset.state = name;
  for (const button of ["pause", "restart", "video", "script"]) $(`#${button}`).disabled = name !== "live";
  $("#seed").disabled = $("#dice").disabled = name === "live";
  settable();
  $("#go").textContent = name === "live" ? "Send" : "Start";
  $("#prompt").placeholder = name === "live" ? "What happens next?" : "Describe the first shot";
  paused(false);
  if (name === "idle") link("closed");
}

// ---- prompts

function film(shot, at) {
  const message = { type: "prompt", text: shot.prompt, mode: shot.cut ? "cut" : "continue" };
  const event = player.direct(at === null ? message : { ...message, at }, at === null && shot.cut);
  if (at === null) stats.control(event, performance.now());
  prompts.set(event, shot.prompt);
  queueMicrotask(() => shots.render());
  return event;
}

function words() {
  const text = $("#prompt").value.trim();
  const { prompt: limit } = info.limits;
  if (limit && text.length > limit) throw new Error(`The prompt has ${text.length} characters; this server takes ${limit}.`);
  if (mode() !== "world" || !text || /\b(first|third)[- ]person\b/i.test(text)) return text;
  return `${$("input[name=person]:checked").value} ${text}`;
}

async function start() {
  let text = words();
  let chunks = null;
  if (!text && mode() === "film" && schedule.ahead.length) ({ prompt: text, chunks } = schedule.ahead[0]);
  if (!text) {
    $("#prompt").focus();
    return;
  }
  const body = {
    model: $("#model").value, prompt: text, seed: number("#seed"), steps: number("#steps"), guidance: number("#guidance"),
  };
  if (mode() === "film" && image.upload) body.image = image.upload;
  if (!(await begin(body))) return;
  if (chunks !== null) schedule.ahead.shift();
  schedule.begin(text, chunks ?? (schedule.ahead.length ? 2 : null));
  shots.render();
  $("#prompt").value = "";
  if (mode() === "world") world.back();
}

function send() {
  const text = words();
  if (!text) return;
  const how = $("input[name=how]:checked").value;
  const message = { type: "prompt", text, mode: how };
  if (how === "blend") message.chunks = number("#blend") ?? 4;
  // A cut passes what is queued; the same shot goes on through what is queued, without a jump.
  const event = mode() === "world" ? world.send(message) : player.direct(message, how === "cut");
  stats.control(event, performance.now());
  prompts.set(event, text);
  if (mode() === "film") {
    schedule.interrupt(text, how === "cut", event, schedule.ahead.length ? 2 : null);
    shots.render();
  }
  $("#prompt").value = "";
  if (mode() === "world") world.back();
}

$("#composer").addEventListener("submit", (event) => {
  event.preventDefault();
  try {
    if (live()) send();
    else start();
  } catch (error) {
    fail(error);
  }
});
$("#prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("#composer").requestSubmit();
  }
});
$("#later").addEventListener("click", () => {
  const text = $("#prompt").value.trim();
  if (!text) return;
  shots.add(text, $("input[name=how]:checked").value === "cut");
  $("#prompt").value = "";
  $("#prompt").focus();
});
$("#how").addEventListener("change", ({ target }) => { $("#over").hidden = target.value !== "blend"; });

// ---- what the server and the screen say

function notice(text) {
  $("#notice").hidden = !text;
  $("#notice").textContent = text;
  if (text) announce(text);
}

const LINKS = { connecting: "Connecting", open: "Live", waiting: "Connecting again", closed: "Not started", ended: "Ended", gone: "Gone" };
function link(name) {
  $("#link").dataset.link = name;
  $("#link span").textContent = LINKS[name];
}

player.addEventListener("state", ({ detail }) => {
  link(detail);
  if (detail === "waiting") notice("The connection broke; trying again");
  if (detail === "open") notice("");
  if (detail === "gone") {
    fail("The server no longer has this stream.");
    end();
  }
});

player.addEventListener("message", ({ detail: message }) => {
  if (message.type === "stats") stats.message(message);
  else if (message.type === "queue") notice(message.position ? `Place ${message.position} in the queue` : "");
  else if (message.type === "error") fail(message.message);
  else if (message.type === "end") {
    player.playback?.finish();
    notice(`The stream ended: ${message.reason}`);
  }
  else if (message.type === "applied") {
    schedule.applied(message.event_id, message.chunk);
    if (!prompts.has(message.event_id)) return;
    announce(`Chunk ${message.chunk}: ${prompts.get(message.event_id)}`);
    $("#screen").setAttribute("aria-label", `Picture of: ${prompts.get(message.event_id)}`);
    prompts.delete(message.event_id);
    shots.render();
  }
});

player.addEventListener("received", ({ detail }) => schedule.seen(detail.chunk));
player.addEventListener("drawn", ({ detail }) => {
  stats.picture(detail);
  shots.at(detail.picture.chunk);
  if (model.kind === "world") world.drawn(detail.picture);
  const seconds = Math.floor(detail.picture.index / model.fps);
  const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  if ($("#time").textContent !== time) $("#time").textContent = time;
});
setInterval(() => live() && !document.hidden && stats.show(player.playback), 500);

// ---- transport, settings, files

function paused(now) {
  const button = $("#pause");
  $("use", button).setAttribute("href", now ? "#i-play" : "#i-pause");
  button.setAttribute("aria-label", now ? "Play" : "Pause");
}
function togglePause() {
  if (!live()) return;
  player.pause(!player.paused);
  paused(player.paused);
  notice(player.paused ? "Paused" : "");
}
$("#pause").addEventListener("click", togglePause);
$("#restart").addEventListener("click", async () => {
  await end();
  $("#prompt").focus();
});
$("#full").hidden = !document.fullscreenEnabled;
$("#full").addEventListener("click", () => (document.fullscreenElement ? document.exitFullscreen() : $("#view").requestFullscreen()));
$("#dice").addEventListener("click", () => { $("#seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1; });
for (const name of ["#steps", "#guidance"]) {
  $(name).addEventListener("change", () => {
    if (live()) player.direct({ type: "settings", steps: number("#steps"), guidance: number("#guidance") });
  });
}
async function keep(file) {
  try {
    const response = await server.request(`streams/${player.id}/${file}`);
    download(await response.blob(), `longlive-${player.id}-${file}`);
  } catch (error) {
    fail(error);
  }
}
$("#video").addEventListener("click", () => keep("video.mp4"));
$("#script").addEventListener("click", () => keep("script.json"));
opens($("#script-load"), $("#script-file"), async (text) => {
  const script = JSON.parse(text);
  if (await begin({ model: $("#model").value, script })) {
    schedule.begin("A script", null);
    shots.render();
  }
});
$("#error button").addEventListener("click", () => { $("#error").hidden = true; });

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, textarea, select, dialog *")) {
    if (event.key === "Escape" && event.target.id === "prompt") $("#screen").focus();
    return;
  }
  if (event.key === "/") {
    event.preventDefault();
    if (world.running) world.type();
    else $("#prompt").focus();
  } else if (event.key === " " && !event.target.matches("button") && !world.input.keys.includes("Space")) {
    event.preventDefault();
    togglePause();
  } else if (event.key === "f" && !world.running) $("#full").click();
});

// ---- modes and models

/** Where a model lists its choices, they are those of a whole stream, and its guidance is fixed. */
function settable() {
  const choices = model?.steps_choices;
  $("#steps").disabled = Boolean(choices) && (live() || choices.length < 2);
  $("#guidance").disabled = model?.guidance !== undefined;
}

/** Shows a model and its mode. */
function choose(next) {
  model = next;
  $(`input[name=mode][value=${next.kind}]`).checked = true;
  root.dataset.mode = next.kind;
  if (next.kind === "world" && $("input[name=how]:checked").value === "cut") $("input[name=how][value=continue]").checked = true;
  const same = info.models.filter(({ kind }) => kind === next.kind);
  $("#model").replaceChildren(...same.map(({ name, title }) => element("option", { value: name, textContent: title })));
  $("#model").value = next.name;
  $(".stage").style.setProperty("--aspect", next.width / next.height);
  $("#steps").value = next.steps;
  $("#choices").replaceChildren(...(next.steps_choices ?? []).map((value) => element("option", { value })));
  $("#guidance").value = "";
  $("#guidance").placeholder = next.guidance ?? "model’s";
  settable();
  $("#examples").replaceChildren(...next.prompts.slice(0, 4).map((text) => element("li", {}, element("button", {
    type: "button", textContent: text, onclick: () => {
      $("#prompt").value = text;
      $("#composer").requestSubmit();
    },
  }))));
}

for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", async () => {
    if (live() && model.kind !== radio.value && !confirm("Leave the running stream?")) {
      choose(model);
      return;
    }
    if (live()) await end();
    choose(info.models.find(({ kind }) => kind === radio.value));
  });
}
$("#model").addEventListener("change", async ({ target }) => {
  const next = info.models.find(({ name }) => name === target.value);
  if (live()) await end();
  choose(next);
});

/** Waits until the server has compiled. */
async function compiled() {
  $("#go").disabled = true;
  for (;;) {
    try {
      await server.request("readyz");
      break;
    } catch (error) {
      if (error.status && error.status !== 503) break;
      notice("The server compiles; it begins in a moment");
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
  notice("");
  $("#go").disabled = false;
}

async function open() {
  theme($("#theme"));
  server.token = new URLSearchParams(location.hash.slice(1)).get("token") ?? sessionStorage.getItem("longlive.token");
  info = await server.json("info");
  if (info.token_required && !server.token) {
    const dialog = $("#token-dialog");
    dialog.showModal();
    await new Promise((resolve) => { dialog.onclose = resolve; });
    server.token = $("#token").value;
  }
  if (server.token) sessionStorage.setItem("longlive.token", server.token);
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.disabled = !info.models.some(({ kind }) => kind === radio.value);
  }
  choose(info.models[0]);
  state("idle");
  await compiled();
  await resume();
  root.dataset.ready = "true";
}

globalThis.longlive = { player, stats, schedule, world }; // for tests and the curious
open().catch(fail);
