"""Video files in: `VideoFile` (frames in order, never the whole file), `probe` and `read_video`.

A file is judged by its content. Only FORMATS are read, and only from the file itself: other files
that it names are never opened.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import pathlib
import re
from collections.abc import Generator, Iterable, Iterator
from fractions import Fraction
from typing import Any

import av
import numpy as np
from absl import logging
from av.error import FFmpegError
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import Interpolation

from longlive_jax.data import containers, hdr, timeline
from longlive_jax.data.images import VIDEO_FILTER, resize
from longlive_jax.data.timeline import Timeline, frame_indices
from longlive_jax.errors import InputError

# FFmpeg's names of what is read. Left out are those that open other files (concat, hls, dash,
# image2, ...), devices and everything that is no container of one film. Sound is read to be named.
FORMATS = (
    "mov", "matroska", "avi", "gif", "apng", "mpegts", "mpeg", "mpegvideo", "flv", "ogg", "asf",
    "yuv4mpegpipe", "ivf", "obu", "h264", "hevc", "m4v", "mjpeg", "nut", "mxf", "dv",
    "wav", "mp3", "flac", "aac",
)  # fmt: skip
MAX_PIXELS = 2**26  # of a frame: 8192 x 8192, twice 8K. A small file can claim any size
_PIXELS_AT_WORK = 2**27  # of the frames that threads decode at once: 16 of 4K, 2 of MAX_PIXELS
RATES = (Fraction(1, 60), Fraction(1000))  # frames a second: a slide a minute to slow motion
MAX_SECONDS = 24 * 60 * 60  # longer than films are; more is a header or timestamp that is damaged
# swscale's fast paths darken every colour by more than 1/255 on the way to RGB; these do not, and
# are 7 dB nearer to the pixels that were encoded.
_TO_RGB = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
_OPEN = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
# Streams that a player shows nothing of by itself.
_NO_FILM = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """The content of a video file; `height` and `width` of an upright frame.

    frames: pictures that are shown. fps: how many a second, on average where the rate varies.
    timeline: when they are shown, unless it is at a constant rate.
    """

    frames: int
    fps: Fraction
    height: int
    width: int
    timeline: Timeline | None = dataclasses.field(default=None, compare=False, repr=False)

    def indices(self, num_frames: int | None = None, fps: float = 24, start: int = 0) -> np.ndarray:
        """The pictures that show the video at `fps`, from picture `start` on: int64 [frame].

        At a constant rate as `frame_indices` says, else each is the one shown at its time.
        `num_frames` None: all before the end; more than there are: the last picture repeats.
        """
        if self.timeline is None:
            return frame_indices(self.frames, self.fps, num_frames, fps, start)
        shown = self.timeline.shown(num_frames, Fraction(fps).limit_denominator(10**4), start)
        if not self.timeline.even:
            return shown
        even = frame_indices(self.frames, self.fps, len(shown), fps, start)
        return np.minimum(even, self.frames - 1)


def probe(path: str | os.PathLike) -> VideoInfo:
    """Reads a file's packets; decodes one frame.

    Raises:
      InputError: the file is missing, empty, truncated, or not a video.
    """
    with VideoFile(path) as video:
        return video.info


def read_video(
    path: str | os.PathLike,
    height: int,
    width: int,
    num_frames: int | None = None,
    fps: float = 24,
    start: int = 0,
) -> np.ndarray:
    """A video at `fps`, stretched to a size: uint8 [frame, height, width, 3].

    Args:
      num_frames: how many; the last frame repeats where the video is shorter. None: to the end.
      start: the first picture of the file.

    Raises:
      InputError: as `VideoFile`.
    """
    with VideoFile(path, height, width) as video:
        return np.stack(list(video.pick(video.info.indices(num_frames, fps, start).tolist())))


class VideoFile:
    """A video file whose frames are decoded when they are asked for.

    Args:
      path: a file of any of FORMATS, with any name.
      height, width: stretch frames to this size; both or neither. PIL's antialiased cubic filter:
        the kind that the original's decoder uses (decord: swscale's default), in an implementation
        whose result does not depend on the CPU.

    Attributes:
      info: VideoInfo of the file as it is stored.

    Raises:
      InputError: here, the file is missing, empty, not a video, known to be truncated, or past the
        limits of this module; while reading, it is damaged or ends early.
    """

    def __init__(
        self, path: str | os.PathLike, height: int | None = None, width: int | None = None
    ):
        self.path = pathlib.Path(path)
        if (height is None) != (width is None):
            raise InputError(f"{path}: {height=} and {width=}: give both or neither")
        if not self.path.is_file():
            what = "is a folder, not a video" if self.path.is_dir() else "no such file"
            raise InputError(f"{self.path}: {what}")
        stat = self.path.stat()
        if stat.st_size == 0:
            raise InputError(f"{self.path}: not a video: the file is empty")
        self._size = None if height is None or width is None else (height, width)
        self._survey = _survey(os.path.abspath(path), str(path), stat.st_size, stat.st_mtime_ns)
        self.info = self._survey.info
        self._decoder = self._rewind()

    def __len__(self) -> int:
        return self.info.frames

    def __iter__(self) -> Iterator[np.ndarray]:
        """All frames in order, uint8 [height, width, 3], one in memory at a time."""
        return self.pick(range(len(self)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames start..stop-1 as uint8 [stop - start, height, width, 3].

        Ranges that follow each other are decoded once, in one pass; a step back starts over.

        Raises:
          InputError: the range is not inside the video, or is empty.
        """
        if not 0 <= start < stop <= len(self):
            raise InputError(f"{self.path}: frames {start}:{stop} of a video of {len(self)} frames")
        return np.stack(list(self.pick(range(start, stop))))

    def pick(self, indices: Iterable[int]) -> Iterator[np.ndarray]:
        """The frames of these indices, uint8 [height, width, 3] each; fast if they ascend."""
        for index, times in itertools.groupby(indices):
            frame = self._frame(int(index))
            yield from (frame for _ in times)

    def close(self) -> None:
        self._decoder.close()

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def _rewind(self) -> Generator[av.VideoFrame]:
        self._next = 0  # index of the frame that the decoder gives next
        return self._decode()

    def _decode(self) -> Generator[av.VideoFrame]:
        """The frames in their order; for one that is never shown, the one before it."""
        count, before = 0, None
        with _opened(self.path) as (container, stream):
            stream.thread_type = "AUTO"
            context = stream.codec_context
            pixels = max(1, context.width * context.height)
            # Each of them has frames of its own, whatever the machine's cores.
            context.thread_count = min(os.cpu_count() or 1, max(1, _PIXELS_AT_WORK // pixels))
            for frame in container.decode(stream):
                place = self._survey.place(frame.pts, count)
                for _ in range(count, place):
                    yield frame if before is None else before
                if place >= count:
                    yield frame
                    count, before = place + 1, frame

    def _frame(self, index: int) -> np.ndarray:
        if index < self._next:
            self._decoder.close()
            self._decoder = self._rewind()
        for frame in self._decoder:
            self._next += 1
            if self._next > index:
                pixels = _pixels(frame)
                return pixels if self._size is None else resize(pixels, *self._size, VIDEO_FILTER)
        raise InputError(
            f"{self.path}: ends after {self._next} frames; it is truncated or damaged, its index "
            f"says {self.info.frames}"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Survey:
    """What a file holds. `pts`: int64, of each picture, or None where they cannot be told by it."""

    info: VideoInfo
    pts: np.ndarray | None

    def place(self, pts: int | None, count: int) -> int:
        """The index of a decoded picture, the one after `count` others."""
        if self.pts is None or pts is None:
            return count
        place = int(np.searchsorted(self.pts, pts))
        return place if place < len(self.pts) and self.pts[place] == pts else count


@dataclasses.dataclass(eq=False)
class _Packets:
    """Timestamps of a stream's packets, in the order they are stored."""

    pts: list[int | None]
    dts: list[int | None]
    durations: list[int]
    damaged: int = 0
    end: int | None = None  # of the last picture, where the container says it


# A sample of a training folder looks at all its files; a trainer looks at them again and again.
@functools.lru_cache(maxsize=1024)
def _survey(absolute: str, path: str, size: int, changed: int) -> _Survey:
    """changed: when the file was; a file that changes is surveyed again."""
    del changed
    file = pathlib.Path(absolute)
    with _opened(path) as (container, stream):
        if stream.codec_context is None:
            raise InputError(f"{path}: cannot be read as a video: its codec is unknown, or damaged")
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        end = _index_end(container, stream)
        if end > size:
            raise InputError(f"{path}: truncated: {size} bytes of at least {end}")
        declared = stream.average_rate or stream.guessed_rate
        declared = Fraction(declared.numerator, declared.denominator) if declared else None
        tick = stream.time_base
        tick = Fraction(tick.numerator, tick.denominator) if tick else Fraction(1, 90000)
        named, says = container.format.name, _seconds(container)
        packets, got = _demux(container, stream)
        packets.end = _tagged_end(stream, says, tick)
    with _opened(path) as (container, stream):
        first = next(iter(container.decode(stream)), None)
        if first is None or not packets.pts:
            raise InputError(f"{path}: holds a video stream without frames")
        start, trc = first.pts, first.color_trc
        height, width, _ = _pixels(first).shape
    _check_whole(path, file, size, "mov" in named or (says, got))
    if packets.damaged:
        logging.warning("%s: %d of its packets are damaged", path, packets.damaged)
    if trc in hdr.NAMES:
        logging.info("%s: is HDR video (%s), and is converted to BT.709", path, hdr.NAMES[trc])
    info, pts = _timed(path, packets, start, tick, declared, "mov" in named or named == "gif")
    return _Survey(dataclasses.replace(info, height=height, width=width), pts)


def _timed(path, packets, start, tick, declared, explicit) -> tuple[VideoInfo, np.ndarray | None]:
    """Number, rate and times of the pictures.

    start: timestamp of the first picture that is shown. explicit: each packet has a duration of its
    own.
    """
    times, pts = _times(packets, start)
    if times is None:
        fps, line, count = declared, None, len(packets.pts)
    else:
        count = len(times)
        last = _last(packets, times, explicit, tick, declared)
        fps, line = timeline.describe(np.append(times, times[-1] + last) - times[0], tick, declared)
    if not fps:
        raise InputError(f"{path}: holds a video stream without frames")
    seconds = line.seconds if line else count / fps
    if not RATES[0] <= fps <= RATES[1]:
        raise InputError(
            f"{path}: has {float(fps):.6g} frames a second; must be {float(RATES[0]):.3g} to "
            f"{float(RATES[1]):g}; encode it again at its true rate"
        )
    if seconds > MAX_SECONDS:
        raise InputError(
            f"{path}: lasts {float(seconds):.6g} s by its timestamps, the limit is {MAX_SECONDS}; "
            "cut it, or mend its timestamps"
        )
    return VideoInfo(count, fps, 0, 0, line), pts


def _times(packets: _Packets, start: int | None) -> tuple[np.ndarray | None, np.ndarray | None]:
    """When each picture appears, ascending; and the same if decoded pictures are known by it.

    (None, None) if the file does not say: without timestamps, or where they go back.
    """
    known = [t for t in packets.dts if t is not None]
    if any(b < a for a, b in itertools.pairwise(known)):
        return None, None
    by_pts = all(t is not None for t in packets.pts)
    times = packets.pts if by_pts else packets.dts
    if any(t is None for t in times):
        return None, None
    times = np.unique(np.array(times, np.int64))
    if len(times) < (len(packets.pts) + 1) // 2 if by_pts else len(times) < len(packets.dts):
        return None, None
    if by_pts and start is not None:
        # Those before it need pictures that are gone: the file was cut there.
        times = times[times >= start]
    return (times, times if by_pts else None) if len(times) else (None, None)


def _last(packets: _Packets, times, explicit: bool, tick: Fraction, declared) -> int:
    """For how many ticks the last picture is shown."""
    durations = packets.durations
    if packets.end is not None and packets.end > times[-1]:
        return packets.end - int(times[-1])
    said = durations[-1]
    # A default of the header, or a guess, is no word on the last picture.
    if said > 1 and (explicit or (len(durations) > 1 and said != durations[-2])):
        return said
    if len(times) > 1:
        return int(times[-1] - times[-2])
    return said if said > 0 else max(1, round(1 / (declared * tick))) if declared else 1


def _demux(container, stream) -> tuple[_Packets, float]:
    """The packets of pictures that are shown; and when the last packet of all streams ends."""
    packets, end = _Packets([], [], []), 0.0
    name, start = stream.codec_context.name, (container.start_time or 0) / av.time_base
    for packet in container.demux():
        if not packet.size:
            continue
        if packet.pts is not None:
            last = (packet.pts + (packet.duration or 0)) * packet.time_base
            end = max(end, float(last.numerator / last.denominator) - start)
        if packet.stream_index != stream.index or packet.is_discard or _hidden(name, packet):
            continue
        packets.pts.append(packet.pts)
        packets.dts.append(packet.dts)
        packets.durations.append(packet.duration or 0)
        packets.damaged += packet.is_corrupt
    return packets, end


def _hidden(codec: str, packet: Any) -> bool:
    """Whether the packet's picture is for reference only, by the bit of its header that says so."""
    head = bytes(memoryview(packet)[:1])[0]
    if codec in ("vp8", "libvpx"):
        return not head & 0x10
    if codec in ("vp9", "libvpx-vp9"):
        several = bytes(memoryview(packet)[-1:])[0] & 0xE0 == 0xC0  # the last of them is shown
        return head & 0x30 != 0x30 and not several and not head & 0x0A
    return False


def _seconds(container) -> float | None:
    return container.duration / av.time_base if container.duration else None


def _tagged_end(stream, seconds: float | None, tick: Fraction) -> int | None:
    """When a track of an mkv ends by its tag, in ticks, if the file's header agrees."""
    said = re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d{1,9})", stream.metadata.get("DURATION", ""))
    if said is None or not seconds:
        return None
    end = (60 * int(said[1]) + int(said[2])) * 60 + Fraction(said[3])
    return round(end / tick) if abs(end - seconds) < 0.01 else None


def _index_end(container, stream) -> int:
    """Where the last picture of an mp4's index ends, in bytes; 0 where there is none."""
    if "mp4" not in container.format.name or not stream.frames:
        return 0
    return max((e.pos + e.size for e in getattr(stream, "index_entries", ())), default=0)


def _check_size(path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{path}: frames of {height}x{width} pixels, the limit is {MAX_PIXELS} pixels; "
            "scale it down"
        )


def _check_whole(path, file: pathlib.Path, size: int, times) -> None:
    """Warns of a file that was cut short, and of how much is missing."""
    if said := containers.ends_open(file):
        raise InputError(f"{path}: truncated: {size} bytes, {said}; copy or download it again")
    declared = containers.declared_size(file)
    if declared > size:
        logging.warning(
            "%s: is cut short: %d of %d bytes are there, %.0f %% is missing; what is there is read",
            path, size, declared, 100 * (1 - size / declared),
        )  # fmt: skip
        return
    if times is True or not times[0]:
        return
    says, got = times
    if says - got > max(0.2, 0.02 * says):
        logging.warning(
            "%s: is cut short: it says that it lasts %.2f s and ends after %.2f s, %.0f %% is "
            "missing; what is there is read",
            path, says, got, 100 * (1 - got / says),
        )  # fmt: skip


@contextlib.contextmanager
def _opened(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
    """(container, stream of the film); what FFmpeg raises in the block becomes an InputError."""
    try:
        # A plain name would be a protocol where it has a colon ("12:30.mp4").
        with av.open(f"file:{os.path.abspath(path)}", options=dict(_OPEN)) as container:
            yield container, _film(path, container)
    except (FFmpegError, OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        size = os.stat(path).st_size
        raise InputError(
            f"{path}: cannot be read as a video: {reason} ({size} bytes; it is not a video, or "
            "truncated, or damaged, or of a container that is not read: mp4, mov, mkv, webm, avi, "
            "gif, ts and the like are)"
        ) from error


def _film(path, container):
    """The video stream that a player shows: the default one, else the first."""
    streams = [s for s in container.streams.video if not s.disposition & _NO_FILM]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
        if container.streams.video:
            kinds = [*(kind for kind in kinds if kind != "video"), "a cover picture"]
        raise InputError(f"{path}: holds no video stream; found: {', '.join(kinds)}")
    return next((s for s in streams if s.disposition & Disposition.default), streams[0])


def _pixels(frame: av.VideoFrame) -> np.ndarray:
    """uint8 [height, width, 3], upright: phones store a rotation or mirror beside the frames."""
    if (transfer := frame.color_trc) in hdr.NAMES:
        codes = frame.reformat(format="rgb48le", interpolation=_TO_RGB).to_ndarray()
        pixels = hdr.to_bt709(codes, transfer, frame.color_primaries)
    else:
        pixels = frame.reformat(format="rgb24", interpolation=_TO_RGB).to_ndarray()
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return pixels
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(matrix), np.int32, 5))
    if abs(b) + abs(c) > abs(a) + abs(d):  # nearest of the eight, where it is none of them
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    pixels = pixels[:, ::-1] if a < 0 else pixels
    return np.ascontiguousarray(pixels[::-1] if d < 0 else pixels)
