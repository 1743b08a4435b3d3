"""What photographs hold beside plain 8-bit sRGB."""

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, ImageCms, TiffImagePlugin

from longlive_jax.data import images as images_lib
from longlive_jax.data import photographs
from longlive_jax.data.images import read_image
from longlive_jax.errors import InputError

RAMP = np.linspace(0, 65535, 64).round().astype(np.uint16)
SCAN = np.stack([RAMP] * 32)


def warned(monkeypatch) -> list[str]:
    said: list[str] = []
    for module in (photographs, images_lib):
        monkeypatch.setattr(module.logging, "warning", lambda text, *args: said.append(text % args))
    return said


def profile(red: tuple[float, float, float] = (0.51512, 0.24120, -0.00105)) -> bytes:
    """A profile with Display P3's primaries and gamma 2.2; sRGB's own with its red."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(65536 * v)) for v in values)

    white = (0.9642, 1, 0.82491)
    curve = b"para" + struct.pack(">IHH", 0, 0, 0) + fixed(2.2)
    tags = {
        b"desc": b"desc" + struct.pack(">II", 0, 3) + b"P3\0" + bytes(79),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + fixed(*white),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(*red),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.29198, 0.69225, 0.04189),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.15710, 0.06657, 0.78407),
    }
    tags |= {key: curve for key in (b"rTRC", b"gTRC", b"bTRC")}
    table, body = struct.pack(">I", len(tags)), b""
    for key, value in tags.items():
        value += bytes(-len(value) % 4)
        table += key + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(value))
        body += value
    head = struct.pack(">III", 128 + len(table + body), 0, 0x02400000) + b"mntrRGB XYZ "
    head += bytes(12) + b"acsp" + bytes(28) + fixed(*white) + bytes(48)
    return head + table + body


COLOUR = (200, 80, 60)


def in_srgb(colour=COLOUR, source=None) -> np.ndarray:
    source = ImageCms.ImageCmsProfile(io.BytesIO(source or profile()))
    image = Image.new("RGB", (1, 1), colour)
    done = ImageCms.profileToProfile(
        image, source, ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
    )
    return np.asarray(done)[0, 0].astype(int)


@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp", "avif", "rgba", "palette", "keyed"])
def test_colours_by_the_profile(tmp_path, kind):
    icc, path = profile(), tmp_path / "a.png"
    image = Image.new("RGB", (32, 32), COLOUR)
    if kind == "rgba":
        image.putalpha(255)
    if kind == "palette":
        image = image.quantize(8)
    more = {"transparency": (1, 2, 3)} if kind == "keyed" else {}
    if kind in ("jpg", "tif", "webp", "avif"):
        path = path.with_suffix(f".{kind}")
        more = {} if kind == "tif" else {"quality": 100}
    image.save(path, icc_profile=icc, **more)
    got = read_image(path, 32, 32)[16, 16].astype(int)
    assert np.abs(got - in_srgb()).max() <= (3 if kind != "avif" else 5)
    assert np.abs(got - COLOUR).max() > 10  # it is another colour


def test_profiles_that_pillow_does_not_read(tmp_path):
    icc = profile()
    Image.new("RGB", (8, 8), COLOUR).save(tmp_path / "plain.bmp")
    pixels = (tmp_path / "plain.bmp").read_bytes()[54:]
    info = struct.pack("<IiiHHIIiiII", 124, 8, 8, 1, 24, 0, len(pixels), 0, 0, 0, 0)
    info += (
        bytes(16)
        + b"DEBM"
        + bytes(36 + 12)
        + struct.pack("<IIII", 4, 124 + len(pixels), len(icc), 0)
    )
    assert len(info) == 124
    head = struct.pack("<2sIHHI", b"BM", 138 + len(pixels) + len(icc), 0, 0, 138)
    (tmp_path / "a.bmp").write_bytes(head + info + pixels + icc)
    Image.new("RGB", (8, 8), COLOUR).quantize(4).save(tmp_path / "plain.gif")
    data = (tmp_path / "plain.gif").read_bytes()
    at = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    blocks = b"".join(
        bytes([len(p)]) + p for p in (icc[i : i + 255] for i in range(0, len(icc), 255))
    )
    data = data[:at] + b"\x21\xff\x0bICCRGBG1012" + blocks + b"\0" + data[at:]
    (tmp_path / "a.gif").write_bytes(data)
    for name in ("a.bmp", "a.gif"):
        got = read_image(tmp_path / name, 8, 8)[4, 4].astype(int)
        assert np.abs(got - in_srgb()).max() <= 3, name


def test_transparency_stays_with_a_profile(tmp_path):
    image = Image.new("RGBA", (8, 8), (*COLOUR, 255))
    image.paste((255, 255, 255, 0), (0, 0, 4, 8))
    image.save(tmp_path / "a.png", icc_profile=profile())
    got = read_image(tmp_path / "a.png", 8, 8).astype(int)
    assert (got[:, :4] == 0).all() and np.abs(got[4, 6] - in_srgb()).max() <= 3


def test_srgb_profiles_change_nothing(tmp_path, monkeypatch):
    said = warned(monkeypatch)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=srgb)
    assert (read_image(tmp_path / "a.png", 16, 16) == pixels).all() and not said


@pytest.mark.parametrize("bad", ["empty", "text", "cut", "gray"])
def test_a_damaged_profile_is_no_reason_to_refuse(tmp_path, monkeypatch, bad):
    said, icc = warned(monkeypatch), profile()
    icc = {"empty": b"\0", "text": b"no profile" * 20, "cut": icc[:200]}.get(
        bad, icc.replace(b"mntrRGB ", b"mntrGRAY")
    )
    for kind in ("png", "jpg", "webp", "tif"):
        path = tmp_path / f"a.{kind}"
        Image.new("RGB", (8, 8), COLOUR).save(path, icc_profile=icc)
        assert np.abs(read_image(path, 8, 8).astype(int) - COLOUR).max() < 8
        assert f"a.{kind}: its colour profile" in said.pop()


def pgm(path, values, most=65535, kind="P5"):
    path.write_bytes(
        f"{kind} {values.shape[1]} {values.shape[0]} {most}\n".encode()
        + values.astype(">u2").tobytes()
    )


def tiff(path, values, **tags):
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[int(tag[1:])] = value
    Image.fromarray(values).save(path, tiffinfo=info)


@pytest.mark.parametrize("kind", ["pgm", "pgm10", "png", "tif", "tif_big", "inverted", "jp2"])
def test_sixteen_bits(tmp_path, kind):
    path = tmp_path / f"a.{kind[:3]}"
    if kind == "pgm":
        pgm(path, SCAN)
    elif kind == "pgm10":
        pgm(path, SCAN >> 6, 1023)
    elif kind == "inverted":
        path = tmp_path / "a.tif"
        tiff(path, 65535 - SCAN)
        data = path.read_bytes()
        tag = struct.pack("<HHIH", 262, 3, 1, 1)
        assert data.count(tag) == 1
        path.write_bytes(data.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0)))
    elif kind == "tif_big":
        Image.frombytes("I;16B", (64, 32), SCAN.astype(">u2").tobytes()).save(path)
    else:
        Image.fromarray(SCAN).save(path, **({"irreversible": False} if kind == "jp2" else {}))
    got = read_image(path, 32, 64)[5, :, 0].astype(int)
    assert np.abs(got - RAMP / 257).max() <= 2


@pytest.mark.parametrize("kind", ["pfm", "float", "signed", "wide"])
def test_samples_without_a_white_are_refused(tmp_path, kind):
    path = tmp_path / "a.tif"
    values = SCAN / np.float32(65535)
    if kind == "pfm":
        path.write_bytes(b"Pf 64 32\n-1.0\n" + values.astype("<f4").tobytes())
    else:
        dtype = {"float": np.float32, "signed": np.int32, "wide": np.int32}[kind]
        tiff(path, (values * 1000).astype(dtype))
    with pytest.raises(InputError, match="does not say which is white; save it with 8 or 16 bits"):
        read_image(path, 32, 64)


def test_an_eps_never_starts_ghostscript(tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("was started"))
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    dos = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(text)) + bytes(20) + text
    for name, data in [("a.png", text), ("a.jpg", dos), ("a.eps", text), ("a", text)]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=f"{name}: not an image"):
            read_image(tmp_path / name, 32, 64)


@pytest.mark.parametrize(
    "plugin", ["EPS", "FPX", "MIC", "WMF", "PDF", "GRIB", "HDF5", "BUFR", "MPEG"]
)
def test_decoders_that_are_not_needed_are_not_used(plugin):
    assert plugin not in photographs.FORMATS


def test_too_many_pixels(tmp_path):
    for size in [(100_000, 100_000), (2**27 + 1, 1)]:
        head = f"P5 {size[0]} {size[1]} 255\n".encode()
        (tmp_path / "a.pgm").write_bytes(head + bytes(100))
        with pytest.raises(InputError, match=r"limit|exceeds"):
            read_image(tmp_path / "a.pgm", 8, 8)


@pytest.mark.parametrize("ending", ["jp2", "webp", "avif"])
def test_formats_whose_decoders_take_more(tmp_path, monkeypatch, ending):
    path = tmp_path / f"a.{ending}"
    Image.new("RGB", (64, 48)).save(path)
    monkeypatch.setattr(photographs, "_HEAVY", {"JPEG2000": 3071, "WEBP": 3071, "AVIF": 3071})
    with pytest.raises(InputError, match="48x64 pixels, the limit is 3071"):
        read_image(path, 8, 8)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "L", "1", "CMYK"])
@pytest.mark.parametrize("coloured", [True, False], ids=["profile", "no profile"])
def test_pictures_are_converted_some_rows_at_a_time(tmp_path, monkeypatch, mode, coloured):
    draw = np.random.default_rng(0)
    picture = Image.fromarray(draw.integers(0, 256, (37, 23, 3), np.uint8)).convert(mode)
    if mode in ("RGBA", "LA"):
        picture.putalpha(Image.fromarray(draw.integers(0, 256, (37, 23), np.uint8)))
    options = {"icc_profile": profile()} if coloured else {}
    options |= {"transparency": 3} if mode == "P" else {}
    exif = Image.Exif()
    for turn in (1, 5, 6):
        exif[274] = turn
        path = tmp_path / f"{turn}.{'tiff' if mode == 'CMYK' else 'png'}"
        picture.save(path, exif=exif, **options)
        found = []
        for rows in (5, 37):
            monkeypatch.setattr(photographs, "_ROWS", rows)
            found.append(np.asarray(photographs.read(path)))
        assert np.array_equal(*found) and found[0].std() > 10
        assert found[0].shape == ((37, 23, 3) if turn == 1 else (23, 37, 3))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB", "I;16"])
@pytest.mark.parametrize("packed", [None, "tiff_lzw"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_tiffs(tmp_path, mode, packed, turn):
    values = np.random.default_rng(0).integers(0, 256, (37, 23), np.uint8)
    wide = mode == "I;16"
    picture = Image.fromarray(values.astype(np.uint16) * 257 if wide else values)
    picture = picture if wide else picture.convert(mode)
    picture.save(tmp_path / "a.tiff", compression=packed, tiffinfo={274: turn})
    picture = Image.fromarray(values)
    want = picture if turn == 1 else picture.transpose(photographs._TURNS[turn])
    assert np.array_equal(np.asarray(photographs.read(tmp_path / "a.tiff"))[..., 0], want)


_MEASURE = """
import re, sys
from longlive_jax.data.images import read_image
def most(): return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
read_image(sys.argv[2], 8, 8)
before = most()
read_image(sys.argv[1], 8, 8)
print(most() - before)
"""


def test_memory_of_the_worst_picture(tmp_path):
    size, exif = 3072, Image.Exif()
    exif[274] = 6
    for name, side in (("large", size), ("small", 8)):
        picture = Image.new("RGBA", (side, side), (200, 80, 60, 100))
        picture.save(tmp_path / f"{name}.png", exif=exif, icc_profile=profile(), compress_level=1)
    files = (str(tmp_path / f"{name}.png") for name in ("large", "small"))
    done = subprocess.run([sys.executable, "-c", _MEASURE, *files], capture_output=True, check=True)
    # Four bytes a pixel twice, and a few rows. At MAX_PIXELS that is 1.1 GB.
    assert int(done.stdout) * 1024 < 10 * size * size


def test_image_fit(tmp_path, monkeypatch):
    said = warned(monkeypatch)
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = 200
    path = tmp_path / "wide.png"
    Image.fromarray(picture).save(path)
    crop, pad = read_image(path, 40, 40, "crop"), read_image(path, 40, 40, "pad")
    assert (crop == 200).all() and not said
    assert (pad[:13] == 0).all() and (pad[-13:] == 0).all() and pad[20, 20, 0] == 200
    Image.fromarray(picture.transpose(1, 0, 2)).save(tmp_path / "high.png")
    assert (read_image(tmp_path / "high.png", 40, 40, "crop") == 200).all()
    assert (read_image(tmp_path / "high.png", 40, 40, "pad")[:, :13] == 0).all()
    for _ in range(2):
        read_image(path, 40, 40)
    assert len(said) == 1 and "wide.png: 40x120 pixels are stretched to 40x40" in said[0]
    for fit in images_lib.FITS:  # of the same proportions all are the same, and nothing is said
        np.testing.assert_array_equal(read_image(path, 40, 120, fit), picture)
    assert len(said) == 1
