// Numbers of a running stream: what the server says, and what this screen saw.

const KEPT = 48; // chunks in the history

export function percentile(values, share) {
  if (!values.length) return null;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

const shown = (value, digits, unit) => (value === null || value === undefined ? "–" : `${value.toFixed(digits)}${unit}`);

export class Stats {
  constructor(root) {
    this.root = root;
    this.reset();
  }

  reset() {
    this.drawn = []; // times of the last two seconds
    this.latencies = []; // ms, encoded to drawn
    this.decodes = []; // ms, encoded to decoded
    this.actions = []; // s, control to picture
    this.sent = new Map(); // event -> when
    this.chunks = [];
    this.server = {};
    this.show();
  }

  control(event, now) {
    this.sent.set(event, now);
    if (this.sent.size > 500) this.sent.delete(this.sent.keys().next().value);
  }

  picture({ picture, now, latency }) {
    this.drawn.push(now);
    while (this.drawn[0] < now - 2000) this.drawn.shift();
    this.latencies.push(latency);
    this.decodes.push(picture.decoded - picture.time);
    for (const list of [this.latencies, this.decodes]) if (list.length > 500) list.shift();
    const at = this.sent.get(picture.event);
    if (at === undefined) return;
    this.actions.push((now - at) / 1000);
    if (this.actions.length > 20) this.actions.shift();
    for (const event of this.sent.keys()) if (event <= picture.event) this.sent.delete(event);
  }

  message(message) {
    this.server = message;
    this.chunks.push(message.chunk_s / message.playing_s);
    if (this.chunks.length > KEPT) this.chunks.shift();
  }

  fps(now) {
    const kept = this.drawn.filter((time) => time > now - 2000);
    return kept.length > 1 ? (kept.length - 1) / ((kept.at(-1) - kept[0]) / 1000) : null;
  }

  /** Writes all numbers into the elements that name them (data-number). */
  show(playback = null) {
    const { chunk_s, playing_s, denoised_fps, memory_gb, viewers } = this.server;
    const numbers = {
      denoised: shown(denoised_fps, 1, ""),
      delivered: shown(this.fps(performance.now()), 1, ""),
      action: shown(percentile(this.actions, 0.5), 2, " s"),
      memory: shown(memory_gb, 1, " GB"),
      latency: shown(percentile(this.decodes, 0.95), 0, " ms"),
      lead: playback ? `${playback.lead} · ${playback.rate.toFixed(2)}×` : "–",
      dropped: playback ? `${playback.dropped} · ${playback.underruns}` : "–",
      viewers: shown(viewers, 0, ""),
    };
    for (const [name, text] of Object.entries(numbers)) {
      const element = this.root.querySelector(`[data-number=${name}]`);
      if (element && element.textContent !== text) element.textContent = text;
    }
    this.deadline(chunk_s, playing_s);
  }

  deadline(made, playing) {
    const bar = document.getElementById("deadline");
    const share = made === undefined ? 0 : made / playing;
    const late = share > 1;
    bar.classList.toggle("late", late);
    bar.firstElementChild.style.scale = `${Math.min(share / 1.5, 1)} 1`;
    const text = made === undefined ? "No chunk yet"
      : `Made in ${made.toFixed(2)} s · plays ${playing.toFixed(2)} s`;
    const label = document.getElementById("deadline-text");
    if (label.textContent !== text) label.textContent = text;
    bar.setAttribute("aria-valuenow", Math.round(share * 100));
    bar.setAttribute("aria-valuetext", text);
    const history = document.getElementById("history");
    while (history.childElementCount < this.chunks.length) history.append(document.createElement("i"));
    while (history.childElementCount > this.chunks.length) history.lastChild.remove();
    this.chunks.forEach((value, at) => {
      history.children[at].style.blockSize = `${Math.min(value / 1.5, 1) * 100}%`;
      history.children[at].classList.toggle("late", value > 1);
    });
  }
}
