"""The index of an mp4 before its frames, so that players and browsers start at once.

FFmpeg knows the index, `moov`, when all frames are written, and puts it last. The writer leaves a
gap before everything that FFmpeg writes; when it has ended, the index goes into the gap. Frames
are moved only where the gap was too small, or far too large.
"""

import io
import struct
from collections.abc import Iterator
from typing import BinaryIO

_FRAME = 40  # bytes of index: size, time offset, and at worst a piece of its own and a key frame
_FIXED = 4096  # of index, whatever the number of frames: of H.264 it is below 1 kB
_UNKNOWN = 1500  # frames that a video of unknown length is expected to have: a minute
_MOST = 1 << 24  # bytes of gap: the index of half a million frames at least, 5 hours
_WASTE = 1 << 16, 1 / 16  # of a gap: bytes that no one counts, and a share of the frames' bytes
_STEP = 1 << 22  # bytes that are moved together
_CONTAINERS = (b"moov", b"trak", b"mdia", b"minf", b"stbl")
_HEADER = struct.Struct(">I4s")


def gap(frames: int | None) -> int:
    """Bytes to leave before a video of so many frames; None: nobody knows how many."""
    return min(_MOST, _FIXED + _FRAME * (_UNKNOWN if frames is None else frames))


def index_first(file: BinaryIO, before: int) -> None:
    """Brings the index of a complete mp4 before its frames.

    Args:
      file: open for reading and writing; `before` bytes to use, then the mp4, whose offsets count
        from its own first byte.
    """
    end = file.seek(0, io.SEEK_END)
    boxes = {kind: (start, size) for kind, start, size in _boxes(file, before, end)}
    head, index = (_read(file, *boxes[kind]) for kind in (b"ftyp", b"moov"))
    start, size = boxes[b"mdat"]
    room = start - len(head)
    new = _moved(index, before)
    # In 8 bytes each, offsets take as much as they ever do, wherever the frames go.
    need = len(_moved(index, 1 << 32)) + _HEADER.size
    if room < len(new) + _HEADER.size or room - need > max(_WASTE[0], _WASTE[1] * size):
        _move(file, start, size, need - room)
        start, new, room = start + need - room, _moved(index, before + need - room), need
    file.seek(0)
    rest = room - len(new)
    file.write(head + new + _HEADER.pack(rest, b"free"))
    file.truncate(start + size)


def _boxes(file, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, size) of each box of a file."""
    while start < end:
        header = _read(file, start, 16)
        size, kind = _HEADER.unpack_from(header)
        if size == 1:  # the size is in the next 8 bytes
            (size,) = struct.unpack_from(">Q", header, _HEADER.size)
        if size < _HEADER.size:
            raise ValueError(f"mp4: box {kind!r} of {size} bytes")
        yield kind, start, size
        start += size


def _moved(box: bytes, by: int) -> bytes:
    """A box of the index, with all offsets of frames `by` larger."""
    _, kind = _HEADER.unpack_from(box)
    content = box[_HEADER.size :]
    if kind in _CONTAINERS:
        children, at = [], 0
        while at < len(content):
            size, _ = _HEADER.unpack_from(content, at)
            children.append(_moved(content[at : at + size], by))
            at += size
        content = b"".join(children)
    elif kind in (b"stco", b"co64"):
        count = int.from_bytes(content[4:8])
        form = "I" if kind == b"stco" else "Q"
        offsets = [n + by for n in struct.unpack_from(f">{count}{form}", content, 8)]
        if offsets and max(offsets) >= 1 << 32:
            kind, form = b"co64", "Q"
        content = content[:8] + struct.pack(f">{count}{form}", *offsets)
    return _HEADER.pack(_HEADER.size + len(content), kind) + content


def _move(file, start: int, size: int, by: int) -> None:
    """Moves a part of a file; pieces in the order in which none overwrites another."""
    pieces = range(start, start + size, _STEP)
    for at in reversed(pieces) if by > 0 else pieces:
        piece = _read(file, at, min(_STEP, start + size - at))
        file.seek(at + by)
        file.write(piece)


def _read(file, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)
