"""Video of high dynamic range comes out in BT.709, with reference white near white."""

from fractions import Fraction

import av
import numpy as np
import pytest

from longlive_jax.data import hdr, video_reader
from longlive_jax.data.video_reader import VideoFile, read_video

PQ, HLG, BT2020, P3, BT709 = 16, 18, 9, 12, 1
HEIGHT, WIDTH = 64, 96


def code(light):
    """BT.709's code of light up to the knee, by BT.1886."""
    return 255 * light ** (1 / 2.4)


def pq(nits):
    """The signal of so many cd/m2, by the inverse of ST 2084."""
    power = (np.asarray(nits) / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(nits):
    """The signal of grey of so many cd/m2 on a screen of 1,000, by BT.2100."""
    scene = (np.asarray(nits) / 1000) ** (1 / 1.2)
    log = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), log)


def convert(signal, transfer, primaries=BT2020):
    codes = np.rint(65535 * np.asarray(signal, np.float64)).astype(np.uint16)
    return hdr.to_bt709(np.broadcast_to(codes, (2, 3, 3)).copy(), transfer, primaries)[1, 2]


@pytest.mark.parametrize("transfer, signal", [(PQ, pq), (HLG, hlg)])
def test_grey_keeps_its_light_up_to_white(transfer, signal):
    for nits in (0.5, 2, 26, 100, 160):
        assert np.abs(convert([signal(nits)] * 3, transfer) - code(nits / 203)).max() <= 1, nits
    assert convert([0] * 3, transfer).tolist() == [0, 0, 0]
    white = convert([signal(203)] * 3, transfer)
    assert 240 <= white.min() == white.max() <= 250
    assert convert([signal(1000)] * 3, transfer).tolist() == [255] * 3
    grey = np.linspace(0, 1, 500)
    codes = hdr.to_bt709(
        np.rint(65535 * grey)[None, :, None].repeat(3, 2).astype(np.uint16), transfer, BT2020
    )
    assert (np.diff(codes[0, :, 0].astype(int)) >= 0).all() and np.ptp(codes, axis=2).max() <= 1


def test_the_reference_points_of_bt_2408():
    assert pq(203) == pytest.approx(0.5807, abs=1e-4) and hlg(203) == pytest.approx(0.75, abs=1e-3)


# Linear BT.709 colours in BT.2020's primaries, by BT.2087's matrix.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
COLOURS = [(0.5, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.7), (0.5, 0.25, 0.1), (0.1, 0.3, 0.6)]


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_those_of_bt_709(colour):
    signal = pq(203 * TO_2020 @ np.array(colour))
    near = code(np.array(colour))
    assert (
        np.abs(convert(signal, PQ) - near).max() <= 6
        and np.abs(convert(signal, PQ) - near)[near > 0].max() <= 1
    )
    assert np.abs(convert(pq(203 * np.array(colour)), PQ, BT709) - near).max() <= 1
    wide = convert(pq(203 * np.array(colour)), PQ).astype(int)  # more saturated than BT.709 has
    assert wide.argmax() == np.argmax(colour)


def test_p3_is_between():
    red = [
        convert(pq(203 * np.array([0.5, 0.1, 0.1])), PQ, p).astype(int) for p in (BT709, P3, BT2020)
    ]
    spread = [r[0] - r[1] for r in red]
    assert spread[0] < spread[1] < spread[2]


def test_bright_colours_keep_their_hue():
    dim, bright = (convert(pq(203 * s * TO_2020 @ np.array([0.4, 0.2, 0.1])), PQ) for s in (1, 4))
    ratio = [(c[1:] / c[0]) ** 2.4 for c in (dim, bright)]
    np.testing.assert_allclose(ratio[0], ratio[1], atol=0.03)
    assert bright[0] > dim[0]


# Files.


def write(path, planes, transfer, primaries=BT2020, codec="libx265", frames=3, depth=10):
    """Frames of one colour, Y, Cb and Cr as they are stored."""
    lossless = {"libx265": {"x265-params": "lossless=1:log-level=none"}}
    kind = "yuv420p10le" if depth == 10 else "yuv420p"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=lossless.get(codec, {"crf": "1"}))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, kind
        context = stream.codec_context
        context.colorspace, context.color_primaries = primaries, primaries
        context.color_trc, context.color_range = transfer, 1
        for k in range(frames):
            frame = av.VideoFrame(WIDTH, HEIGHT, kind)
            for plane, value in zip(frame.planes, planes):
                size, dtype = (
                    (plane.buffer_size // 2, "<u2") if depth == 10 else (plane.buffer_size, "u1")
                )
                plane.update(np.full(size, round(value), dtype).tobytes())
            frame.colorspace, frame.color_range = primaries, 1
            frame.pts, frame.time_base = k, Fraction(1, 24)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def stored(rgb):
    """Y, Cb and Cr of 10 bits, limited range, of a signal; BT.2020's, not constant luminance."""
    r, g, b = rgb
    y = 0.2627 * r + 0.6780 * g + 0.0593 * b
    return 64 + 876 * y, 512 + 896 * (b - y) / 1.8814, 512 + 896 * (r - y) / 1.4746


@pytest.mark.parametrize(
    "suffix, codec", [("mp4", "libx265"), ("mkv", "libx265"), ("ts", "libx265"), ("mkv", "libx264")]
)
@pytest.mark.parametrize("transfer, signal", [(PQ, pq), (HLG, hlg)], ids=["PQ", "HLG"])
def test_white_of_a_file_is_white(tmp_path, monkeypatch, suffix, codec, transfer, signal):
    said = []
    monkeypatch.setattr(video_reader.logging, "warning", lambda text, *a: said.append(text % a))
    path = write(tmp_path / f"a.{suffix}", stored([signal(203)] * 3), transfer, codec=codec)
    found = read_video(path, HEIGHT // 2, WIDTH // 2)
    assert found.shape == (3, HEIGHT // 2, WIDTH // 2, 3) and not said
    assert found.min() >= 242 and found.max() <= 250
    with VideoFile(path) as video:
        assert np.abs(next(iter(video)).astype(int) - 246).max() <= 3


@pytest.mark.parametrize("transfer, signal", [(PQ, pq), (HLG, hlg)], ids=["PQ", "HLG"])
def test_grey_and_colours_of_a_file(tmp_path, transfer, signal):
    path = write(tmp_path / "grey.mp4", stored([signal(26)] * 3), transfer)
    assert np.abs(read_video(path, HEIGHT, WIDTH).astype(int) - code(26 / 203)).max() <= 2
    if transfer == PQ:
        colour = np.array([0.5, 0.25, 0.1])
        path = write(tmp_path / "colour.mp4", stored(pq(203 * TO_2020 @ colour)), PQ)
        assert np.abs(read_video(path, HEIGHT, WIDTH).astype(int) - code(colour)).max() <= 3


@pytest.mark.parametrize(
    "transfer, primaries, depth", [(1, 1, 8), (2, 2, 8), (14, 9, 10), (1, 1, 10)]
)
def test_video_that_is_not_hdr_is_read_as_before(tmp_path, transfer, primaries, depth):
    scale = 4 if depth == 10 else 1
    planes = [scale * value for value in (120, 100, 150)]
    path = write(tmp_path / "a.mp4", planes, transfer, primaries, "libx265", depth=depth)
    with av.open(str(path)) as container:
        plain = [
            frame.reformat(format="rgb24", interpolation=video_reader._TO_RGB).to_ndarray()
            for frame in container.decode(video=0)
        ]
    np.testing.assert_array_equal(read_video(path, HEIGHT, WIDTH), plain)
