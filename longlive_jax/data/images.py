"""Photographs in; contact sheets out."""

import functools
import math
import os
from collections.abc import Sequence

import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFont

from longlive_jax.data import photographs
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path

# PIL widens these filters when it shrinks an image, which is what "antialiased" means. Each is the
# original's choice for its kind: triangle for photographs (torchvision's antialiased bilinear),
# cubic for video (swscale's default, which decord uses).
PHOTO_FILTER = Image.Resampling.BILINEAR
VIDEO_FILTER = Image.Resampling.BICUBIC

FITS = ("stretch", "crop", "pad")
_VISIBLE = 0.01  # change of proportions that is worth a word
_CAPTION_HEIGHT = 14
_GAP = 2


def to_float(frames: np.ndarray) -> np.ndarray:
    """uint8 in 0..255 -> float32 in [-1, 1], of the same shape: the VAE's input."""
    if frames.dtype != np.uint8:
        raise InputError(f"to_float: frames are {frames.dtype}, must be uint8")
    return frames.astype(np.float32) / np.float32(127.5) - np.float32(1)


def resize(image: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    """Stretches uint8 [h, w, 3] to [height, width, 3], antialiased. The same size is a no-op."""
    if image.shape[:2] == (height, width):
        return image
    return np.asarray(Image.fromarray(image).resize((width, height), resample))


def read_image(
    path: str | os.PathLike, height: int, width: int, fit: str = "stretch"
) -> np.ndarray:
    """A photograph as uint8 [height, width, 3], upright (EXIF), in sRGB by its colour profile.

    Transparent parts are black.

    Args:
      fit: of FITS: one of other proportions is stretched, and a warning says so; or cut to the
        middle; or has black bars.

    Raises:
      InputError: the file is missing, damaged, not an image, or too large.
    """
    image = photographs.read(path)
    ratio = image.width * height / (image.height * width)
    if fit == "stretch":
        if abs(ratio - 1) > _VISIBLE:
            _warn_stretched(str(path), image.size, (height, width))
        return _resized(image, height, width)
    if fit == "crop":
        w, h = min(image.width, image.width / ratio), min(image.height, image.height * ratio)
        x, y = (image.width - w) / 2, (image.height - h) / 2
        return np.asarray(image.resize((width, height), PHOTO_FILTER, (x, y, x + w, y + h)))
    w, h = max(1, round(width * min(1, ratio))), max(1, round(height * min(1, 1 / ratio)))
    out = np.zeros((height, width, 3), np.uint8)
    x, y = (width - w) // 2, (height - h) // 2
    out[y : y + h, x : x + w] = _resized(image, h, w)
    return out


def _resized(image: Image.Image, height: int, width: int) -> np.ndarray:
    """`resize` of a photograph, of which no second copy is made."""
    same = image.size == (width, height)
    return np.asarray(image if same else image.resize((width, height), PHOTO_FILTER))


@functools.cache  # once a file
def _warn_stretched(path: str, size: tuple[int, int], to: tuple[int, int]) -> None:
    logging.warning(
        "%s: %dx%d pixels are stretched to %dx%d, of other proportions; --config.sample.image_fit="
        "crop or pad keeps them",
        path, size[1], size[0], *to,
    )  # fmt: skip


def contact_sheet(
    path: str | os.PathLike,
    frames: Sequence[np.ndarray] | np.ndarray,
    columns: int,
    labels: Sequence[str] | None = None,
) -> None:
    """Writes a PNG grid of frames, row by row, each with its label under it if there are labels.

    Cells are 2 pixels apart on black; a row of labels takes 14 pixels.

    Args:
      frames: uint8 [height, width, 3] each, all of one size; at least one.

    Raises:
      InputError: no frames, frames of several sizes, too few or too many labels, or an unwritable
        path.
      OSError: ENOSPC, naming `path`.
    """
    if len(frames) == 0:
        raise InputError(f"{path}: a contact sheet needs at least one frame")
    if columns < 1:
        raise InputError(f"{path}: columns={columns} must be at least 1")
    if labels is not None and len(labels) != len(frames):
        raise InputError(f"{path}: {len(labels)} labels for {len(frames)} frames")
    frames = [np.asarray(frame) for frame in frames]
    kinds = {f"{frame.dtype}{list(frame.shape)}" for frame in frames}
    first = frames[0]
    if len(kinds) > 1 or first.dtype != np.uint8 or first.ndim != 3 or first.shape[2] != 3:
        raise InputError(
            f"{path}: frames must all be uint8 [height, width, 3] of one size, not {sorted(kinds)}"
        )
    height, width, _ = first.shape
    columns = min(columns, len(frames))
    step_y = height + _GAP + (_CAPTION_HEIGHT if labels is not None else 0)
    step_x = width + _GAP
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (columns * step_x - _GAP, rows * step_y - _GAP))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, frame in enumerate(frames):
        x, y = i % columns * step_x, i // columns * step_y
        sheet.paste(Image.fromarray(np.ascontiguousarray(frame)), (x, y))
        if labels is not None:
            draw.text((x + 2, y + height), _fit(labels[i], font, width - 4), "white", font)
    with atomic_path(path) as partial:
        sheet.save(partial, format="PNG")


class ContactSheet:
    """Collects thumbnails of a video of any length in bounded memory.

    Keeps every `every`-th frame, counted from the first; when there are more than `max_cells`,
    every second one is dropped and `every` doubles.

    Args:
      every: frames between two thumbnails, at first.
      width: pixels of a thumbnail; its height follows from the frames.
      fps: for the labels, which give the time of each thumbnail in seconds.
    """

    def __init__(self, every: int = 24, max_cells: int = 64, width: int = 192, fps: float = 24):
        if min(every, max_cells, width) < 1:
            raise InputError(f"ContactSheet: {every=}, {max_cells=}, {width=} must be at least 1")
        self.every, self.max_cells, self.width, self.fps = every, max_cells, width, fps
        self.frames_seen = 0
        self._cells: list[tuple[int, np.ndarray]] = []

    def add(self, frames: np.ndarray) -> None:
        """Takes the next frames of the video, uint8 [frame, height, width, 3]."""
        first = -self.frames_seen % self.every
        for i in range(first, len(frames), self.every):
            # `every` may double inside this loop; the drop below keeps the counts right.
            if (self.frames_seen + i) % self.every == 0:
                self._cells.append((self.frames_seen + i, self._thumbnail(np.asarray(frames[i]))))
            if len(self._cells) > self.max_cells:
                self.every *= 2
                self._cells = [cell for cell in self._cells if cell[0] % self.every == 0]
        self.frames_seen += len(frames)

    def save(self, path: str | os.PathLike, columns: int = 8) -> None:
        """Writes the sheet; see `contact_sheet` for errors."""
        labels = [f"{index / self.fps:.1f} s" for index, _ in self._cells]
        contact_sheet(path, [cell for _, cell in self._cells], columns, labels)

    def _thumbnail(self, frame: np.ndarray) -> np.ndarray:
        height = max(1, round(frame.shape[0] * self.width / frame.shape[1]))
        # A copy even where the size is right: a view would keep the whole chunk alive.
        return resize(frame, height, self.width, VIDEO_FILTER).copy()


def _fit(text: str, font, width: int) -> str:
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
