// When which picture is drawn. Knows no DOM and no clock of its own: times are given, in ms.

const SLOWEST = 0.9, FASTEST = 1.1;
const SLEW = 0.15; // change of rate a second
const GRACE = 3; // pictures of the old direction that a film may still show after a cut
const LATE = 2; // pictures of an older chunk that a world may still show

/**
 * A film keeps a lead of about half a chunk and bends its rate to hold it; when it runs dry it
 * waits for the lead. A world keeps none: a picture that finds the queue empty is drawn at once,
 * those that come with it follow at the stream's rate, and late ones are dropped.
 *
 * Pictures are `{index, chunk, event, image}`; a dropped image is closed.
 */
export class Playback {
  constructor({ kind, fps, chunkFrames }) {
    Object.assign(this, { kind, fps, chunkFrames });
    this.target = kind === "film" ? 0.45 * chunkFrames : 0; // lead, pictures
    this.reset();
  }

  reset() {
    for (const picture of this.queue ?? []) picture.image?.close?.();
    this.queue = [];
    this.rate = 1;
    this.due = null; // when the queue's first picture is drawn; null: waits for the lead
    this.last = null;
    this.urgent = []; // events given by hand that no picture has shown yet
    this.dropped = 0;
    this.underruns = 0;
    this.paused = false;
    this.ended = false;
  }

  /** No more will come: what is left plays without waiting for a lead. */
  finish() {
    this.ended = true;
  }

  get lead() {
    return this.queue.length;
  }

  /** A control was given now: its first pictures pass those of the old direction. */
  control(event) {
    this.urgent.push(event);
  }

  push(picture) {
    this.queue.push(picture);
    const newest = this.urgent.findLast((event) => picture.event >= event);
    if (newest !== undefined) {
      this.urgent = this.urgent.filter((event) => event > newest);
      // A world's pictures of the same chunk are of the time before the control: they play.
      if (this.kind === "film") this.drop((old) => old.event < newest, GRACE);
    }
    if (this.kind === "world") this.drop((old) => old.chunk < picture.chunk, LATE);
  }

  /** Keeps the first `grace` pictures that are stale, drops the others. */
  drop(stale, grace) {
    let kept = 0;
    this.queue = this.queue.filter((picture) => {
      if (!stale(picture) || kept++ < grace) return true;
      picture.image?.close?.();
      this.dropped++;
      return false;
    });
  }

  /** The picture to draw at `now`, or null. Pictures that a slow screen missed are dropped. */
  tick(now) {
    const passed = this.last === null ? 0 : (now - this.last) / 1000;
    this.last = now;
    if (this.paused) {
      this.due = null;
      return null;
    }
    if (!this.queue.length) return this.dry();
    if (this.due === null) {
      if (this.queue.length < this.target && !this.ended) return null;
      this.due = now;
    }
    this.bend(passed);
    let picture = null;
    while (this.queue.length && this.due <= now) {
      if (picture) {
        picture.image?.close?.();
        this.dropped++;
      }
      picture = this.queue.shift();
      this.due += 1000 / this.fps / this.rate;
    }
    if (this.due < now) this.due = now;
    return picture;
  }

  dry() {
    if (this.kind === "film") {
      if (this.due !== null && this.due <= this.last) {
        this.underruns++;
        this.due = null;
      }
    } else if (this.due !== null && this.due <= this.last) {
      this.due = null; // the next picture is drawn at once
    }
    return null;
  }

  bend(passed) {
    if (this.kind !== "film") {
      const behind = this.queue.length && this.queue[0].chunk < this.queue.at(-1).chunk;
      this.rate = behind ? 2 : 1; // what is left of an older chunk goes by quickly
      return;
    }
    const wanted = 1 + 0.2 * (this.queue.length - this.target) / this.target;
    const bounded = Math.min(Math.max(wanted, SLOWEST), FASTEST);
    const step = SLEW * passed;
    this.rate += Math.min(Math.max(bounded - this.rate, -step), step);
  }
}
