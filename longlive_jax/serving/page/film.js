// The list of shots: those that played, the one on screen, and those ahead, which can be edited.

import { $, announce, download, element, iconButton, opens } from "./dom.js";
import { moved, parseShots, shotsText } from "./shots.js";

export class ShotList {
  constructor(schedule) {
    this.schedule = schedule;
    this.list = $("#shots");
    this.onscreen = 0; // the chunk that is on the screen
    $("#follow").addEventListener("change", ({ target }) => {
      schedule.following = target.checked;
      schedule.advance();
      this.render();
    });
    opens($("#load"), $("#list-file"), (text) => {
      const loaded = parseShots(text);
      schedule.extend();
      schedule.ahead = loaded;
      announce(`${schedule.ahead.length} shots loaded`);
      this.change();
    });
    $("#save").addEventListener("click", () => {
      const all = [...schedule.done.map((shot) => ({ ...shot, chunks: shot.chunks ?? 2 })), ...schedule.ahead];
      download(new Blob([shotsText(all)], { type: "application/json" }), "shots.json");
    });
    this.render();
  }

  add(prompt, cut) {
    this.schedule.extend();
    this.schedule.ahead.push({ prompt, chunks: 2, cut });
    announce(`Shot ${this.schedule.ahead.length} added`);
    this.change();
  }

  /** After an edit: a list that waits may be due. */
  change() {
    this.schedule.advance();
    this.render();
  }

  /** The chunk on the screen changed. */
  at(chunk) {
    if (chunk === this.onscreen) return;
    this.onscreen = chunk;
    this.mark();
  }

  /** Index in `done` of the shot on the screen. */
  current() {
    return this.schedule.done.findLastIndex(({ chunk }) => chunk !== null && chunk <= this.onscreen);
  }

  mark() {
    const now = this.current();
    this.schedule.done.forEach((_, at) => {
      const item = this.list.children[at];
      if (!item) return;
      item.className = at === now ? "now" : "done";
      if (at === now) item.setAttribute("aria-current", "true");
      else item.removeAttribute("aria-current");
    });
  }

  render() {
    const { done, ahead } = this.schedule;
    const rows = done.map((shot, at) => this.played(shot, at));
    rows.push(...ahead.map((shot, at) => this.coming(shot, at, done.length)));
    this.list.replaceChildren(...rows);
    this.mark();
    $("#no-shots").hidden = rows.length > 0;
    if (this.list.scrollHeight > this.list.clientHeight) this.list.querySelector(".now")?.scrollIntoView({ block: "nearest" });
  }

  played(shot, at) {
    const where = shot.chunk === null ? "on its way" : `from chunk ${shot.chunk}`;
    const how = at === 0 ? "opens" : shot.cut ? "cut" : "same shot";
    return element("li", { className: "done" },
      element("span", { className: "n", textContent: at + 1 }),
      element("span", { className: "clamp", textContent: shot.prompt, title: shot.prompt }),
      element("span", { className: "meta", textContent: `${how} · ${where}` }));
  }

  coming(shot, at, before) {
    const name = `shot ${before + at + 1}`;
    const text = element("textarea", { rows: 1, value: shot.prompt });
    text.setAttribute("aria-label", `Prompt of ${name}`);
    text.addEventListener("change", () => {
      if (text.value.trim()) shot.prompt = text.value.trim();
      else text.value = shot.prompt;
    });
    const chunks = element("input", { type: "number", min: 1, max: 999, value: shot.chunks });
    chunks.addEventListener("change", () => {
      shot.chunks = Math.max(1, Math.round(Number(chunks.value)) || 1);
      chunks.value = shot.chunks;
    });
    const cut = element("input", { type: "checkbox", checked: shot.cut });
    cut.addEventListener("change", () => { shot.cut = cut.checked; });
    const grip = iconButton("grip", `Move ${name}: arrow keys, or drag`, null, "icon grip");
    const item = element("li", {}, grip, text,
      element("span", {},
        iconButton("play", `Play ${name} now`, () => this.now(at)),
        iconButton("x", `Delete ${name}`, () => this.remove(at))),
      element("span", { className: "meta" },
        element("label", {}, cut, "Cut"), element("label", {}, chunks, "chunks")));
    this.movable(item, grip, at);
    return item;
  }

  now(at) {
    if (!this.schedule.done.length) return; // no stream yet
    this.schedule.play(at);
    this.render();
  }

  remove(at) {
    const [shot] = this.schedule.ahead.splice(at, 1);
    announce(`Deleted: ${shot.prompt}`);
    this.change();
    const items = this.items();
    (items[Math.min(at, items.length - 1)]?.querySelector(".grip") ?? $("#prompt")).focus();
  }

  /** The rows ahead. */
  items() {
    return [...this.list.children].slice(this.schedule.done.length);
  }

  move(from, to) {
    const last = this.schedule.ahead.length - 1;
    to = Math.min(Math.max(to, 0), last);
    if (to !== from) this.schedule.ahead = moved(this.schedule.ahead, from, to);
    this.render();
    this.items()[to].querySelector(".grip").focus();
    announce(`Place ${to + 1} of ${last + 1} ahead`);
  }

  movable(item, grip, at) {
    grip.addEventListener("keydown", (event) => {
      const to = { ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: Infinity }[event.code];
      if (to !== undefined) this.move(at, to);
      else if (event.code === "Delete" || event.code === "Backspace") this.remove(at);
      else return;
      event.preventDefault();
    });
    let target = null;
    const clear = () => this.items().forEach((one) => one.classList.remove("before", "after"));
    grip.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      grip.setPointerCapture(event.pointerId);
      item.classList.add("dragging");
      target = at;
    });
    grip.addEventListener("pointermove", (event) => {
      if (target === null) return;
      clear();
      const items = this.items();
      const over = items.findLastIndex((one) => one.getBoundingClientRect().top <= event.clientY);
      target = Math.max(over, 0);
      if (target !== at) items[target].classList.add(target > at ? "after" : "before");
    });
    grip.addEventListener("pointerup", () => {
      if (target === null) return;
      const to = target;
      target = null;
      this.move(at, to);
    });
    grip.addEventListener("pointercancel", () => {
      target = null;
      this.render();
    });
  }
}
