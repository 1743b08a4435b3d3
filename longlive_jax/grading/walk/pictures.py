"""Measures of single pictures, and of a picture against another."""

import numpy as np
from scipy import ndimage

_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
_WINDOW = 7  # pixels of a side, in which SSIM compares
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2  # Wang et al., 2004
_TOP, _SIDES = 0.42, (0.36, 0.64)  # in sizes of the picture: where who walks is seen
_BLUR = 1.5  # pixels of 160 rows: what a sharp picture loses by it, a blurred one does not


def luma(frames: np.ndarray) -> np.ndarray:
    """float32 [picture, height, width], 0 to 255, of uint8 [picture, height, width, 3]."""
    return np.asarray(frames, np.float32) @ _LUMA


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB between pictures of 0 to 255, of the mean error over all; 100 where they are equal."""
    error = np.mean((np.asarray(one, np.float32) - np.asarray(other, np.float32)) ** 2)
    return 100.0 if error <= 0 else float(min(100.0, 10 * np.log10(255**2 / error)))


def ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Structural similarity of luma, [picture, height, width], the mean over all."""

    def mean(x):
        return ndimage.uniform_filter(x, _WINDOW, axes=(1, 2))

    a, b = np.asarray(one, np.float32), np.asarray(other, np.float32)
    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    found = (2 * ma * mb + _C1) * (2 * both + _C2)
    return float((found / ((ma * ma + mb * mb + _C1) * (va + vb + _C2))).mean())


def sharpness(lumas: np.ndarray) -> np.ndarray:
    """float [picture]: the part of a picture's edges that a small blur takes away, 0 to 1."""
    width = _BLUR * lumas.shape[1] / 160
    soft = ndimage.gaussian_filter(lumas, (0, width, width))
    before, after = (_edges(x) for x in (lumas, soft))
    return np.where(before > 1e-3, 1 - after / np.maximum(before, 1e-3), 0.0)


def contrast(lumas: np.ndarray) -> np.ndarray:
    """float [picture]: standard deviation, grey levels of 255."""
    return lumas.std(axis=(1, 2))


def small(frames: np.ndarray, height: int = 40) -> np.ndarray:
    """float32 [picture, `height`, width, 3]: a reduced copy, each pixel the mean of its part."""
    _, rows, columns, _ = frames.shape
    width = max(1, round(columns * height / rows))
    top = np.linspace(0, rows, height + 1).astype(int)[:-1]
    left = np.linspace(0, columns, width + 1).astype(int)[:-1]
    total = np.add.reduceat(np.asarray(frames, np.float32), top, axis=1)
    total = np.add.reduceat(total, left, axis=2)
    size = np.outer(np.diff([*top, rows]), np.diff([*left, columns]))
    return total / size[None, :, :, None].astype(np.float32)


def alike(one: np.ndarray, other: np.ndarray, known: np.ndarray, reach: int = 2) -> float:
    """Correlation of two reduced pictures [height, width, 3], where they fit best, -1 to 1.

    One may be moved against the other by `reach` pixels: who comes back stands a little elsewhere.

    Args:
      known: bool [height, width], the pixels of `one` that are compared.
    """
    height, width, _ = one.shape
    middle = one[reach : height - reach, reach : width - reach]
    known = known[reach : height - reach, reach : width - reach]
    return max(
        correlation(middle[known], other[i : i + middle.shape[0], j : j + middle.shape[1]][known])
        for i in range(2 * reach + 1)
        for j in range(2 * reach + 1)
    )


def scenery(shape: tuple[int, ...], view: str) -> np.ndarray:
    """bool [height, width]: where a picture of this view shows the world, and not who walks."""
    known = np.ones(shape[:2], bool)
    if view == "third":
        known[box(shape)] = False
    return known


def box(shape: tuple[int, ...]) -> tuple[slice, slice]:
    """(rows, columns) of the part of a picture in which who walks is seen."""
    top, left, right = int(_TOP * shape[0]), int(_SIDES[0] * shape[1]), int(_SIDES[1] * shape[1])
    return slice(top, None), slice(left, right)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of two arrays, -1 to 1; 0 where one has no pattern."""
    a, b = one - one.mean(), other - other.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 1e-6 else 0.0


def _edges(lumas: np.ndarray) -> np.ndarray:
    down = np.abs(np.diff(lumas, axis=1)).mean(axis=(1, 2))
    return down + np.abs(np.diff(lumas, axis=2)).mean(axis=(1, 2))
