// One stream on the screen: connection, decoder, playback and canvas in a loop.

import { Connection } from "./protocol.js";
import { Decoder, decodesH264 } from "./decoder.js";
import { Playback } from "./playback.js";

const clock = () => performance.timeOrigin + performance.now(); // ms since epoch, as the server's

/**
 * Events: "message" (of the server), "state" (of the connection), "received" (a picture's header),
 * "drawn" (`{picture, now, first, latency}`: ms from encoded to drawn).
 */
export class Player extends EventTarget {
  constructor(server, canvas) {
    super();
    Object.assign(this, { server, canvas, connection: null, playback: null, paused: false });
    this.context = canvas.getContext("2d", { alpha: false });
    this.forceJpeg = new URLSearchParams(location.search).get("format") === "jpeg";
    const loop = (now) => {
      this.tick(now);
      requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
  }

  async open(id, model) {
    this.close();
    Object.assign(this, { id, model, paused: false, reported: -1, playing: null });
    const playback = this.playback = new Playback({
      kind: model.kind, fps: model.fps, chunkFrames: model.chunk_frames,
    });
    this.decoder = new Decoder({
      onpicture: (picture) => {
        if (playback === this.playback) playback.push(picture);
        else picture.image.close();
      },
      onkeyframe: () => this.damaged(),
    });
    const jpeg = this.forceJpeg || !(await decodesH264());
    if (playback === this.playback) this.connect(jpeg ? "jpeg" : null);
  }

  connect(format) {
    this.format = format ?? "h264";
    const connection = this.connection = new Connection(this.server, this.id, format);
    connection.addEventListener("message", ({ detail }) => {
      if (detail.type === "hello") this.hello(detail);
      this.emit("message", detail);
    });
    connection.addEventListener("picture", ({ detail }) => {
      this.emit("received", detail);
      this.decoder.push(detail);
    });
    connection.addEventListener("state", ({ detail }) => {
      if (connection === this.connection) this.emit("state", detail);
    });
  }

  hello({ codec, width, height, fps, frame }) {
    this.decoder.configure(codec);
    this.playback.fps = fps;
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
    }
    // What was on its way when the connection broke will not come.
    this.reported = frame - 1;
    if (this.paused) this.connection.direct({ type: "pause", paused: true });
  }

  /** A picture that cannot be decoded: a key frame mends it; again and again, JPEG does. */
  damaged() {
    if (this.decoder.failures <= 3) {
      this.connection.send({ type: "keyframe" });
      return;
    }
    const old = this.connection;
    this.connection = null;
    old.close();
    this.connect("jpeg");
  }

  /** Sends a message that acts; `urgent` lets its first pictures pass what is still queued. */
  direct(message, urgent = false) {
    const event = this.connection.direct(message);
    if (urgent) this.playback.control(event);
    return event;
  }

  pause(paused) {
    this.paused = this.playback.paused = paused;
    this.connection.direct({ type: "pause", paused });
  }

  tick(now) {
    const picture = this.playback?.tick(now);
    if (!picture) return;
    this.context.drawImage(picture.image, 0, 0, this.canvas.width, this.canvas.height);
    picture.image.close();
    const first = this.playing === null;
    this.playing = picture;
    const step = Math.max(1, Math.min(8, Math.floor(this.model.chunk_frames / 2)));
    if (picture.index - this.reported >= step) {
      this.reported = picture.index;
      this.connection?.send({ type: "seen", frame: picture.index });
    }
    this.emit("drawn", { picture, now, first, latency: clock() - picture.time });
  }

  close() {
    const old = this.connection;
    this.connection = null;
    old?.close();
    this.decoder?.reset();
    this.playback?.reset();
    this.playback = null;
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
