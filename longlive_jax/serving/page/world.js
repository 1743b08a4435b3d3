// A world's controls: who has the pointer, which keys were applied, what was done and doing it again.

import { $, announce, download, element, opens } from "./dom.js";
import { Input } from "./input.js";
import { Recording, Replay } from "./record.js";

const NAMES = { Space: "Space", ShiftLeft: "Shift", ControlLeft: "Ctrl" };
const PLACES = { KeyW: [1, 2], KeyA: [2, 1], KeyS: [2, 2], KeyD: [2, 3] }; // row, column

export class World {
  /** `start(body)` begins a stream anew; `player` sends; `stats` measures from action to picture. */
  constructor({ player, stats, start }) {
    Object.assign(this, { player, stats, start, recording: null, replay: null, codes: new Map() });
    this.screen = $("#screen");
    this.input = new Input(this.screen, (keys) => {
      if (!this.replay) this.send({ type: "keys", ...keys });
      this.show(keys.codes, "held");
      $("#take").hidden = true;
    });
    this.input.stick($("#stick-move"), "move");
    this.input.stick($("#stick-look"), "look");
    this.screen.addEventListener("click", () => this.grab());
    document.addEventListener("pointerlockchange", () => this.locked());
    const poll = (now) => {
      if (!this.player.paused) this.input.poll(now);
      requestAnimationFrame(poll);
    };
    requestAnimationFrame(poll);
    $("#replay").addEventListener("click", () => this.again(this.recording));
    $("#record-save").addEventListener("click", () =>
      download(new Blob([this.recording.text()], { type: "application/json" }), "recording.json"));
    opens($("#record-load"), $("#record-file"), (text) => this.again(Recording.parse(text)));
  }

  get running() {
    return this.player.model?.kind === "world" && this.player.playback !== null;
  }

  /** A stream began: `body` is what it was asked for; none after a reload. */
  begin(model, body) {
    this.codes.clear();
    this.input.take(model.kind === "world" ? model.actions ?? { keys: [] } : null);
    this.recording = model.kind === "world" && body ? new Recording(body) : null;
    for (const name of ["replay", "record-save"]) $(`#${name}`).disabled = !this.recording;
    this.caps(model.kind === "world" ? model.actions?.keys ?? [] : []);
    this.locked();
  }

  end() {
    this.input.take(null);
    this.replay = null;
    this.caps([]);
    $("#take").hidden = true;
    if (document.pointerLockElement) document.exitPointerLock();
  }

  send(message) {
    if (!this.running || !this.player.connection) return null;
    const frame = this.player.playing ? this.player.playing.index + 1 : 0;
    const event = this.player.direct(message, true);
    this.recording?.add(frame, message);
    this.stats.control(event, performance.now());
    if (message.type === "keys") {
      this.codes.set(event, message.codes);
      if (this.codes.size > 500) this.codes.delete(this.codes.keys().next().value);
    }
    return event;
  }

  grab() {
    if (!this.running || !this.input.mouse || matchMedia("(pointer: coarse)").matches) return;
    this.screen.focus();
    // Without the system's acceleration where that can be had; without a pointer the arrows look.
    this.screen.requestPointerLock({ unadjustedMovement: true })
      ?.catch?.(() => this.screen.requestPointerLock())?.catch?.(() => {});
  }

  locked() {
    const has = document.pointerLockElement === this.screen;
    $("#take").hidden = has || !this.running || !this.input.mouse;
    if (has) announce("You have the controls");
  }

  /** Leaves the picture for the prompt; what is held stays held until the picture is taken again. */
  type() {
    this.wasLocked = document.pointerLockElement === this.screen;
    this.input.latch();
    if (this.wasLocked) document.exitPointerLock();
    $("#prompt").focus();
  }

  /** Back from the prompt. */
  back() {
    this.screen.focus();
    if (this.wasLocked) this.grab();
  }

  caps(keys) {
    const box = $("#caps");
    box.hidden = !keys.length;
    box.replaceChildren(...keys.map((code) => {
      const cap = element("i", { textContent: NAMES[code] ?? code.replace(/^Key|^Digit/, "") });
      cap.dataset.code = code;
      if (PLACES[code]) cap.style.gridArea = PLACES[code].join(" / ");
      else cap.classList.add("wide");
      return cap;
    }));
  }

  show(codes, what) {
    for (const cap of $("#caps").children) cap.classList.toggle(what, codes.includes(cap.dataset.code));
  }

  /** A picture is on the screen: its keys are the applied ones. */
  drawn(picture) {
    const events = [...this.codes.keys()].filter((event) => event <= picture.event);
    if (events.length) {
      this.show(this.codes.get(events.at(-1)), "applied");
      for (const event of events) this.codes.delete(event);
    }
    if (this.recording) $("#recorded").textContent = this.replay
      ? `Replaying: ${this.replay.events.length} to come.`
      : `${this.recording.events.length} ${this.recording.events.length === 1 ? "action" : "actions"} recorded.`;
    if (this.replay && !this.replay.at(picture.index + 1)) {
      this.replay = null;
      announce("Replay done");
    }
  }

  async again(recording) {
    if (!(await this.start(recording.start))) return;
    this.replay = new Replay(recording, (message) => this.send(message));
    announce("Replay begins");
  }
}
