"""Clips of the world, as arrays, and their scripts."""

import numpy as np

from longlive_jax.data.worlds import shapes
from longlive_jax.data.worlds.shapes import ASPECT, Background, Object, Shot
from longlive_jax.grading import video

BLACK = Background("plain", "black", "black")
STRIPES = Background("stripes", "white", "grey")


def thing(shape="star", colour="yellow", motion="still", size=0.42, x=ASPECT / 2, y=0.5, **more):
    values = {"phase": 0.4, "rate": 1.0} | more
    return Object(shape, colour, motion, size, x, y, **values)


def caption(background, *things):
    clauses = [f"{o.words} {shapes.MOTIONS[o.motion][0]}" for o in things]
    text = f"{' and '.join(clauses)} over {background.words}."
    return text[0].upper() + text[1:]


def shot(background, *things):
    return Shot(background, things, 125, caption(background, *things))


def pair(**changes):
    """A yellow star at the upper left, a red square at the lower right; changes are the star's."""
    star = {"shape": "star", "colour": "yellow", "size": 0.37, "x": 0.25 * ASPECT, "y": 0.27}
    return thing(**star | changes), thing("square", "red", size=0.37, x=0.75 * ASPECT, y=0.73)


def render(shots, chunks):
    """Frames of shots, of so many chunks each."""
    parts, total = [], 0
    for one, count in zip(shots, chunks):
        stop = video.frames_of(total + count, 8)
        parts.append(shapes.render(one, 0, stop - video.frames_of(total, 8)))
        total += count
    return np.concatenate(parts)


def script(shots, chunks):
    return [
        video.Line(one.caption, k == 0 and i > 0)
        for i, (one, count) in enumerate(zip(shots, chunks))
        for k in range(count)
    ]


def grade(frames, lines):
    return video.grade("clip", lambda a, b: frames[a:b], len(frames), lines, 8)
