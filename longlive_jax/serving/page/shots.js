// The list of shots to come, and when each is sent. Knows no DOM.

/** Shots of a saved list; the format of `launch.sample --prompts`. Throws with the entry's number. */
export function parseShots(text) {
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    throw new Error(`not a list of shots: ${error.message}`);
  }
  if (!Array.isArray(list)) throw new Error("not a list of shots: the file has no JSON array");
  return list.map((entry, at) => {
    const prompt = typeof entry === "string" ? entry : entry?.prompt;
    if (typeof prompt !== "string" || !prompt.trim()) throw new Error(`shot ${at + 1} has no prompt`);
    const chunks = entry.chunks ?? 2;
    if (!Number.isInteger(chunks) || chunks < 1) {
      throw new Error(`shot ${at + 1}: chunks ${chunks}; give a whole number from 1`);
    }
    return { prompt: prompt.trim(), chunks, cut: entry.cut ?? at > 0 };
  });
}

export const shotsText = (shots) =>
  JSON.stringify(shots.map(({ prompt, chunks, cut }) => ({ prompt, chunks, cut })), null, 2) + "\n";

/** The list with the entry at `from` moved to `to`. */
export function moved(list, from, to) {
  const result = [...list];
  const [entry] = result.splice(from, 1);
  result.splice(Math.min(Math.max(to, 0), result.length), 0, entry);
  return result;
}

/**
 * Shots that played, the one that plays, those ahead. The next is sent two chunks before its
 * turn, as the server may be that far ahead of the screen; until then it can be edited.
 */
export class Schedule {
  constructor(send) {
    this.send = send; // ({prompt, cut}, chunk) => event id
    this.ahead = [];
    this.done = [];
    this.following = true;
    this.end = null; // the first chunk after what was sent; null: no stream, or an open end
    this.newest = -1;
  }

  /** The stream's first shot; without `chunks` it goes on until the list is played by hand. */
  begin(prompt, chunks = null) {
    this.done = [{ prompt, cut: false, chunks, chunk: 0, event: 0 }];
    this.end = chunks;
    this.newest = -1;
  }

  /** A prompt that was sent by hand; the list waits for `chunks` chunks after it was applied. */
  interrupt(prompt, cut, event, chunks) {
    this.done.push({ prompt, cut, chunks, chunk: null, event });
    this.end = null;
  }

  /** Shots were added: where none is due, the one that plays gets four chunks more. */
  extend() {
    if (this.done.length && (this.end === null || this.newest >= this.end - 2)) this.end = this.newest + 4;
  }

  applied(event, chunk) {
    const shot = this.done.find((one) => one.event === event);
    if (!shot) return;
    shot.chunk = chunk;
    if (shot === this.done.at(-1) && shot.chunks) this.end = chunk + shot.chunks;
    this.advance();
  }

  /** A picture of `chunk` came. */
  seen(chunk) {
    if (chunk <= this.newest) return;
    this.newest = chunk;
    this.advance();
  }

  advance() {
    while (this.following && this.ahead.length && this.end !== null && this.newest >= this.end - 2) {
      this.play(0, this.end);
    }
  }

  /** Sends the shot at `index` for chunk `at` (null: the next that is free). */
  play(index, at = null) {
    const [shot] = this.ahead.splice(index, 1);
    const event = this.send(shot, at);
    this.done.push({ ...shot, chunk: null, event });
    this.end = at === null ? null : at + shot.chunks;
    return event;
  }
}
