"""Pictures out: H.264 access units for viewers and the same in an mp4 that plays at any time.

An encoder has a thread of its own, which waits for frames from the device and encodes them, so
that neither the device nor the event loop ever waits for x264. (H100 and H200 have no encoder in
hardware.)
"""

import functools
import io
import os
import pathlib
import queue
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import av
import jax
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from longlive_jax.config import FRAMES_PER_SECOND
from longlive_jax.errors import NotFiniteError

_BT709 = 1
_JPEG_QUALITY = 85
# No B frames, no look-ahead: a picture in is an access unit out. A key frame every two seconds.
_X264 = {
    "preset": "ultrafast", "tune": "zerolatency", "crf": "23", "bf": "0", "g": "48",
    "forced-idr": "1", "threads": "2",
}  # fmt: skip
# A fragment every 0.4 s, each handed to the system at once: what is there plays.
_FRAGMENTED = {
    "movflags": "empty_moov+default_base_moof+frag_keyframe",
    "frag_duration": "400000",
    "flush_packets": "1",
}
_DONE = None


class Piece(NamedTuple):
    """Frames of a chunk on their way.

    frames: uint8 [1, frame, height, width, 3]. finite: bool [] each, of all that they depend on.
    first: whether a chunk begins; cut: whether it begins a shot. events: the newest applied, of
      each frame.
    shown: whether viewers get them.
    """

    frames: jax.Array
    finite: tuple[jax.Array, ...]
    chunk: int
    first: bool
    cut: bool
    events: tuple[int, ...]
    shown: bool


class Picture(NamedTuple):
    """An encoded picture; `jpeg` is empty where nobody asked for it. time: seconds since epoch."""

    chunk: int
    frame: int
    event: int
    key: bool
    first: bool
    cut: bool
    time: float
    h264: bytes
    jpeg: bytes


class Encoder:
    """Encodes the pictures of one stream, in order, in a thread.

    Args:
      deliver: called from the thread with each `Picture` that viewers get.
      failed: called from the thread, once, with what ended it.
      wants_jpeg: whether any viewer takes JPEG, asked at each picture.
    """

    def __init__(
        self,
        path: pathlib.Path,
        height: int,
        width: int,
        deliver: Callable[[Picture], None],
        failed: Callable[[BaseException], None],
        wants_jpeg: Callable[[], bool],
    ):
        self.path, self.frames = path, 0  # encoded so far
        self._size = height, width
        self._deliver, self._failed, self._wants_jpeg = deliver, failed, wants_jpeg
        self._queue: queue.Queue[Piece | None] = queue.Queue()
        self._key, self._finished = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=f"encode {path.stem}", daemon=True)
        self._thread.start()

    def put(self, piece: Piece) -> None:
        """Hands over the next frames, which may still be on their way. After `finish`: nothing."""
        if not self._finished:
            self._queue.put(piece)

    @property
    def backlog(self) -> int:
        """Pieces that are not encoded yet."""
        return self._queue.qsize()

    def request_key(self) -> None:
        """The next picture is a key frame."""
        self._key.set()

    def finish(self) -> None:
        """Completes the file behind what has been put; does not wait for it."""
        if not self._finished:
            self._finished = True
            self._queue.put(_DONE)

    def close(self, timeout: float | None = None) -> None:
        """As `finish`, and waits."""
        self.finish()
        self._thread.join(timeout)

    def _run(self):
        try:
            with av.open(os.fspath(self.path), "w", format="mp4", options=_FRAGMENTED) as container:
                stream, header = _begin(container, *self._size)
                while (piece := self._queue.get()) is not _DONE:
                    self._encode(container, stream, header, piece)
                container.mux(stream.encode())
        except BaseException as error:
            self._failed(error)

    def _encode(self, container, stream, header, piece):
        if not all(bool(np.asarray(flag)) for flag in piece.finite):
            raise NotFiniteError(f"chunk {piece.chunk} has numbers that are not finite")
        for i, pixels in enumerate(np.asarray(piece.frames)[0]):
            first = piece.first and i == 0
            cut = piece.cut and first
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )  # fmt: skip
            frame.pts, frame.time_base = self.frames, Fraction(1, FRAMES_PER_SECOND)
            frame.pict_type = PictureType.NONE
            wanted = piece.shown and self._key.is_set()  # by a viewer, who has to get it
            if wanted:
                self._key.clear()
            if cut or wanted:
                frame.pict_type = PictureType.I
            data, key = b"", False
            for packet in stream.encode(frame):
                data, key = data + bytes(packet), key or packet.is_keyframe
                container.mux(packet)
            if piece.shown:
                jpeg = _jpeg(pixels) if self._wants_jpeg() else b""
                data = header + data if key else data
                picture = Picture(piece.chunk, self.frames, piece.events[i], key, first, cut,
                                  time.time(), data, jpeg)  # fmt: skip
                self._deliver(picture)
            self.frames += 1


def _begin(container, height: int, width: int) -> tuple[Any, bytes]:
    """The stream, and the SPS and PPS that stand before its key frames."""
    stream: Any = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_X264)
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    context = stream.codec_context
    context.time_base = Fraction(1, FRAMES_PER_SECOND)
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = ColorRange.MPEG
    container.start_encoding()
    return stream, bytes(context.extradata)


def _jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


@functools.cache
def codec(height: int, width: int) -> str:
    """The name that WebCodecs knows the H.264 of this size by (RFC 6381)."""
    with av.open(io.BytesIO(), "w", format="mp4", options=_FRAGMENTED) as container:
        _, header = _begin(container, height, width)
    sps = header.index(b"\0\0\1\x67") + 4
    return f"avc1.{header[sps : sps + 3].hex().upper()}"


def playable(path: pathlib.Path) -> int:
    """Bytes of a fragmented mp4 up to the end of its last complete fragment; 0: nothing plays."""
    size, offset, end = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while offset + 8 <= size:
            file.seek(offset)
            length, kind = int.from_bytes(file.read(4)), file.read(4)
            if length < 8 or offset + length > size:
                break
            offset += length
            if kind == b"mdat":
                end = offset
    return end
