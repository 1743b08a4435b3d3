// Steps and guidance of the running stream: asked for, applied from a chunk on, or refused.

import { $, announce } from "./dom.js";

const WORDS = {
  steps: (value) => `${value} ${value === 1 ? "step" : "steps"}`,
  guidance: (value) => `guidance ${value}`,
};

export class Settings {
  /** `live()`: whether a stream runs. `send(message)`: its event, or null where it cannot be sent. */
  constructor({ live, send }) {
    Object.assign(this, { live, send, now: {}, asked: new Map() });
    for (const name of Object.keys(WORDS)) {
      $(`#${name}`).addEventListener("change", () => this.live() && this.ask(name));
    }
  }

  /** A stream begins, or is found again, with these `{steps, guidance}`. */
  begin(now) {
    this.now = now;
    this.asked.clear();
    for (const name of Object.keys(WORDS)) this.show(name);
    $("#changed").textContent = "";
  }

  /** What the running stream is made with, or what the next one begins with. */
  show(name) {
    if (this.now[name] !== undefined) $(`#${name}`).value = this.now[name];
  }

  ask(name) {
    const field = $(`#${name}`);
    const event = field.value !== "" && field.checkValidity()
      ? this.send({ type: "settings", [name]: Number(field.value) }) : null;
    if (event === null) {
      this.show(name);
      return;
    }
    this.asked.set(event, { name, value: Number(field.value) });
    $("#changed").textContent = `${WORDS[name](Number(field.value))} from the next chunk`;
  }

  applied({ event_id: event, chunk }) {
    const change = this.asked.get(event);
    if (!change) return;
    this.asked.delete(event);
    this.now[change.name] = change.value;
    const words = `${WORDS[change.name](change.value)} from chunk ${chunk}`;
    $("#changed").textContent = words;
    announce(words);
  }

  refused(event) {
    const change = this.asked.get(event);
    if (!change) return;
    this.asked.delete(event);
    $("#changed").textContent = "";
    this.show(change.name);
  }
}
