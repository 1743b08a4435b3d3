// Messages of a stream's WebSocket, and the socket itself, which comes back by itself.

export const KEY = 1, FIRST = 2, JPEG = 4, CUT = 8;
export const HEADER_BYTES = 32;
const MAGIC = 0x4c4c, VERSION = 1;

/** A picture's header and payload; throws where the bytes are not one. */
export function parsePicture(buffer) {
  if (buffer.byteLength < HEADER_BYTES) {
    throw new RangeError(`a picture has ${buffer.byteLength} bytes; its header alone has ${HEADER_BYTES}`);
  }
  const view = new DataView(buffer);
  const magic = view.getUint16(0, true), version = view.getUint8(2), bytes = view.getUint32(20, true);
  if (magic !== MAGIC || version !== VERSION) {
    throw new RangeError(`not a picture of version ${VERSION}: magic ${magic.toString(16)}, version ${version}`);
  }
  if (HEADER_BYTES + bytes !== buffer.byteLength) {
    throw new RangeError(`a picture of ${bytes} bytes came with ${buffer.byteLength - HEADER_BYTES}`);
  }
  const flags = view.getUint8(3);
  return {
    key: Boolean(flags & KEY), first: Boolean(flags & FIRST),
    jpeg: Boolean(flags & JPEG), cut: Boolean(flags & CUT),
    stream: view.getUint32(4, true), chunk: view.getUint32(8, true), index: view.getUint32(12, true),
    event: view.getUint32(16, true), time: view.getFloat64(24, true),
    payload: new Uint8Array(buffer, HEADER_BYTES, bytes),
  };
}

/** Milliseconds to wait before the n-th attempt in a row, n from 0. */
export const backoff = (n) => Math.min(250 * 2 ** n, 8000);

/** HTTP of the server, relative to the page, with the token where there is one. */
export class Server {
  constructor(base = document.baseURI) {
    this.base = base;
    this.token = null;
  }

  url(path) {
    return new URL(path, this.base);
  }

  socketUrl(id, format) {
    const url = this.url(`streams/${id}`);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    if (this.token) url.searchParams.set("token", this.token);
    if (format) url.searchParams.set("format", format);
    return url;
  }

  /** A response; an error of the server is thrown with its own words and `status`. */
  async request(path, options = {}) {
    const headers = new Headers(options.headers);
    if (this.token) headers.set("Authorization", `Bearer ${this.token}`);
    const response = await fetch(this.url(path), { ...options, headers });
    if (response.ok) return response;
    let message = `${response.status} ${response.statusText}`;
    try {
      message = (await response.json()).error ?? message;
    } catch { /* no JSON: the status has to do */ }
    throw Object.assign(new Error(message), { status: response.status });
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  post(path, value) {
    const headers = { "Content-Type": "application/json" };
    return this.json(path, { method: "POST", headers, body: JSON.stringify(value) });
  }
}

/**
 * The socket of one stream. Events: "message" (detail: JSON), "picture" (detail: parsed), "state"
 * (detail: connecting, open, waiting, closed, ended, gone). What must not be lost is kept until it is
 * open again; keys are not: old ones would steer now.
 */
export class Connection extends EventTarget {
  constructor(server, id, format = null) {
    super();
    Object.assign(this, { server, id, format, attempts: 0, waiting: [], socket: null, over: false });
    this.eventId = Math.floor(performance.timeOrigin / 1000) % 1_000_000 * 1000; // grows over reloads
    this.online = () => this.retryNow();
    addEventListener("online", this.online);
    this.connect();
  }

  connect() {
    this.emit("state", "connecting");
    const socket = this.socket = new WebSocket(this.server.socketUrl(this.id, this.format));
    socket.binaryType = "arraybuffer";
    socket.onopen = () => {
      this.emit("state", "open");
      for (const message of this.waiting.splice(0)) this.write(message);
    };
    socket.onmessage = ({ data }) => {
      try {
        if (typeof data === "string") this.receive(JSON.parse(data));
        else this.emit("picture", parsePicture(data));
      } catch (error) {
        this.emit("message", { type: "error", message: error.message });
      }
    };
    socket.onclose = () => socket === this.socket && this.lost();
  }

  receive(message) {
    if (message.type === "hello") this.attempts = 0;
    if (message.type === "end") this.close("ended");
    this.emit("message", message);
  }

  async lost() {
    if (this.over) return;
    this.emit("state", "waiting");
    this.timer = setTimeout(() => this.connect(), backoff(this.attempts++));
    try {
      await this.server.json(`streams/${this.id}`);
    } catch (error) {
      if ([401, 404].includes(error.status) && !this.over) this.close("gone");
    }
  }

  retryNow() {
    if (this.over || this.socket.readyState <= WebSocket.OPEN) return;
    clearTimeout(this.timer);
    this.connect();
  }

  /** Sends with a new event id, which is returned. */
  direct(message) {
    const event_id = ++this.eventId;
    this.send({ ...message, event_id });
    return event_id;
  }

  send(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.write(message);
    else if (["prompt", "settings", "pause"].includes(message.type)) this.waiting.push(message);
  }

  write(message) {
    this.socket.send(JSON.stringify(message));
  }

  close(state = "closed") {
    this.over = true;
    clearTimeout(this.timer);
    removeEventListener("online", this.online);
    this.socket.close();
    this.emit("state", state);
  }

  emit(name, detail) {
    this.dispatchEvent(new CustomEvent(name, { detail }));
  }
}
