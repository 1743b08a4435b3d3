// The page: what a person does, and which part of the page answers.

import { $, announce, fail, opens } from "./dom.js";
import { ShotList } from "./film.js";
import { Models } from "./models.js";
import { Player } from "./player.js";
import { Server } from "./protocol.js";
import { Settings } from "./settings.js";
import { Schedule } from "./shots.js";
import { Stats } from "./stats.js";
import { theme } from "./theme.js";
import { link, notice, showPaused, transport } from "./transport.js";
import { StartImage } from "./upload.js";
import { World } from "./world.js";

const root = document.documentElement;
const server = new Server();
const player = new Player(server, $("#screen"));
const stats = new Stats($("#numbers"));
const schedule = new Schedule((shot, at) => film(shot, at));
const shots = new ShotList(schedule);
const world = new World({ player, stats, start: (body) => begin(body) });
const models = new Models((text) => {
  $("#prompt").value = text;
  $("#composer").requestSubmit();
});
const image = new StartImage(server, () => models.limits, () => models.now);
const prompts = new Map(); // event -> words, until applied

const mode = () => $("input[name=mode]:checked").value;
const live = () => root.dataset.state === "live";
const settings = new Settings({
  live, send: (message) => mode() === "world" ? world.send(message) : player.direct(message),
});
const number = (name) => ($(name).value === "" ? undefined : Number($(name).value));

// ---- a stream begins, is found again, ends

async function begin(body) {
  const next = models.named(body.model);
  if (!next) {
    fail(`This server has no model ${body.model}.`);
    return false;
  }
  $("#go").disabled = true;
  try {
    const { id, position } = await server.post("streams", body);
    if (live()) await end();
    if (next !== models.now) models.choose(next);
    await attach(id, next, await server.json(`streams/${id}`), body);
    image.clear(); // an upload begins one stream
    notice(position ? `Place ${position} in the queue` : "The first pictures are being made");
    return true;
  } catch (error) {
    fail(error);
    return false;
  } finally {
    $("#go").disabled = false;
  }
}

/** Shows a stream; `found` is its state, `body` what it was asked for (none after a reload). */
async function attach(id, next, found, body) {
  stats.reset();
  prompts.clear();
  state("live");
  settings.begin({ steps: found.steps, guidance: found.guidance });
  await player.open(id, next);
  world.begin(next, body);
  const kept = { id, model: next.name, prompt: body?.prompt };
  if (body) sessionStorage.setItem("longlive.stream", JSON.stringify(kept));
}

/** The stream of before a reload, if the server still has it. */
async function resume() {
  const kept = JSON.parse(sessionStorage.getItem("longlive.stream") ?? "null");
  const next = models.named(kept?.model);
  if (!next) return;
  try {
    const found = await server.json(`streams/${kept.id}`);
    if (found.state === "ended") throw new Error(found.reason);
    models.choose(next);
    schedule.begin(kept.prompt ?? "A script", null);
    await attach(kept.id, next, found, null);
    shots.render();
  } catch {
    sessionStorage.removeItem("longlive.stream");
  }
}

async function end() {
  const id = player.id;
  player.close();
  world.end();
  settings.begin({});
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
  models.settable();
  $("#go").textContent = name === "live" ? "Send" : "Start";
  $("#prompt").placeholder = name === "live" ? "What happens next?" : "Describe the first shot";
  showPaused(false);
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
  const { prompt: limit } = models.limits;
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
  const clip = body.image ? image.chunks : 0; // they come before the first shot's
  if (!(await begin(body))) return;
  const taken = chunks !== null;
  if (taken) schedule.ahead.shift();
  chunks ??= schedule.ahead.length ? 2 : null;
  schedule.begin(text, chunks === null ? null : clip + chunks);
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

$("#composer").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    if (live()) send();
    else await start();
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

player.addEventListener("state", ({ detail }) => {
  link(detail);
  if (detail === "waiting") notice("The connection broke; trying again");
  if (detail === "open") world.input.again();
  if (detail === "open" && player.playing) notice("");
  if (detail === "gone") {
    fail("The server no longer has this stream.");
    end();
  }
});

player.addEventListener("message", ({ detail: message }) => {
  if (message.type === "stats") stats.message(message);
  else if (message.type === "queue") queued(message.position);
  else if (message.type === "error") {
    settings.refused(message.event_id);
    fail(message.message);
  }
  else if (message.type === "end") {
    player.playback?.finish();
    notice(`The stream ended: ${message.reason}`);
  }
  else if (message.type === "applied") {
    schedule.applied(message.event_id, message.chunk);
    settings.applied(message);
    if (!prompts.has(message.event_id)) return;
    announce(`Chunk ${message.chunk}: ${prompts.get(message.event_id)}`);
    $("#screen").setAttribute("aria-label", `Picture of: ${prompts.get(message.event_id)}`);
    prompts.delete(message.event_id);
    shots.render();
  }
});

function queued(position) {
  if (position) notice(`Place ${position} in the queue`);
  else if (!player.playing) notice("The first pictures are being made");
}

player.addEventListener("received", ({ detail }) => schedule.seen(detail.chunk));
player.addEventListener("drawn", ({ detail }) => {
  if (detail.first) notice("");
  stats.picture(detail);
  shots.at(detail.picture.chunk);
  if (player.model.kind === "world") world.drawn(detail.picture);
  const seconds = Math.floor(detail.picture.index / player.model.fps);
  const time = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  if ($("#time").textContent !== time) $("#time").textContent = time;
});
setInterval(() => live() && !document.hidden && stats.show(player.playback), 500);

// ---- transport, settings, files

const togglePause = transport({ server, player, live });
$("#restart").addEventListener("click", async () => {
  await end();
  $("#prompt").focus();
});
opens($("#script-load"), $("#script-file"), async (text) => {
  const script = JSON.parse(text);
  const body = { model: $("#model").value, script };
  if (script.begins_with && image.upload) body.image = image.upload;
  if (await begin(body)) {
    schedule.begin(script.shots?.[0]?.prompt ?? "A script", null);
    shots.render();
  }
});

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

for (const radio of document.querySelectorAll("input[name=mode]")) {
  radio.addEventListener("change", async () => {
    if (live() && models.now.kind !== radio.value && !confirm("Leave the running stream?")) {
      models.choose(models.now);
      return;
    }
    if (live()) await end();
    models.choose(models.first(radio.value));
  });
}
$("#model").addEventListener("change", async ({ target }) => {
  const next = models.named(target.value);
  if (live()) await end();
  models.choose(next);
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
  const info = await server.json("info");
  if (info.token_required && !server.token) {
    const dialog = $("#token-dialog");
    dialog.showModal();
    await new Promise((resolve) => { dialog.onclose = resolve; });
    server.token = $("#token").value;
  }
  if (server.token) sessionStorage.setItem("longlive.token", server.token);
  models.take(info);
  state("idle");
  await compiled();
  await resume();
  root.dataset.ready = "true";
}

globalThis.longlive = { player, stats, schedule, world }; // for tests and the curious
open().catch(fail);
