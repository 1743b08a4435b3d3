"""A line chart of scores, drawn with Pillow."""

import itertools
import os
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from longlive_jax.files.atomic import atomic_path

_SIZE = (960, 480)
_BOX = (64, 48, 760, 424)  # left, top, right, bottom of the axes
_SCALE = 2  # drawn larger, then shrunk: smooth lines
_INK, _GRID = (40, 44, 52), (226, 228, 232)
_LINES = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (20, 20, 24), (188, 189, 34),
)  # fmt: skip


def save(
    path: str | os.PathLike,
    title: str,
    seconds: Sequence[float],
    lines: Mapping[str, Sequence[float | None]],
) -> None:
    """Writes a PNG of shares, 0 to 1, over time. None: a gap. "all_right" is drawn thick."""
    image = Image.new("RGB", [side * _SCALE for side in _SIZE], "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (value * _SCALE for value in _BOX)
    longest = max(*seconds, 1e-6)

    def place(second, share):
        return left + (right - left) * second / longest, bottom - (bottom - top) * min(share, 1.0)

    small, large = (ImageFont.load_default(size * _SCALE) for size in (13, 17))
    draw.text((left, 14 * _SCALE), title, _INK, font=large)
    for tenth in range(0, 11, 2):
        y = place(0, tenth / 10)[1]
        draw.line((left, y, right, y), _GRID, _SCALE)
        draw.text((left - 8 * _SCALE, y), f"{10 * tenth}%", _INK, font=small, anchor="rm")
    for part in range(5):
        second = longest * part / 4
        x = place(second, 0)[0]
        draw.text((x, bottom + 6 * _SCALE), f"{second:.0f} s", _INK, font=small, anchor="mt")
    draw.line((left, top, left, bottom, right, bottom), _INK, _SCALE)
    ends = []
    for (name, shares), colour in zip(lines.items(), _LINES):
        points = [place(s, y) if y is not None else None for s, y in zip(seconds, shares)]
        width = (4 if name == "all_right" else 2) * _SCALE
        for a, b in itertools.pairwise(points):
            if a and b:
                draw.line((*a, *b), colour, width)
        for x, y in filter(None, points if len(points) < 60 else ()):
            draw.ellipse((x - width, y - width, x + width, y + width), colour)
        known = [share for share in shares if share is not None]
        ends.append((name, colour, sum(known) / len(known) if known else None))
    for i, (name, colour, mean) in enumerate(ends):
        y = top + 26 * _SCALE * i
        x = right + 20 * _SCALE
        draw.line((x, y, x + 22 * _SCALE, y), colour, 4 * _SCALE)
        value = "-" if mean is None else f"{100 * mean:.0f}%"
        text = f"{name.replace('_', ' ')}  {value}"
        draw.text((x + 30 * _SCALE, y), text, _INK, font=small, anchor="lm")
    image = image.resize(_SIZE, Image.Resampling.LANCZOS)
    with atomic_path(path) as partial:
        image.save(partial)
