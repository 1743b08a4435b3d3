"""Whether a video file has all the bytes that its own structure declares. Reads sizes only."""

import io
import os
import pathlib
from typing import BinaryIO

_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"sidx")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_MOST = 1_000_000  # boxes that are walked: a day of fragments of a tenth of a second


def declared_size(path: str | os.PathLike) -> int:
    """The bytes that an mp4, mkv, webm or avi says it has, at least; 0 where it does not say."""
    with pathlib.Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        head = file.read(12)
        if head[4:8] in _BOXES:
            return _mp4(file, size)
        if head[:4] == b"RIFF":
            return _riff(file, size)
        if head[:4] == _EBML:
            return _matroska(file)
    return 0


def ends_open(path: str | os.PathLike) -> str | None:
    """How the file shows that its end is missing, where it does not say how many bytes are."""
    with pathlib.Path(path).open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 256))  # some have a little after their end
        tail = file.read()
        file.seek(0)
        head = file.read(6)
    if head in (b"GIF87a", b"GIF89a") and b"\0\x3b" not in tail:
        return "it has no end marker"
    return None


def _mp4(file: BinaryIO, size: int) -> int:
    at = 0
    for _ in range(_MOST):
        file.seek(at)
        head = file.read(16)
        if len(head) < 8:
            break
        length = int.from_bytes(head[:4])
        if length == 1 and len(head) == 16:
            length = int.from_bytes(head[8:])
        if length < 8:  # 0: to the end of the file
            return size
        at += length
    return at


def _riff(file: BinaryIO, size: int) -> int:
    at = 0
    for _ in range(_MOST):  # a large AVI is several of them
        file.seek(at)
        head = file.read(8)
        length = int.from_bytes(head[4:], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            break
        at += 8 + length
    return at


def _matroska(file: BinaryIO) -> int:
    file.seek(4)
    length = _number(file)
    if length is None:
        return 0
    file.seek(length, io.SEEK_CUR)
    if file.read(4) != _SEGMENT:
        return 0
    length = _number(file)
    return 0 if length is None else file.tell() + length


def _number(file: BinaryIO) -> int | None:
    """An EBML size; None: unknown, as of a file that is written while it is sent."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    width = 9 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (0xFF >> width)]) + file.read(width - 1))
    return None if value == (1 << 7 * width) - 1 else value
