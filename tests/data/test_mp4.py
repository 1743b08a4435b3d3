"""The index of an mp4 is before its frames, whatever was known of it when the writing began."""

import io
import struct

import numpy as np
import pytest

from longlive_jax.data import mp4, video
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import probe, read_video

HEIGHT, WIDTH = 64, 96


def noise(count):
    """Frames that no codec makes small."""
    return np.random.default_rng(count).integers(0, 256, (count, HEIGHT, WIDTH, 3), np.uint8)


def write(path, pixels, **kwargs):
    with VideoWriter(path, HEIGHT, WIDTH, **kwargs) as writer:
        writer.write(pixels)
    return path


def kinds(path):
    with open(path, "rb") as file:
        size = path.stat().st_size
        boxes = list(mp4._boxes(file, 0, size))
    assert boxes[-1][1] + boxes[-1][2] == size
    return [kind.decode() for kind, *_ in boxes]


@pytest.fixture
def moves(monkeypatch):
    """The distances by which frames were moved."""
    made, real = [], mp4._move
    monkeypatch.setattr(mp4, "_move", lambda *args: (made.append(args[3]), real(*args))[1])
    return made


@pytest.fixture
def plain(tmp_path, monkeypatch):
    """Where the next video is kept as FFmpeg wrote it.

    Of the same encoding: libx264's macroblock tree sometimes makes others of the same pictures.
    """
    path, real = tmp_path / "plain.mp4", video._File.finish

    def finish(self):
        path.write_bytes(self._path.read_bytes()[self._gap :])
        real(self)

    monkeypatch.setattr(video._File, "finish", finish)
    return path


def check_frames(path, plain):
    assert kinds(plain) == ["ftyp", "free", "mdat", "moov"]
    assert kinds(path) == ["ftyp", "moov", "free", "mdat"]
    np.testing.assert_array_equal(read_video(path, HEIGHT, WIDTH), read_video(plain, HEIGHT, WIDTH))


@pytest.mark.parametrize("frames", [None, 50, 49, 1000])
def test_frames_stay_where_they_are(tmp_path, plain, moves, frames):
    path = write(tmp_path / "v.mp4", noise(50), frames=frames)
    check_frames(path, plain)
    assert not moves


@pytest.mark.parametrize("gap", [0, 1, 7, 500, 1100, 1200, 1300, 1400, 1500, 3_000_000])
@pytest.mark.parametrize("step", [1000, 1 << 22])
def test_a_gap_of_any_size(tmp_path, plain, moves, monkeypatch, gap, step):
    monkeypatch.setattr(mp4, "gap", lambda frames: gap)
    monkeypatch.setattr(mp4, "_STEP", step)
    path = write(tmp_path / "v.mp4", noise(50))
    check_frames(path, plain)
    assert probe(path).frames == 50
    assert all(move > 0 for move in moves) == (gap < 3_000_000)
    assert path.stat().st_size < 1.1 * plain.stat().st_size


def test_an_interrupted_video_has_no_large_hole(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(
        tmp_path / "v.mp4", HEIGHT, WIDTH, frames=10**9
    ) as writer:  # fmt: skip
        writer.write(noise(3))
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "v.mp4", HEIGHT, WIDTH)) == 3
    assert kinds(tmp_path / "v.mp4") == ["ftyp", "moov", "free", "mdat"]
    assert (tmp_path / "v.mp4").stat().st_size < 100_000


def box(kind, *content):
    content = b"".join(content)
    return struct.pack(">I4s", 8 + len(content), kind) + content


def offsets(index):
    """Of frames, by where the index keeps them."""
    file = io.BytesIO(index)
    for kind in (b"stco", b"co64"):
        at = index.find(kind)
        if at >= 0:
            file.seek(at + 8)
            count = int.from_bytes(file.read(4))
            width = 4 if kind == b"stco" else 8
            return kind, [int.from_bytes(file.read(width)) for _ in range(count)]
    return None


@pytest.mark.parametrize(
    "kind, before, by, after",
    [
        (b"stco", [40, 90], 1000, b"stco"),
        (b"stco", [40, (1 << 32) - 1001], 1000, b"stco"),
        (b"stco", [40, (1 << 32) - 1000], 1000, b"co64"),
        (b"co64", [40, 1 << 33], 1000, b"co64"),
        (b"stco", [], 1000, b"stco"),
    ],
)
def test_offsets_past_4_gb(kind, before, by, after):
    form = "I" if kind == b"stco" else "Q"
    packed = struct.pack(f">I{len(before)}{form}", len(before), *before)
    table = box(kind, bytes(4), packed)
    index = box(b"moov", box(b"mvhd", bytes(9)), box(b"trak", box(b"mdia", box(b"minf", box(b"stbl", box(b"stsz", bytes(5)), table)))))  # fmt: skip
    moved = mp4._moved(index, by)
    assert offsets(moved) == (after, [n + by for n in before])
    assert len(moved) == len(index) + (4 * len(before) if kind != after else 0)
    assert int.from_bytes(moved[:4]) == len(moved)
    assert mp4._moved(index, 0) == index


def test_gaps_are_bounded():
    assert mp4.gap(61) < 7000
    assert mp4.gap(None) < 1 << 16
    assert mp4.gap(10**12) == 1 << 24
