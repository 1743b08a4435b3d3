"""How the parts of a picture move to the next one, by phase correlation.

Pictures are first laid on a cylinder round the camera, where a turn moves all columns by the same
number of pixels. Positions on it are a bearing in radians (right is positive) and a slope, the
tangent of the angle below the horizon of a camera that looks level.
"""

import dataclasses
import functools

import numpy as np
from scipy import fft, ndimage

FOCAL = 2 / 3  # focal length of our worlds' pictures, in heights
HEIGHT = 160  # pixels of the pictures that are measured; others are resized
_SLOPE = 0.62  # of the highest and lowest row that is looked at
_BLOCK, _STRIDE = 32, 16  # pixels of a block's side, and between blocks
_REACH = (20, 34)  # pixels that the whole picture may move: rows, columns
_FIGURE = (0.24, -0.12)  # bearing within which, and slope below which who walks may be seen
_EDGE = 0.2  # part of a block that may lie outside of the picture
_LEAST_PEAK = 0.08  # of a picture with every frequency: what has less is nearly flat
_FLAT = 1.0  # standard deviation, in grey levels of 255, of a block without a pattern
_BIAS = 1e-3  # of the strongest frequency: weaker ones are noise and count less


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Where blocks are, float32 [block], in radians and slopes; and their corners, [block, 2]."""

    bearing: np.ndarray
    slope: np.ndarray
    corner: np.ndarray


@dataclasses.dataclass(frozen=True)
class Flow:
    """Of each pair of pictures and each block, float32 [pair, block].

    across, down: radians and slopes by which it moves; without what is the same for all,
    `shift` [pair, 2] (down, across), in the same units, they are small.
    weight: how clear the match is, 0 to 1.
    """

    across: np.ndarray
    down: np.ndarray
    weight: np.ndarray
    shift: np.ndarray


class Lens:
    """The cylinder of pictures of one size.

    Args:
      height, width: pixels, of pictures as they come.
      focal: focal length, in heights.
    """

    def __init__(self, height: int, width: int, focal: float = FOCAL):
        self.focal = focal * HEIGHT  # pixels, a radian
        scale = height / HEIGHT
        half = int(self.focal * np.arctan(width / scale / 2 / self.focal))
        high = int(self.focal * _SLOPE)
        bearing = (np.arange(-half, half) + 0.5) / self.focal
        slope = (np.arange(-high, high) + 0.5) / self.focal
        x = np.broadcast_to(np.tan(bearing), (2 * high, 2 * half))
        y = slope[:, None] / np.cos(bearing)
        pixels = self.focal * scale
        self._at = np.stack([y * pixels + height / 2 - 0.5, x * pixels + width / 2 - 0.5])
        inside = (np.abs(y) * pixels <= height / 2) & (np.abs(x) * pixels <= width / 2)
        # Above the horizon mostly: the floor moves otherwise when the camera does.
        upper = (slope[:, None] > -0.5) & (slope[:, None] < 0.1)
        behind = (np.abs(bearing) < _FIGURE[0]) & (slope[:, None] > _FIGURE[1])
        self._part = inside & upper & ~behind
        self._blur = max(0.0, 0.5 * (scale - 1))  # before a larger picture is sampled
        tops = np.arange(0, 2 * high - _BLOCK + 1, _STRIDE)
        lefts = np.arange(0, 2 * half - _BLOCK + 1, _STRIDE)
        corners = [
            (top, left)
            for top in tops
            for left in lefts
            if inside[top : top + _BLOCK, left : left + _BLOCK].mean() >= 1 - _EDGE
        ]
        corner = np.asarray(corners)
        middle = corner + (_BLOCK - 1) / 2
        self.blocks = Blocks(
            np.interp(middle[:, 1], np.arange(2 * half), bearing).astype(np.float32),
            np.interp(middle[:, 0], np.arange(2 * high), slope).astype(np.float32),
            corner,
        )

    def unroll(self, luma: np.ndarray) -> np.ndarray:
        """float32 [picture, height, width], 0 to 255, on the cylinder: [picture, row, column]."""
        if self._blur:
            luma = ndimage.gaussian_filter(luma, (0, self._blur, self._blur))
        return np.stack(
            [ndimage.map_coordinates(one, self._at, order=1, mode="nearest") for one in luma]
        )

    def whole(self, unrolled: np.ndarray) -> np.ndarray:
        """int [pair, 2]: pixels (down, across) by which most of each picture moves to the next."""
        return _whole(unrolled[:-1], unrolled[1:], self._part)

    def flow(self, unrolled: np.ndarray, shift: np.ndarray) -> Flow:
        """The flow from each picture to the next, of pictures that `unroll` made.

        Args:
          shift: int [pair, 2], by which the whole picture moves, to 10 pixels.
        """
        first, second = unrolled[:-1], unrolled[1:]
        shift = np.clip(shift, np.negative(_REACH), _REACH)
        pairs = np.arange(len(first))[:, None]
        size = np.asarray(first.shape[1:])
        corner = np.broadcast_to(self.blocks.corner, (len(first), *self.blocks.corner.shape))
        # Both blocks are moved by half of what the whole picture moves, and stay inside of it.
        ahead = shift[:, None] // 2
        start = np.clip(corner - ahead, 0, size - _BLOCK)
        end = np.clip(start + shift[:, None], 0, size - _BLOCK)
        a, b = _cut(first, pairs, start), _cut(second, pairs, end)
        moved, clear = _match(a, b)
        moved = moved + (end - start)
        flat = np.minimum(a.std(axis=(-2, -1)), b.std(axis=(-2, -1)))
        weight = np.clip(clear, 0, 1) * (flat > _FLAT)
        shift = shift.astype(np.float32) / self.focal
        moved = moved.astype(np.float32) / self.focal
        return Flow(moved[..., 1], moved[..., 0], weight.astype(np.float32), shift)


def _whole(first: np.ndarray, second: np.ndarray, part: np.ndarray) -> np.ndarray:
    """int [pair, 2]: pixels (down, across) by which most of the picture moves.

    The least mean difference between the pictures where `part` is true: of all shifts at a quarter
    of the resolution, then near the best one at a half. It is coarse, but is not misled by patterns
    that repeat.
    """
    best = np.zeros((len(first), 2), int)
    for step, reach in ((4, [size // 4 for size in _REACH]), (2, (2, 2))):
        a, b = (_smaller(x, step) for x in (first, second))
        known = part[step // 2 :: step, step // 2 :: step][: a.shape[1], : a.shape[2]]
        rows, columns = np.nonzero(known)
        here = a[:, rows, columns]
        down, across = (np.arange(-size, size + 1) for size in reach)
        differences = np.empty((len(a), len(down), len(across)), np.float32)
        pairs = np.arange(len(a))[:, None]
        for i, j in np.ndindex(*differences.shape[1:]):
            y = rows + down[i] + best[:, :1] // step
            x = columns + across[j] + best[:, 1:] // step
            inside = (y >= 0) & (y < a.shape[1]) & (x >= 0) & (x < a.shape[2])
            there = b[pairs, np.clip(y, 0, a.shape[1] - 1), np.clip(x, 0, a.shape[2] - 1)]
            total = (np.abs(there - here) * inside).sum(axis=1)
            differences[:, i, j] = total / np.maximum(inside.sum(axis=1), 1)
        i, j = np.unravel_index(differences.reshape(len(a), -1).argmin(1), differences.shape[1:])
        best = best // step * step + step * np.stack([down[i], across[j]], axis=1)
    return best


def _smaller(pictures: np.ndarray, step: int) -> np.ndarray:
    """[picture, row, column], each the mean of step x step."""
    count, height, width = pictures.shape
    height, width = height // step * step, width // step * step
    parts = pictures[:, :height, :width].reshape(count, height // step, step, width // step, step)
    return parts.mean(axis=(2, 4))


def _match(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (down, across) from block to block, [..., 2], and how high the peak is, [...]."""
    side = a.shape[-1]
    found = _correlation(a, b, _window((side, side)))
    best = found.reshape(*found.shape[:-2], -1).argmax(axis=-1)
    row, column = best // side, best % side
    flat = found.reshape(-1, side, side)
    index = np.arange(len(flat)).reshape(row.shape)

    def at(down, across):
        return flat[index, (row + down) % side, (column + across) % side]

    peak = at(0, 0)
    moved = np.stack(
        [
            (row + side // 2) % side - side // 2 + _vertex(at(-1, 0), peak, at(1, 0)),
            (column + side // 2) % side - side // 2 + _vertex(at(0, -1), peak, at(0, 1)),
        ],
        axis=-1,
    )
    return moved, peak


def _vertex(before, peak, after):
    """Where between -1/2 and 1/2 the parabola through three neighbours is highest."""
    curve = before - 2 * peak + after
    return np.clip(
        np.where(curve < 0, (before - after) / 2 / np.minimum(curve, -1e-9), 0), -0.5, 0.5
    )


def _correlation(a: np.ndarray, b: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Phase correlation over the last two axes; a peak at (down, across), its height 1 at most."""
    shape = a.shape[-2:]
    spectra = [
        np.asarray(fft.rfft2((x - x.mean(axis=(-2, -1), keepdims=True)) * window, axes=(-2, -1)))
        for x in (a, b)
    ]
    cross = np.conj(spectra[0]) * spectra[1]
    size = np.abs(cross)
    bias = _BIAS * size.max(axis=(-2, -1), keepdims=True) + 1e-6
    share = size / (size + bias) * _low(shape)
    found = np.asarray(fft.irfft2(cross / (size + bias) * _low(shape), s=shape, axes=(-2, -1)))
    # The peak of two equal pictures: low where few frequencies are above noise, as of blurred ones.
    both = np.full(shape[1] // 2 + 1, 2.0, np.float32)
    both[0] = 1
    both[-1] = 1 if shape[1] % 2 == 0 else 2
    equal = (share * both).sum(axis=(-2, -1), keepdims=True) / (shape[0] * shape[1])
    return found / np.maximum(equal, _LEAST_PEAK * _low_peak(shape))


@functools.cache
def _low(shape: tuple[int, int]) -> np.ndarray:
    """A Gaussian over frequencies: the peak is some pixels wide, and noise of one is not."""
    rows, columns = np.fft.fftfreq(shape[0]), np.fft.rfftfreq(shape[1])
    return np.exp(-(rows[:, None] ** 2 + columns**2) / (2 * 0.18**2)).astype(np.float32)


@functools.cache
def _low_peak(shape: tuple[int, int]) -> float:
    """The height of the peak of two equal pictures."""
    return float(np.asarray(fft.irfft2(_low(shape).astype(np.complex64), s=shape)).max())


@functools.cache
def _window(shape: tuple[int, ...]) -> np.ndarray:
    return np.outer(*(np.hanning(n + 2)[1:-1] for n in shape)).astype(np.float32)


def _cut(pictures: np.ndarray, pairs: np.ndarray, corner: np.ndarray) -> np.ndarray:
    """[pair, block, side, side]: what is at the corners, [pair, block, 2]."""
    views = np.lib.stride_tricks.sliding_window_view(pictures, (_BLOCK, _BLOCK), axis=(1, 2))
    return views[pairs, corner[..., 0], corner[..., 1]]
