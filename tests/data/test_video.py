import errno
import io
import pathlib
import struct
import subprocess
import sys
import threading
import time
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.data import video as video_lib
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import VideoFile, VideoInfo, frame_indices, probe, read_video
from longlive_jax.errors import InputError, NotFiniteError

HEIGHT, WIDTH = 64, 96
ASSETS = pathlib.Path(__file__).parents[2] / "assets"


def moving_frames(count: int) -> np.ndarray:
    """Smooth colour that moves, with the frame's number as the brightness of a corner."""
    t, y, x = np.mgrid[0:count, 0:HEIGHT, 0:WIDTH]
    frames = np.stack([x * 2.5, y * 3.5, 128 + 60 * np.sin((x + y + 4 * t) / 15)], -1)
    frames[:, :16, :16] = (16 + 3 * np.arange(count))[:, None, None, None]
    return frames.astype(np.uint8)


def frame_numbers(frames: np.ndarray) -> list[int]:
    corner = frames[:, 4:12, 4:12].astype(float).mean((1, 2, 3))
    return np.round((corner - 16) / 3).astype(int).tolist()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def write(path, frames, fps=24):
    with VideoWriter(path, HEIGHT, WIDTH, fps) as writer:
        writer.write(frames)
    return path


@pytest.mark.parametrize("fps", [24, Fraction(30000, 1001), 16])
def test_round_trip(tmp_path, fps):
    frames = moving_frames(41)
    path = write(tmp_path / "new" / "out.mp4", frames, fps)
    assert probe(path) == VideoInfo(41, Fraction(fps), HEIGHT, WIDTH)
    decoded = read_video(path, HEIGHT, WIDTH, fps=fps)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert psnr(frames, decoded) > 36  # about 38: halved chroma at the corner's sharp edges
    assert frame_numbers(decoded) == list(range(41))
    assert [p.name for p in path.parent.iterdir()] == ["out.mp4"]


def test_colours_survive(tmp_path):
    """A wrong or missing colour matrix moves them by ten levels and more, rounding down by one."""
    rng = np.random.default_rng(0)
    colours = rng.integers(16, 240, (HEIGHT // 16, WIDTH // 16, 3)).astype(np.uint8)
    frames = np.broadcast_to(colours.repeat(16, 0).repeat(16, 1), (9, HEIGHT, WIDTH, 3))
    decoded = read_video(write(tmp_path / "out.mp4", frames), HEIGHT, WIDTH)[4]
    inner = decoded.reshape(HEIGHT // 16, 16, WIDTH // 16, 16, 3)[:, 5:11, :, 5:11].mean((1, 3))
    errors = inner - colours
    assert np.abs(errors).max() < 5 and np.abs(errors.mean((0, 1))).max() < 0.8, errors


def test_timestamps(tmp_path):
    path = write(tmp_path / "out.mp4", moving_frames(30))
    with video_lib.av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate) == (30, 24)
        assert stream.duration * stream.time_base == Fraction(30, 24)
        times = [frame.pts * frame.time_base for frame in container.decode(stream)]
    assert times == [Fraction(k, 24) for k in range(30)]


def test_chunked_writes_equal_one_write(tmp_path):
    frames = moving_frames(33)
    one = write(tmp_path / "one.mp4", frames)
    with VideoWriter(tmp_path / "many.mp4", HEIGHT, WIDTH) as writer:
        for start, stop in [(0, 1), (1, 1), (1, 9), (9, 33)]:
            writer.write(jnp.asarray(frames[start:stop]))
    assert (tmp_path / "many.mp4").read_bytes() == one.read_bytes()


def test_the_encoder_is_never_given_avx512(monkeypatch):
    """With it, libx264 sometimes makes another file of the same pictures."""

    def refuse(*args):
        raise ValueError("no NVENC")

    monkeypatch.setattr(video_lib.av.CodecContext, "create", refuse)
    for has, params in ((True, "asm=AVX2"), (False, None)):
        monkeypatch.setattr(video_lib, "_has_avx512", lambda has=has: has)
        codec, options = video_lib._encoder.__wrapped__(HEIGHT, WIDTH)
        assert codec == "libx264" and options.get("x264-params") == params


def test_written_frames_may_be_overwritten_by_the_caller(tmp_path):
    frames, buffer = moving_frames(16), np.empty((8, HEIGHT, WIDTH, 3), np.uint8)
    with VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH) as writer:
        for start in (0, 8):
            buffer[:] = frames[start : start + 8]
            writer.write(buffer)
            buffer[:] = 0
    assert psnr(frames, read_video(tmp_path / "out.mp4", HEIGHT, WIDTH)) > 36


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, NotFiniteError])
def test_interrupt_leaves_a_playable_file(tmp_path, stop):
    path = tmp_path / "out.mp4"
    with pytest.raises(stop), VideoWriter(path, HEIGHT, WIDTH) as writer:
        writer.write(moving_frames(10))
        raise stop
    assert len(read_video(path, HEIGHT, WIDTH)) == 10
    assert list(tmp_path.iterdir()) == [path]


def test_interrupt_before_the_first_frame_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_exception_keeps_what_was_there(tmp_path):
    path = tmp_path / "out.mp4"
    with pytest.raises(RuntimeError), VideoWriter(path, HEIGHT, WIDTH) as writer:
        writer.write(moving_frames(10))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    path.write_bytes(b"earlier")
    with pytest.raises(RuntimeError), VideoWriter(path, HEIGHT, WIDTH) as writer:
        writer.write(moving_frames(10))
        raise RuntimeError
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_no_frames_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no frames"), VideoWriter(tmp_path / "o.mp4", 64, 64):
        pass
    assert not list(tmp_path.iterdir())


def test_close_and_write_after_close(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH)
    writer.write(moving_frames(2))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="after close"):
        writer.write(moving_frames(2))
    assert probe(tmp_path / "out.mp4").frames == 2


@pytest.mark.parametrize("at_close", [False, True])
def test_encoder_error_surfaces(tmp_path, monkeypatch, at_close):
    def broken(frame, format):
        raise ArithmeticError("the encoder broke")

    monkeypatch.setattr(video_lib.av.VideoFrame, "from_ndarray", broken, raising=True)
    with (
        pytest.raises(ArithmeticError, match="the encoder broke"),
        VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH) as writer,
    ):
        for _ in range(1 if at_close else 500):  # far more than the queue holds
            writer.write(moving_frames(1))
            time.sleep(0 if at_close else 0.001)
        assert at_close
    assert not list(tmp_path.iterdir())
    assert not [t for t in threading.enumerate() if t.name.startswith("encode")]


@pytest.mark.parametrize("room", [0, 20_000])
def test_full_disk(tmp_path, monkeypatch, room):
    """The disk takes `room` bytes. A simulated disk: it also takes a part of a write."""

    class SmallDisk(io.FileIO):
        def write(self, data):
            left = room - self.tell()
            if left <= 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data[:left])

    real_open = pathlib.Path.open

    def open_on_small_disk(path, mode="r", buffering=-1):
        if buffering == 0:
            return SmallDisk(path, mode)
        return real_open(path, mode, buffering)

    monkeypatch.setattr(pathlib.Path, "open", open_on_small_disk)
    noise = np.random.default_rng(0).integers(0, 256, (4, HEIGHT, WIDTH, 3), np.uint8)
    with (
        pytest.raises(OSError) as raised,
        VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH) as writer,
    ):
        for _ in range(40):
            writer.write(noise)
    assert raised.value.errno == errno.ENOSPC
    assert raised.value.filename == str(tmp_path / "out.mp4")
    assert not list(tmp_path.iterdir())


def test_full_disk_for_real():
    """/dev/full refuses every byte."""
    file = video_lib._File(pathlib.Path("/dev/full"))
    with pytest.raises(OSError) as raised:
        video_lib._encode(file, iter([moving_frames(4)]), (HEIGHT, WIDTH, 3), Fraction(24))
    assert raised.value.errno == file.error.errno == errno.ENOSPC


def test_memory_does_not_grow_and_write_waits(tmp_path, monkeypatch):
    gate, waiting = threading.Event(), []

    def slow_encode(file, chunks, shape, fps):
        gate.wait()
        return sum(len(chunk) for chunk in chunks)

    monkeypatch.setattr(video_lib, "_encode", slow_encode)
    writer = VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH)

    def produce():
        for i in range(video_lib.QUEUED_CHUNKS + 1):
            writer.write(moving_frames(1))
            waiting.append(i)

    thread = threading.Thread(target=produce)
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and len(waiting) == video_lib.QUEUED_CHUNKS
    gate.set()
    thread.join(10)
    writer.close()
    assert len(waiting) == video_lib.QUEUED_CHUNKS + 1


@pytest.mark.parametrize("size", [(63, 64), (64, 65), (0, 64)])
def test_odd_size_is_refused(tmp_path, size):
    with pytest.raises(InputError, match="even"):
        VideoWriter(tmp_path / "out.mp4", *size)
    assert not list(tmp_path.iterdir())


def test_unwritable_path_is_refused_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a folder"):
        VideoWriter(tmp_path, HEIGHT, WIDTH)
    with pytest.raises(InputError, match="cannot be written"):
        VideoWriter(tmp_path / "file" / "out.mp4", HEIGHT, WIDTH)
    with pytest.raises(InputError, match="cannot be written"):
        VideoWriter("/proc/nowhere/out.mp4", HEIGHT, WIDTH)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, HEIGHT, WIDTH, 3), np.float32),
        np.zeros((1, WIDTH, HEIGHT, 3), np.uint8),
        np.zeros((HEIGHT, WIDTH, 3), np.uint8),
    ],
)
def test_wrong_frames_are_refused(tmp_path, frames):
    with (
        pytest.raises(InputError, match="must be uint8"),
        VideoWriter(tmp_path / "out.mp4", HEIGHT, WIDTH) as writer,
    ):
        writer.write(frames)


@pytest.mark.parametrize("source_fps", [30, 25, 24, 60])
def test_picked_frames(tmp_path, source_fps):
    path = write(tmp_path / "in.mp4", moving_frames(50), source_fps)
    interval = source_fps / 24
    expected = [min(int(np.round(3 + k * interval)), 49) for k in range(30)]
    assert frame_numbers(read_video(path, HEIGHT, WIDTH, 30, start=3)) == expected
    # To the end: every position that exists and no other.
    everything = frame_numbers(read_video(path, HEIGHT, WIDTH))
    assert everything == [i for i in (int(np.round(k * interval)) for k in range(99)) if i < 50]


def test_halves_round_to_even():
    assert frame_indices(20, 60, 6, 24).tolist() == [0, 2, 5, 8, 10, 12]
    assert frame_indices(5, 24, 8).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]


def test_read_resizes_antialiased(tmp_path):
    stripes = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)
    stripes[:, :, ::2] = 255
    path = write(tmp_path / "in.mp4", stripes)
    small = read_video(path, 32, 32)
    assert small.shape == (3, 32, 32, 3)
    assert np.abs(small[:, :, 4:-4].astype(float) - 127.5).max() < 20


def test_video_file_reads_ranges_in_one_pass(tmp_path, monkeypatch):
    path = write(tmp_path / "in.mp4", moving_frames(20))
    with VideoFile(path) as video:
        assert len(video) == 20
        monkeypatch.setattr(video, "_rewind", lambda: pytest.fail("decoded from the start again"))
        for start in (0, 5, 12):
            assert frame_numbers(video.read(start, start + 5)) == list(range(start, start + 5))
        monkeypatch.undo()
        assert frame_numbers(video.read(2, 4)) == [2, 3]
        assert frame_numbers(np.stack(list(video))) == list(range(20))
        for start, stop in [(-1, 2), (3, 3), (18, 21)]:
            with pytest.raises(InputError, match="of a video of 20 frames"):
                video.read(start, stop)


def test_turned_video_is_upright(tmp_path):
    frames = moving_frames(4)
    path = write(tmp_path / "in.mp4", frames)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix in a version 0 track header
    assert struct.unpack(">9i", data[at : at + 36])[0] == 1 << 16
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert probe(path) == VideoInfo(4, Fraction(24), WIDTH, HEIGHT)
    decoded = read_video(path, WIDTH, HEIGHT)
    assert psnr(np.rot90(frames, -1, (1, 2)), decoded) > 35  # this matrix turns clockwise


def test_unreadable_files(tmp_path):
    good = write(tmp_path / "good.mp4", moving_frames(30)).read_bytes()
    assert good.index(b"moov") < good.index(b"mdat")
    wrong = {
        "empty.mp4": (b"", "empty"),
        "text.mp4": (b"a red panda\n" * 50, "cannot be read as a video"),
        "no_frames.mp4": (good[: len(good) // 2], "truncated"),
        "no_index.mp4": (good.replace(b"moov", b"skip"), "cannot be read as a video"),
    }
    for name, (data, message) in wrong.items():
        (tmp_path / name).write_bytes(data)
        for read in (probe, lambda path: read_video(path, 32, 32)):
            with pytest.raises(InputError, match=message) as raised:
                read(tmp_path / name)
            assert name in str(raised.value)
    with pytest.raises(InputError, match="no such file"):
        probe(tmp_path / "missing.mp4")
    with pytest.raises(InputError, match="folder"):
        probe(tmp_path)


def test_truncated_file_with_its_index_in_front(tmp_path):
    source = write(tmp_path / "in.mp4", moving_frames(40))
    path = tmp_path / "fast.mp4"
    with (
        video_lib.av.open(str(source)) as old,
        video_lib.av.open(str(path), "w", options={"movflags": "faststart"}) as new,
    ):
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    assert probe(path).frames == 40
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    path.write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(InputError, match=r"fast.mp4: truncated: \d+ bytes of at least \d+"):
        probe(path)


def test_damaged_middle(tmp_path):
    path = write(tmp_path / "in.mp4", moving_frames(40))
    with VideoFile(path) as video:
        video.info = VideoInfo(50, *list(vars(video.info).values())[1:])
        with pytest.raises(InputError, match="ends after 40 frames"):
            list(video)


def test_sound_without_video(tmp_path):
    import wave

    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    with pytest.raises(InputError, match="no video stream; found: audio"):
        probe(tmp_path / "a.wav")


def test_other_containers_are_counted_by_their_packets(tmp_path):
    with video_lib.av.open(str(tmp_path / "in.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for pixels in moving_frames(7):
            frame = video_lib.av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert probe(tmp_path / "in.mkv") == VideoInfo(7, Fraction(25), HEIGHT, WIDTH)


def test_asset():
    info = probe(ASSETS / "clip.mp4")
    assert info.frames >= 49 and info.fps == 24
    frames = read_video(ASSETS / "clip.mp4", 64, 96, 49)
    assert frames.std() > 30 and np.abs(frames[0].astype(int) - frames[-1]).mean() > 5


def test_imports_without_jax():
    code = (
        "import sys, longlive_jax.data.video, longlive_jax.data.video_reader\n"
        "import longlive_jax.files.arrays\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ASSETS.parent)
