// Keys, mouse, gamepad and touch sticks become held codes and a turn of the view.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const LOOK = 480; // mouse counts a second at full tilt
const EVERY = 1000 / 24 - 2; // ms between two messages while the view turns: one a picture
const DEAD = 0.12; // a stick's rest zone

/** A stick's tilt from the edge of its rest zone on, 0 to 1. */
export function rescaled(x = 0, y = 0) {
  const tilt = Math.hypot(x, y);
  if (tilt <= DEAD) return [0, 0];
  const factor = Math.min(1, (tilt - DEAD) / (1 - DEAD)) / tilt;
  return [x * factor, y * factor];
}

/** The codes of a stick at x, y (-1 to 1, y down); diagonals have two. */
export function stickCodes(x, y) {
  if (Math.hypot(x, y) < DEAD) return [];
  const codes = [];
  if (y < -0.38 * Math.hypot(x, y)) codes.push("KeyW");
  if (y > 0.38 * Math.hypot(x, y)) codes.push("KeyS");
  if (x < -0.38 * Math.hypot(x, y)) codes.push("KeyA");
  if (x > 0.38 * Math.hypot(x, y)) codes.push("KeyD");
  return codes;
}

/**
 * `send({t, codes, dx, dy})` is called when held codes change, and 24 times a second while the view turns.
 * dx and dy are counts since the message before. Codes that the model has no action for are not
 * taken.
 */
export class Input {
  constructor(surface, send) {
    Object.assign(this, { surface, send, keys: [], active: false, latched: false });
    this.held = new Set(); // keyboard
    this.sticks = { move: [0, 0], look: [0, 0] };
    this.dx = this.dy = 0;
    this.sentCodes = "";
    this.sentAt = this.polledAt = 0;
    surface.addEventListener("keydown", (event) => this.key(event, true));
    addEventListener("keyup", (event) => this.key(event, false));
    surface.addEventListener("mousemove", (event) => {
      if (document.pointerLockElement !== surface) return;
      this.dx += event.movementX;
      this.dy += event.movementY;
    });
    surface.addEventListener("focus", () => this.release());
    surface.addEventListener("blur", () => this.latched || this.release());
    addEventListener("blur", () => this.clear());
    document.addEventListener("visibilitychange", () => document.hidden && this.clear());
  }

  /** Takes the controls of a model, or none. */
  take(actions) {
    this.keys = actions?.keys ?? [];
    this.mouse = Boolean(actions?.mouse);
    this.active = Boolean(actions);
    this.sentCodes = "";
    this.release();
  }

  release() {
    this.held.clear();
    this.latched = false;
  }

  /** The window is left: nothing is held or turned, and that is said now, since a hidden page is not polled. */
  clear() {
    this.release();
    for (const stick of Object.values(this.resting ?? {})) stick();
    this.dx = this.dy = 0;
    if (this.active && this.sentCodes) this.say([], performance.now());
  }

  /** A connection is there, perhaps a new one, whose server knows of nothing held. */
  again() {
    this.sentCodes = "";
  }

  /** Held keys stay held while words are typed. */
  latch() {
    this.latched = true;
  }

  key(event, down) {
    if (!this.active || this.latched) return;
    const taken = this.keys.includes(event.code) || (this.mouse && event.code in ARROWS);
    if (!taken || (down && (event.ctrlKey || event.metaKey || event.altKey))) return;
    if (down) {
      this.held.add(event.code);
      event.preventDefault();
    } else {
      this.held.delete(event.code);
    }
  }

  pad() {
    const pad = (navigator.getGamepads?.() ?? []).find((one) => one?.connected);
    return pad ? { move: pad.axes.slice(0, 2), look: pad.axes.slice(2, 4) } : null;
  }

  /** Once a picture of the screen, at `now` ms. */
  poll(now) {
    const passed = Math.min(now - this.polledAt, 100) / 1000;
    this.polledAt = now;
    if (!this.active) return;
    const pad = this.pad();
    const codes = new Set(this.held);
    for (const stick of [this.sticks, pad]) {
      if (!stick) continue;
      for (const code of stickCodes(...stick.move)) codes.add(code);
      this.look(...stick.look, passed);
    }
    for (const [code, [x, y]] of Object.entries(ARROWS)) if (codes.has(code) && !this.keys.includes(code)) this.look(x, y, passed);
    const list = this.keys.filter((code) => codes.has(code));
    const turned = Math.abs(this.dx) >= 1 || Math.abs(this.dy) >= 1;
    if (list.join() === this.sentCodes && !(turned && now - this.sentAt >= EVERY)) return;
    this.say(list, now);
  }

  say(list, now) {
    const [dx, dy] = [Math.trunc(this.dx), Math.trunc(this.dy)];
    this.dx -= dx;
    this.dy -= dy;
    this.sentCodes = list.join();
    this.sentAt = now;
    this.send({ t: Math.round(now), codes: list, dx, dy });
  }

  look(x = 0, y = 0, passed = 0) {
    if (!this.mouse) return;
    const [right, down] = rescaled(x, y);
    this.dx += right * LOOK * passed;
    this.dy += down * LOOK * passed;
  }

  /** Makes an element a touch stick: `which` is "move" or "look". */
  stick(element, which) {
    const knob = element.firstElementChild;
    const set = (x, y) => {
      this.sticks[which] = [x, y];
      knob.style.translate = `${x * 60}% ${y * 60}%`;
    };
    (this.resting ??= {})[which] = () => set(0, 0);
    const follow = (event) => {
      const box = element.getBoundingClientRect();
      const x = 2 * (event.clientX - box.left) / box.width - 1;
      const y = 2 * (event.clientY - box.top) / box.height - 1;
      const size = Math.max(1, Math.hypot(x, y));
      set(x / size, y / size);
    };
    element.addEventListener("pointerdown", (event) => {
      element.setPointerCapture(event.pointerId);
      follow(event);
    });
    element.addEventListener("pointermove", (event) => element.hasPointerCapture(event.pointerId) && follow(event));
    for (const name of ["pointerup", "pointercancel"]) element.addEventListener(name, () => set(0, 0));
  }
}
