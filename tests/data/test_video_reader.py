"""Video files as people have them: containers, times, orientations, names."""

import contextlib
import itertools
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from longlive_jax.data import video_reader
from longlive_jax.data.video_reader import VideoFile, probe, read_video
from longlive_jax.errors import InputError

HEIGHT, WIDTH = 32, 48
CODECS = {"mp4": "libx264", "mkv": "libx264", "ts": "libx264", "webm": "libvpx-vp9", "gif": "gif"}


def numbered(k: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), 20 + 3 * k, np.uint8)


def numbers(frames) -> list[int]:
    return [round((float(f[8:-8, 8:-8].mean()) - 20) / 3) for f in frames]


def write(path, times, codec=None, pictures=None, clock=None, **options):
    """Each picture is shown from its time on, in seconds."""
    codec = codec or CODECS[path.suffix[1:]]
    gif = codec == "gif"
    clock = clock or (Fraction(1, 100) if gif else Fraction(1, 600))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options or {"crf": "2"})
        stream.height, stream.width = HEIGHT, WIDTH
        stream.pix_fmt, stream.codec_context.time_base = "gray" if gif else "yuv420p", clock
        for k, time in enumerate(times):
            picture = numbered(k) if pictures is None else pictures[k]
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts, frame.time_base = round(Fraction(time) / clock), clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def near(got, want):
    assert len(got) == len(want) and max(abs(a - b) for a, b in zip(got, want)) <= 1, (got, want)


@pytest.mark.parametrize("suffix", CODECS)
def test_variable_rates(tmp_path, suffix):
    times = [Fraction(k, 12) for k in range(6)] + [
        Fraction(1, 2) + Fraction(k, 3) for k in range(5)
    ]
    path = write(tmp_path / f"a.{suffix}", times)
    count = len(read_video(path, HEIGHT, WIDTH))
    want = [max(i for i, t in enumerate(times) if t <= Fraction(k, 24) + Fraction(5, 1000))
            for k in range(count)]  # fmt: skip
    assert count >= 45
    near(numbers(read_video(path, HEIGHT, WIDTH)), want)
    assert numbers(read_video(path, HEIGHT, WIDTH, 3, start=6)) == pytest.approx([6] * 3, abs=1)
    assert probe(path).frames == len(times)


@pytest.mark.parametrize("eighth", range(8))
def test_orientations(tmp_path, eighth):
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    picture[: HEIGHT // 2, : WIDTH // 2] = 80
    picture[: HEIGHT // 2, WIDTH // 2 :] = 140
    picture[HEIGHT // 2 :, : WIDTH // 2] = 200
    path = write(tmp_path / "a.mp4", [0, Fraction(1, 24)], pictures=[picture] * 2)
    one = 1 << 16
    swap, x, y = eighth & 1, (-1) ** (eighth >> 1 & 1), (-1) ** (eighth >> 2)
    a, b, c, d = (0, y * one, x * one, 0) if swap else (x * one, 0, 0, y * one)
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    want = picture.transpose(1, 0, 2) if swap else picture
    want = want[::y, ::x]
    info = probe(path)
    assert (info.height, info.width) == want.shape[:2]
    got = read_video(path, *want.shape[:2])[0]
    assert np.abs(got[::4, ::4].astype(int) - want[::4, ::4]).mean() < 6


@pytest.mark.parametrize("name", ["12:30.mp4", "file:x.mp4", "a%03d.mp4", "-i.mp4", "[a]*?.mp4",
                                  "a|b.mp4", "concat:x.mp4", os.fsdecode(b"caf\xe9.mp4"), "a\nb.mp4"])  # fmt: skip
def test_any_name(tmp_path, monkeypatch, name):
    write(tmp_path / "plain.mp4", [0, Fraction(1, 24)])
    os.rename(tmp_path / "plain.mp4", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, name, os.path.join(".", name)):
        assert numbers(read_video(path, HEIGHT, WIDTH)) == [0, 1]


def test_no_other_file_is_opened(tmp_path):
    write(tmp_path / "secret.mp4", [0, Fraction(1, 24)])
    name = str(tmp_path / "secret.mp4")
    lists = {
        "concat": f"ffconcat version 1.0\nfile '{name}'\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n",
        "dash": f'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        f"<Period><AdaptationSet><Representation><BaseURL>{name}</BaseURL></Representation>"
        "</AdaptationSet></Period></MPD>",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n",
    }
    for kind, text in lists.items():
        for suffix in ("mp4", "mkv", "txt"):
            path = tmp_path / f"{kind}.{suffix}"
            path.write_text(text)
            with pytest.raises(InputError, match=f"{kind}.{suffix}: cannot be read as a video"):
                probe(path)


def test_the_default_track_is_read(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=24) for _ in range(2)]
        for stream in streams:
            stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        streams[1].disposition = av.stream.Disposition.default
        streams[0].disposition = av.stream.Disposition.dub
        for k in range(3):
            for number, stream in enumerate(streams):
                picture = numbered(10 * number + k)
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame = frame.reformat(format="yuv420p")
                frame.pts, frame.time_base = k, Fraction(1, 24)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    assert numbers(read_video(path, HEIGHT, WIDTH)) == [10, 11, 12]


@pytest.mark.parametrize("suffix", ["mkv", "webm", "avi", "gif"])
def test_cut_short(tmp_path, monkeypatch, suffix):
    said: list[str] = []
    monkeypatch.setattr(video_reader.logging, "warning", lambda text, *a: said.append(text % a))
    codec = {"avi": "mpeg4"}.get(suffix)
    clock = Fraction(1, 24) if suffix == "avi" else None
    path = write(tmp_path / f"a.{suffix}", [Fraction(k, 24) for k in range(40)], codec, clock=clock,
                 **({"b": "900000"} if codec else {}))  # fmt: skip
    assert len(read_video(path, HEIGHT, WIDTH)) >= 39 and not said
    data = path.read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: len(data) * 2 // 3])
    try:
        read_video(tmp_path / f"cut.{suffix}", HEIGHT, WIDTH)
    except InputError as error:
        assert f"cut.{suffix}: " in str(error)
    else:
        assert said and f"cut.{suffix}: is cut short" in said[0] and "% is missing" in said[0]


@pytest.mark.parametrize(
    "rate, message", [("1:100000000", "frames a second"), ("100000000:1", "frames a second"),
                      ("1:59", None), ("1000:1", None)],
)  # fmt: skip
def test_rates_that_no_clip_has(tmp_path, rate, message):
    path = tmp_path / "a.y4m"
    frames = (b"FRAME\n" + bytes(384)) * 3
    path.write_bytes(f"YUV4MPEG2 W16 H16 F{rate}\n".encode() + frames)
    if message is None:
        assert probe(path).frames == 3
        return
    with pytest.raises(InputError, match=message):
        probe(path)


def test_too_many_pixels(tmp_path):
    path = tmp_path / "a.y4m"
    path.write_bytes(b"YUV4MPEG2 W16384 H16384 F24:1\nFRAME\n" + bytes(100))
    with pytest.raises(InputError):
        probe(path)


OPEN = "open-gop=1:keyint=24:min-keyint=24:bframes=3:b-adapt=0:scenecut=0"
LEADING = {
    "libx264": {"x264-params": OPEN, "crf": "4"},
    "libx265": {"x265-params": f"{OPEN}:log-level=none", "crf": "4"},
    "mpeg2video": {"bf": "2", "g": "24", "b": "3000000"},
    "libvpx": {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "800000", "g": "24"},
}


@pytest.mark.parametrize(
    "codec, suffix",
    [*itertools.product(["libx264", "libx265", "mpeg2video"], ["mkv", "ts", "mp4"]),
     ("libvpx", "mkv")],
)  # fmt: skip
def test_pictures_that_are_never_shown(tmp_path, codec, suffix):
    """A recording that was cut at a key frame, without encoding it anew."""
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream(codec, rate=24, options=LEADING[codec])
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        for k in range(72):
            picture = np.full((64, 96, 3), 20 + 3 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = k, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream, keys, start = source.streams.video[0], 0, None
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            keys += packet.is_keyframe
            if packet.size and keys > 1:
                start = packet.dts or packet.pts if start is None else start
                packet.pts -= start
                packet.dts = None if packet.dts is None else packet.dts - start
                packet.stream = copy
                target.mux(packet)
    for path in (whole, cut):
        with av.open(str(path)) as container:
            shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        got = read_video(path, 64, 96)
        assert probe(path).frames == len(shown) and probe(path).fps == 24
        near(numbers(got), numbers(shown))


@pytest.mark.parametrize("pixels, threads", [(2**40, 16), (3 * HEIGHT * WIDTH, 3), (1, 1)])
def test_threads_hold_a_bounded_number_of_pixels(tmp_path, monkeypatch, pixels, threads):
    path = write(tmp_path / "a.mp4", [0, 1 / 24, 2 / 24])
    monkeypatch.setattr(video_reader, "_PIXELS_AT_WORK", pixels)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    counts, opened = [], video_reader._opened

    @contextlib.contextmanager
    def watched(path):
        with opened(path) as (container, stream):
            try:
                yield container, stream
            finally:
                counts.append(stream.codec_context.thread_count)

    monkeypatch.setattr(video_reader, "_opened", watched)
    with VideoFile(path) as video:
        near(numbers(video), [0, 1, 2])
    assert counts[-1] == threads
