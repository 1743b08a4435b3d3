"""Photographs in: files of a few formats as 8 bits a sample in sRGB, upright."""

import functools
import io
import os
import pathlib
import warnings
from typing import Any

import numpy as np
from absl import logging
from PIL import Image, ImageCms, UnidentifiedImageError

from longlive_jax.errors import InputError

# Pillow's names of what is read. The others are not needed, and some of them start programs
# (EPS: Ghostscript) or hand the file to the system.
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "JPEG2000", "PPM", "TGA",
    "QOI", "SGI", "PCX", "ICO", "PSD",
)  # fmt: skip
MAX_PIXELS = 2**27  # a camera of 134 megapixels; as RGB, and as it was before, it takes a gigabyte
# Their decoders need as much again; of JPEG 2000 four bytes for each sample as well.
_HEAVY = {"JPEG2000": 2**25, "WEBP": 2**26, "AVIF": 2**26}
_ROWS = 64  # that are converted together
_SAME = 1  # levels by which colours may change before a profile counts as another one than sRGB
# What a file with more than 8 bits may hold in Pillow's mode "I": 16 bits without a sign.
_SIXTEEN = ("PNG", "PPM", "JPEG2000")
_BITS, _POLARITY, _SAMPLES = 258, 262, 339  # tags of a TIFF
_ORIENTATION = 274  # of EXIF; what its values stand for
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
_WAY_OUT = "save it with 8 or 16 bits a sample"


def read(path: str | os.PathLike) -> Image.Image:
    """A photograph of mode RGB, upright (EXIF), in sRGB by its profile; black where transparent.

    Raises:
      InputError: the file is missing, damaged, not an image of FORMATS, over MAX_PIXELS, or of
        samples whose brightness it does not tell.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        what = "is a folder, not an image" if path.is_dir() else "no such file"
        raise InputError(f"{path}: {what}")
    try:
        # Our own limit says more than Pillow's warning. It maps a TIFF that it has the name of, and
        # then takes the sides of one that is to be turned for each other.
        with (
            warnings.catch_warnings(),
            path.open("rb") as file,
            Image.open(file, formats=_formats()) as image,
        ):
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return _read(path, image)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        size = path.stat().st_size
        what = f"{size} bytes that no image format starts with" if size else "the file is empty"
        if _head(path) in (b"II*\0", b"MM\0*"):
            what = f"a TIFF whose samples are of a kind that is not read; {_WAY_OUT}"
        raise InputError(f"{path}: not an image: {what}; read are {', '.join(FORMATS)}") from error
    # PIL raises SyntaxError, struct.error and others for damaged files, by format.
    except Exception as error:
        raise InputError(f"{path}: cannot be read as an image: {error}") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """FORMATS that this build of Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _head(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)


def _read(path: pathlib.Path, image: Image.Image) -> Image.Image:
    width, height = image.size
    limit = min(MAX_PIXELS, _HEAVY.get(image.format or "", MAX_PIXELS))
    if width * height > limit:
        raise InputError(
            f"{path}: {height}x{width} pixels, the limit is {limit} pixels; scale it down"
        )
    profile, kind = image.info.get("icc_profile"), image.format
    profile = profile or _profile(path, kind)
    bits, dark = _samples(path, image)
    image.load()  # a TIFF turns here, and has another size then
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    width, height = image.size
    first = image.crop((0, 0, width, 1))
    first = _eight_bits(first, bits, dark) if bits else first
    transform = _to_srgb(path, first, profile) if profile else None
    if image.mode == "RGB" and transform is None and not _transparent(image):
        return image if turn is None else image.transpose(turn)
    # Of the steps on the way only some rows are ever in memory.
    out = Image.new("RGB", image.size)
    for top in range(0, height, _ROWS):
        rows = image.crop((0, top, width, min(top + _ROWS, height)))
        rows = _eight_bits(rows, bits, dark) if bits else rows
        if transform is not None:
            rows = _transformed(rows, *transform)
        if _transparent(rows):
            rows = rows.convert("RGBA")
            rows = Image.alpha_composite(Image.new("RGBA", rows.size, "black"), rows)
        out.paste(rows.convert("RGB"), (0, top))
    image.close()
    return out if turn is None else out.transpose(turn)


# More than 8 bits a sample.


def _samples(path: pathlib.Path, image: Image.Image) -> tuple[int, bool]:
    """(bits of its integers, whether 0 is white) of a gray image that Pillow keeps wide, else 0."""
    tags = getattr(image, "tag_v2", {}) if image.format in ("TIFF", "MPO") else {}
    if image.mode == "F":
        raise InputError(
            f"{path}: holds floating-point samples, and does not say which is white; {_WAY_OUT}"
        )
    if image.mode.startswith("I;16"):
        return int((tags.get(_BITS) or (16,))[0]), tags.get(_POLARITY) == 0
    if image.mode == "I":
        if image.format not in _SIXTEEN:
            bits, signed = (tags.get(_BITS) or (32,))[0], (tags.get(_SAMPLES) or (1,))[0] == 2
            raise InputError(
                f"{path}: holds integers of {bits} bits{' with a sign' * signed} as samples, and "
                f"does not say which is white; {_WAY_OUT}"
            )
        return 16, False
    return 0, False


def _eight_bits(image: Image.Image, bits: int, dark: bool) -> Image.Image:
    """PIL's own conversion clips to 255. The highest 8 bits are kept."""
    values = np.asarray(image).astype(np.int64 if image.mode == "I" else np.uint16)
    values = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - values if dark else values)


# Colour profiles.


def _to_srgb(
    path: pathlib.Path, image: Image.Image, profile: bytes
) -> tuple[ImageCms.ImageCmsTransform, str] | None:
    """The way from a profile to sRGB, and the profile's colour space.

    None where that is sRGB itself, damaged, or for other channels than those of the image.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described: Any = source.profile
        space = described.xcolor_space.strip()
        colours = _channels(image, space)
        transform = ImageCms.buildTransform(
            source, ImageCms.createProfile("sRGB"), colours.mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        if not _changes(transform, colours.mode):
            return None
        _transformed(image, transform, space)
        return transform, space
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, AttributeError) as error:
        logging.warning(
            "%s: its colour profile is damaged or does not fit (%s); read as sRGB", path, error
        )
        return None


def _transformed(
    image: Image.Image, transform: ImageCms.ImageCmsTransform, space: str
) -> Image.Image:
    done = ImageCms.applyTransform(_channels(image, space), transform)
    assert done is not None
    if _transparent(image):
        done.putalpha(image.convert("RGBA").getchannel("A"))
    return done


def _transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info


def _channels(image: Image.Image, space: str) -> Image.Image:
    """The image without alpha, in a mode of the colour space that its profile is for."""
    gray = image.mode in ("1", "L", "LA", "La")
    if space == "GRAY" and gray:
        return image.convert("L")
    if space == "RGB" and image.mode not in ("CMYK", "LAB"):
        return (image.convert("RGBA") if _transparent(image) else image).convert("RGB")
    if space == image.mode:
        return image
    raise ValueError(f"it is for {space}, the image is {image.mode}")


def _changes(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours differ from sRGB by more than rounding."""
    if mode not in ("RGB", "L"):
        return True
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "RGB":
        grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    else:
        grid = levels[None]
    done = ImageCms.applyTransform(Image.fromarray(grid), transform)
    assert done is not None
    want = grid if mode == "RGB" else grid[..., None]
    return bool(np.abs(np.asarray(done).astype(int) - want).max() > _SAME)


def _profile(path: pathlib.Path, kind: str | None) -> bytes | None:
    """The profile in a file of a format whose profiles Pillow does not read."""
    if kind not in ("BMP", "JPEG2000", "GIF"):
        return None
    with path.open("rb") as file:
        data = file.read(1 << 22)  # it is in the head; of a BMP at the end
        if kind == "BMP":
            return _bmp_profile(file, data)
    if kind == "GIF":
        at = data.find(b"\x21\xff\x0bICCRGBG1012")
        return _blocks(data, at + 14) if at >= 0 else None
    at = data.find(b"colr\x02") if data[4:8] == b"jP  " else -1
    return data[at + 7 : at - 4 + int.from_bytes(data[at - 4 : at])] if at >= 4 else None


def _bmp_profile(file, data: bytes) -> bytes | None:
    header = int.from_bytes(data[14:18], "little")
    if header < 124 or data[70:74] != b"DEBM":  # "MBED", little-endian: embedded
        return None
    offset, size = (int.from_bytes(data[i : i + 4], "little") for i in (126, 130))
    file.seek(14 + offset)
    return file.read(min(size, 1 << 24))


def _blocks(data: bytes, at: int) -> bytes:
    found = b""
    while at < len(data) and data[at]:
        found += data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
    return found
