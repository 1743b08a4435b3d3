// What was done in a world, by the picture on screen when it was done; and doing it again.

export class Recording {
  constructor(start, events = []) {
    Object.assign(this, { start, events });
  }

  add(frame, message) {
    const { type, text, mode, chunks, codes, dx, dy, steps, guidance } = message;
    const kept = { frame, type, text, mode, chunks, codes, dx, dy, steps, guidance };
    this.events.push(JSON.parse(JSON.stringify(kept)));
  }

  text() {
    return JSON.stringify({ start: this.start, events: this.events }) + "\n";
  }

  static parse(text) {
    let value;
    try {
      value = JSON.parse(text);
    } catch (error) {
      throw new Error(`not a recording: ${error.message}`);
    }
    if (typeof value?.start?.prompt !== "string" || !Array.isArray(value.events)) {
      throw new Error("not a recording: it has no start and events");
    }
    if (value.events.some((event) => !Number.isInteger(event.frame))) {
      throw new Error("not a recording: an event has no frame; a script is opened by Open script");
    }
    return new Recording(value.start, value.events);
  }
}

export class Replay {
  constructor(recording, send) {
    Object.assign(this, { events: [...recording.events], send });
  }

  /** Sends all that was done up to picture `frame`; true while something is left. */
  at(frame) {
    while (this.events.length && this.events[0].frame <= frame) {
      const { frame: _, ...message } = this.events.shift();
      this.send(message);
    }
    return this.events.length > 0;
  }
}
