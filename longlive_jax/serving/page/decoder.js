// Pictures of a stream become bitmaps: H.264 by WebCodecs, JPEG by the browser's image decoder.

/** Whether this browser decodes H.264 by WebCodecs (it needs https or localhost). */
export async function decodesH264(codec = "avc1.42E01F") {
  if (!("VideoDecoder" in globalThis)) return false;
  try {
    return (await VideoDecoder.isConfigSupported({ codec, optimizeForLatency: true })).supported;
  } catch {
    return false;
  }
}

/**
 * `onpicture({index, chunk, event, ..., image, decoded})` is called in the stream's order; `image`
 * is an ImageBitmap that the callee closes. After an error it asks for a key frame and waits for it.
 */
export class Decoder {
  constructor({ onpicture, onkeyframe }) {
    Object.assign(this, { onpicture, onkeyframe });
    this.headers = new Map(); // by index, of what is being decoded
    this.chain = Promise.resolve();
    this.codec = null;
    this.broken = true; // until the first key frame
    this.missed = this.failures = 0;
    this.video = null;
  }

  configure(codec) {
    this.codec = codec;
    this.reset();
  }

  reset() {
    if (this.video && this.video.state !== "closed") this.video.close();
    this.video = null;
    this.headers.clear();
    this.broken = true;
  }

  push(picture) {
    if (picture.jpeg) return this.bitmap(picture, new Blob([picture.payload], { type: "image/jpeg" }));
    if (this.broken && !picture.key) {
      if (++this.missed % 16 === 0) this.onkeyframe(); // the key frame that was sent did not come
      return undefined;
    }
    this.missed = 0;
    if (!this.video) this.open();
    this.broken = false;
    this.headers.set(picture.index, picture);
    try {
      this.video.decode(new EncodedVideoChunk({
        type: picture.key ? "key" : "delta", timestamp: picture.index, data: picture.payload,
      }));
    } catch {
      this.fail();
    }
    return undefined;
  }

  open() {
    const video = this.video = new VideoDecoder({
      output: (frame) => {
        const header = this.headers.get(frame.timestamp);
        this.headers.delete(frame.timestamp);
        if (header && video === this.video) this.bitmap(header, frame);
        else frame.close();
      },
      error: () => video === this.video && this.fail(),
    });
    video.configure({ codec: this.codec, optimizeForLatency: true });
  }

  fail() {
    this.failures++;
    this.reset();
    this.onkeyframe();
  }

  /** A decoder has few frames of its own: each is copied and given back at once. */
  bitmap(header, source) {
    const made = createImageBitmap(source).catch(() => null).finally(() => source.close?.());
    const { payload, ...rest } = header;
    this.chain = this.chain.then(() => made).then((image) => {
      if (image) this.onpicture({ ...rest, image, decoded: performance.timeOrigin + performance.now() });
    });
  }
}
