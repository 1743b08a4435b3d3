"""Video files out: `VideoWriter`. `video_reader` reads them; `serving.video_out` streams them."""

import contextlib
import functools
import io
import os
import pathlib
import queue
import threading
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from longlive_jax.data import mp4
from longlive_jax.errors import InputError, NotFiniteError
from longlive_jax.files import remote
from longlive_jax.files.atomic import discard, named, partial_file, put

QUEUED_CHUNKS = 3  # how far the encoder may lag before `write` waits for it
_BT709 = 1  # ISO/IEC 23091-2 code of primaries, transfer and matrix
_DONE = object()
# swscale's fast paths darken every colour by more than 1/255; this does not.
_TO_YUV = Interpolation.BICUBIC | Interpolation.ACCURATE_RND


class VideoWriter:
    """Encodes frames to an H.264 mp4 in a thread of its own.

    `write` returns at once unless the encoder lags by QUEUED_CHUNKS chunks, so memory does not grow
    with the length of the video. The file is written beside `path` and renamed when complete, its
    index before its frames: it plays while it is loaded.
    As a context manager it leaves
      after a clean end, KeyboardInterrupt (or another exit that is no Exception), NotFiniteError:
        the frames written so far, as a playable file; nothing if there are none;
      after another Exception, the encoder's own included: no new file. What was at `path` stays.

    Args:
      path: the file to write; its folder is made if it is missing.
      height, width: pixels, even.
      fps: frames a second, a number or a Fraction.
      frames: how many are expected; with more than that, the file is copied once when it is closed.

    Raises:
      InputError: at construction, for a path that cannot be written or a size that is odd.
      OSError: from `write` and `close`, naming `path`; ENOSPC for a full disk.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        height: int,
        width: int,
        fps: float = 24,
        *,
        frames: int | None = None,
    ):
        self.path = remote.path(path)
        self.frames_written = 0  # handed over by `write`; the encoder may be behind
        if height < 2 or width < 2 or height % 2 or width % 2:
            raise InputError(
                f"{path}: video of {height}x{width} pixels: both must be even and positive, since "
                "yuv420p stores one colour for 2x2 pixels"
            )
        if not fps > 0:
            raise InputError(f"{path}: fps={fps} must be positive")
        self._shape = (height, width, 3)
        self._fps = Fraction(fps).limit_denominator(1001)  # 29.97 and the like are over 1001
        self._partial, self._gap = partial_file(path), mp4.gap(frames)
        self._error: BaseException | None = None
        self._abandoned = self._closed = False
        self._encoded = 0
        self._queue: queue.Queue = queue.Queue(QUEUED_CHUNKS)
        self._thread = threading.Thread(target=self._run, name=f"encode {self.path}", daemon=True)
        self._thread.start()

    def write(self, frames) -> None:
        """Appends uint8 [frame, height, width, 3], a NumPy or JAX array.

        A JAX array is fetched in the encoder's thread, so `write` does not wait for it. A NumPy
        array that the caller could still change is copied.
        """
        self._raise_error()
        if self._closed:
            raise ValueError(f"{self.path}: write after close")
        if np.dtype(frames.dtype) != np.uint8 or tuple(frames.shape[1:]) != self._shape:
            raise InputError(
                f"{self.path}: frames are {frames.dtype} {tuple(frames.shape)}, must be uint8 "
                f"[frame, {', '.join(map(str, self._shape))}]"
            )
        if isinstance(frames, np.ndarray) and frames.flags.writeable:
            frames = frames.copy()
        self._queue.put(frames)
        self.frames_written += len(frames)

    def close(self) -> None:
        """Waits for the encoder and gives the file its name. Closing twice does nothing.

        Raises:
          InputError: no frame was written, so there is nothing to play.
          OSError, and whatever else the encoder raised; then no file is left.
        """
        if self._closed:
            return
        self._finish()
        if not self._encoded:
            raise InputError(f"{self.path}: no frames were written, so there is no video")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, exc_type, exc, traceback) -> None:
        if exc_type is None:
            self.close()
        elif issubclass(exc_type, Exception) and not issubclass(exc_type, NotFiniteError):
            self._abandon()
        elif not self._closed:
            self._finish()

    def _finish(self) -> None:
        try:
            self._queue.put(_DONE)
            self._thread.join()
            self._raise_error()
            if self._encoded:
                put(self._partial, self.path)
            else:
                discard(self._partial, self.path)
        except BaseException:  # also a second Ctrl-C while the encoder finishes
            self._abandon()
            raise
        self._closed = True

    def _abandon(self) -> None:
        if self._closed:
            return
        self._closed = self._abandoned = True
        with contextlib.suppress(queue.Full):  # then the thread will see _abandoned instead
            self._queue.put_nowait(_DONE)
        self._thread.join()
        discard(self._partial, self.path)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        chunks = self._chunks()
        try:
            with _File(self._partial, self._gap) as file:
                try:
                    self._encoded = _encode(file, chunks, self._shape, self._fps)
                finally:
                    # FFmpeg may go on after a failed write, or report it as something else.
                    if file.error is not None:
                        raise file.error
        except BaseException as error:
            failed = isinstance(error, OSError)
            self._error = named(error, self.path, self._partial) if failed else error
            for _ in chunks:  # so that `write` never waits for a thread that has died
                pass

    def _chunks(self) -> Iterator:
        while not self._abandoned:
            with contextlib.suppress(queue.Empty):
                chunk = self._queue.get(timeout=0.5)
                if chunk is _DONE:
                    return
                yield chunk


class _File(io.RawIOBase):
    """The file that FFmpeg writes to, after a gap. Keeps the first error, with its errno."""

    def __init__(self, path: pathlib.Path, gap: int = 0):
        self._file = path.open("wb", buffering=0)
        self._file.seek(gap)
        self._path, self._gap = path, gap
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data) -> int:
        rest = memoryview(data)
        try:
            while rest:  # a disk that is nearly full takes a part and refuses the next
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = self.error or error
            raise
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        offset += self._gap if whence == io.SEEK_SET else 0
        return self._file.seek(offset, whence) - self._gap

    def tell(self) -> int:
        return self._file.tell() - self._gap

    def finish(self) -> None:
        """Brings the index of the complete video into the gap."""
        with self._path.open("r+b") as file:
            mp4.index_first(file, self._gap)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _encode(file: _File, chunks: Iterator, shape: tuple[int, int, int], fps: Fraction) -> int:
    """Writes a complete mp4; returns the number of frames in it."""
    height, width, _ = shape
    codec, options = _encoder(height, width)
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        context = stream.codec_context
        context.time_base = 1 / fps
        # Untagged video is decoded as BT.601 by some players and as BT.709 by others.
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = ColorRange.MPEG
        count = 0
        for chunk in chunks:
            for pixels in np.asarray(chunk):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame = frame.reformat(
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_TO_YUV,
                )
                frame.pts, frame.time_base = count, 1 / fps
                count += 1
                container.mux(stream.encode(frame))
        if count:  # a container without packets has no header to complete
            container.mux(stream.encode())
    if count:
        file.finish()
    return count


@functools.cache
def _encoder(height: int, width: int) -> tuple[str, dict[str, str]]:
    """The H.264 encoder of this machine: name and options.

    NVENC is tried, not looked up: PyAV has it on machines without the chip (H100 and H200 among
    them), without the driver, and for sizes that the chip refuses.
    """
    nvenc = ("h264_nvenc", {"preset": "p4", "rc": "vbr", "cq": "19"})
    try:
        context = av.CodecContext.create(nvenc[0], "w")
        context.height, context.width, context.pix_fmt = height, width, "yuv420p"
        context.time_base, context.framerate = Fraction(1, 24), Fraction(24)
        context.options = nvenc[1]
        context.open()
        return nvenc
    except (FFmpegError, ValueError):
        options = {"preset": "veryfast", "crf": "18"}
        return "libx264", options | ({"x264-params": "asm=AVX2"} if _has_avx512() else {})


def _has_avx512() -> bool:
    """Whether libx264 would use AVX-512, with which one in 16 files differs from its like.

    Its macroblock tree then gives the last blocks of a picture's rows other qualities: 35 of 551
    encodings of the same pictures, and 0 of 283 with AVX2, in processes that had worked with other
    memory before (libx264 165, 2026-12-01).
    """
    info = pathlib.Path("/proc/cpuinfo")
    return info.is_file() and " avx512bw" in info.read_text()
