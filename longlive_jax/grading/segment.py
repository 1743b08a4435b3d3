"""Backgrounds and coloured regions of frames.

A frame is compared with every background of the world as it is drawn. What differs from the best
one is foreground; it is split by the nearest colour of the palette.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from longlive_jax.data.worlds.shapes import BACKGROUNDS, COLOURS, Background, background_picture

HEIGHT = 128  # pixels, about: frames are brought to this height by a whole factor
PALETTE = np.asarray(list(COLOURS.values()), np.float32)
NAMES = tuple(COLOURS)

_STRIDE = 4  # pixels between those by which backgrounds are told apart
_FAR = 80.0  # distances in RGB, 0 to 255 a channel, count as this at most
_FOREGROUND = 45.0  # least distance from the background
_OF_A_COLOUR = 95.0  # largest distance from a colour of the palette
_LEAST_AREA = 0.0012  # of the frame, that a colour covers when a pixel is taken off its edge
_CODES = 32  # values of a channel in the table of nearest colours


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """One colour in the frames of a chunk.

    colour: its number in the palette. rgb: float32 [3], as measured inside.
    alpha: float32 [frame, height, width], how far each pixel is this object's, 0 to 1.
    hidden: bool [frame, height, width], pixels of another object, which may cover this one.
    there: bool [frame]. extra: bool [frame], a second object of the same colour is there.
    """

    colour: int
    rgb: np.ndarray
    alpha: np.ndarray
    hidden: np.ndarray
    there: np.ndarray
    extra: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """Frames, told apart.

    pixels: float32 [frame, height, width, 3]. grounds: int [frame], numbers in BACKGROUNDS.
    shifts: float32 [frame, 3], the background's colours less the world's. errors: float32 [frame],
    mean distance from the background, outside of objects. labels: int8 [frame, height, width], the
    number in the palette of an object's pixels, -1 elsewhere. areas: float32 [frame, colour], share
    of the frame that a colour of the palette covers.
    """

    pixels: np.ndarray
    grounds: np.ndarray
    shifts: np.ndarray
    errors: np.ndarray
    labels: np.ndarray
    areas: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """bool [frame, colour]: the colour covers enough for an object."""
        return np.greater_equal(self.areas, _LEAST_AREA)

    def __getitem__(self, frames: slice) -> "Frames":
        return Frames(*(getattr(self, field.name)[frames] for field in dataclasses.fields(self)))

    def __len__(self) -> int:
        return len(self.pixels)

    def merged(self, small: int, large: int, rgb: np.ndarray) -> "Frames":
        """The frames in which pixels of colour `small` are painted `rgb`, of colour `large`."""
        painted = self.labels == small
        areas = self.areas.copy()
        areas[:, large] += areas[:, small]
        areas[:, small] = 0
        return dataclasses.replace(
            self,
            pixels=np.where(painted[..., None], rgb.astype(np.float32), self.pixels),
            labels=np.where(painted, np.int8(large), self.labels),
            areas=areas,
        )


def to_height(frames: np.ndarray) -> np.ndarray:
    """uint8 [frame, h, w, 3] as float32, made larger or smaller by a whole factor, near HEIGHT."""
    count, height, width, _ = frames.shape
    if (down := height // HEIGHT) > 1:
        cut = frames[:, : height - height % down, : width - width % down]
        shape = count, height // down, down, width // down, down, 3
        return cut.reshape(shape).mean((2, 4), dtype=np.float32)
    up = round(HEIGHT / height)
    values = frames.astype(np.float32)
    if up <= 1:
        return values
    return np.asarray(ndimage.zoom(values, (1, up, up, 1), order=1, grid_mode=True, mode="nearest"))


def tell_apart(pixels: np.ndarray) -> Frames:
    """Finds backgrounds and colours. pixels: of `to_height`."""
    height, width = pixels.shape[1:3]
    few = pixels[:, _STRIDE // 2 :: _STRIDE, _STRIDE // 2 :: _STRIDE]
    far = np.empty((len(pixels), len(BACKGROUNDS)), np.float32)
    for i, ground in enumerate(BACKGROUNDS):
        far[:, i] = np.minimum(_length(few - _picture(ground, height, width, _STRIDE)), _FAR).mean(
            (1, 2)
        )
    grounds = far.argmin(1)
    shifts, errors = np.empty((len(pixels), 3), np.float32), np.empty(len(pixels), np.float32)
    labels = np.empty(pixels.shape[:3], np.int8)
    areas = np.zeros((len(pixels), len(PALETTE)), np.float32)
    for i, (frame, ground) in enumerate(zip(pixels, grounds)):
        shifts[i], errors[i] = _shift(frame, ground)
        labels[i] = _labels(frame, _behind(frame, ground, shifts[i]))
        counts = np.bincount(labels[i].ravel() + 1, minlength=len(PALETTE) + 1)[1:]
        for colour in np.flatnonzero(counts >= _LEAST_AREA * labels[i].size):
            areas[i, colour] = ndimage.binary_erosion(labels[i] == colour, _SQUARE).mean()
    return Frames(pixels, grounds, shifts, errors, labels, areas)


def regions(frames: Frames, ground: int, colours: Sequence[int]) -> list[Region]:
    """The objects of these colours, in the frames that have this background."""
    usable = frames.grounds == ground
    behind = [_behind(*one) for one in zip(frames.pixels, frames.grounds, frames.shifts)]
    return [
        _region(frames, behind, colour, usable & frames.present[:, colour]) for colour in colours
    ]


def _region(frames, behind, colour, there) -> Region:
    inside = [
        frames.pixels[i][ndimage.binary_erosion(frames.labels[i] == colour, _SQUARE)]
        for i in np.flatnonzero(there)
    ]
    rgb = np.median(np.concatenate(inside), axis=0)
    alpha = np.zeros(frames.labels.shape, np.float32)
    hidden = np.zeros(frames.labels.shape, bool)
    extra = np.zeros(len(frames), bool)
    for i in np.flatnonzero(there):
        rows, columns = (np.flatnonzero((frames.labels[i] == colour).any(axis)) for axis in (1, 0))
        around = tuple(np.s_[max(0, x[0] - 6) : x[-1] + 7] for x in (rows, columns))
        alpha[i][around], hidden[i][around], extra[i] = _part(
            frames.pixels[i][around], behind[i][around], frames.labels[i][around], colour, rgb,
            _LEAST_AREA * frames.labels[i].size,
        )  # fmt: skip
    return Region(colour, rgb, alpha, hidden, there, extra)


def alpha_of(frame: np.ndarray, ground: int, rgb: np.ndarray) -> np.ndarray:
    """float32 [height, width]: how far each pixel of a frame of any size is of this colour."""
    return _share(frame, _behind(frame, ground, _shift(frame, ground)[0]), rgb)


def _part(frame, behind, labels, colour, rgb, least):
    """(alpha, hidden, whether a second object is there) of one colour, around it."""
    mask, other = labels == colour, (labels >= 0) & (labels != colour)
    numbers, _ = _components(other)
    # No object is as thin as an edge.
    thick = ndimage.binary_erosion(other, _SQUARE, border_value=1)
    other &= np.isin(numbers, np.unique(np.where(thick, numbers, 0)))
    hidden = ndimage.binary_dilation(other, _SQUARE, iterations=2) & ~mask
    numbers, count = _components(mask)
    extra = False
    if count > 1:
        sizes = np.bincount(numbers.ravel())[1:]
        main = 1 + int(sizes.argmax())
        mask = numbers == main
        for one in np.flatnonzero(sizes > 0.05 * sizes[main - 1]) + 1:
            part = numbers == one
            if (ndimage.binary_dilation(part, _SQUARE, iterations=2) & hidden).any():
                mask |= part  # a piece that shows on the other side of what covers it
            elif one != main and sizes[one - 1] > 0.25 * sizes[main - 1]:
                extra |= bool(ndimage.binary_erosion(part, _SQUARE).sum() > least)
    near = ndimage.binary_dilation(mask, _SQUARE, iterations=4)
    return np.where(near & ~hidden, _share(frame, behind, rgb), 0), hidden & near, extra


def _components(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """The number of each pixel's connected part, from 1; and how many there are."""
    numbers = np.zeros(mask.shape, np.int32)
    return numbers, int(ndimage.label(mask, _SQUARE, output=numbers))  # pyright: ignore[reportArgumentType]


def _share(frame, behind, rgb):
    way = rgb - behind
    share = ((frame - behind) * way).sum(-1) / np.maximum((way**2).sum(-1), 1)
    return np.clip(share, 0, 1)


def _behind(frame, ground, shift):
    return _picture(BACKGROUNDS[ground], *frame.shape[:2], 1) + shift


def _shift(frame: np.ndarray, ground: int) -> tuple[np.ndarray, float]:
    """How far the background's colours are from the world's, and the error that is left."""
    picture = _picture(BACKGROUNDS[ground], *frame.shape[:2], _STRIDE)
    rest = (frame[_STRIDE // 2 :: _STRIDE, _STRIDE // 2 :: _STRIDE] - picture).reshape(-1, 3)
    far = _length(rest)
    near = far <= max(_FOREGROUND, float(np.median(far)))
    error = float(far[near].mean()) if near.mean() > 0.3 else _FAR
    return np.median(rest[near], axis=0), error


def _labels(frame, behind) -> np.ndarray:
    far = _length(frame - behind)
    codes = np.clip(frame, 0, 255).astype(np.int32) // (256 // _CODES)
    index = (codes[..., 0] * _CODES + codes[..., 1]) * _CODES + codes[..., 2]
    nearest, distance = _nearest()
    to_colour = distance[index]
    ours = (far > _FOREGROUND) & (to_colour < _OF_A_COLOUR) & (to_colour < far)
    return np.where(ours, nearest[index], np.int8(-1))


def _length(x):
    return np.sqrt(np.einsum("...c,...c->...", x, x))


_SQUARE = np.ones((3, 3), bool)


@functools.lru_cache(maxsize=64)
def _picture(ground: Background, height: int, width: int, stride: int) -> np.ndarray:
    picture = background_picture(ground, height, width)
    return picture[stride // 2 :: stride, stride // 2 :: stride]


@functools.cache
def _nearest() -> tuple[np.ndarray, np.ndarray]:
    """For each code of a colour, the number of the palette's nearest, and its distance."""
    axis = (np.arange(_CODES, dtype=np.float32) + 0.5) * (256 / _CODES)
    codes = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 1, 3)
    far = np.linalg.norm(codes - PALETTE, axis=-1)
    return far.argmin(1).astype(np.int8), far.min(1)
