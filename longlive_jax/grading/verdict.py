"""What is right of a chunk: what it shows, against what its prompt asks for."""

import dataclasses
import itertools

import numpy as np

from longlive_jax.data.worlds.shapes import ASPECT, BACKGROUNDS
from longlive_jax.grading.caption import Asked, Thing
from longlive_jax.grading.look import CLEAR, Seen
from longlive_jax.grading.look import Thing as Found

ATTRIBUTES = ("objects", "colours", "sizes", "backgrounds", "places", "motions")

# The world's own ranges (`shapes.shot`): diameters and places, of one object and of two.
_SIZES = {1: (0.36, 0.5), 2: (0.34, 0.4)}
_PLACES = {1: ((0.5, 0.5),), 2: ((0.25, 0.27), (0.75, 0.73))}
_JITTER = (0.06, 0.03)
_GROWN = (0.5, 1.3)  # least and greatest share of its size that a growing object has
_SIZE_ERROR = 1.12  # as a factor
_PLACE_ERROR = 0.07
_TIE = 0.03  # the asked shape's score may be less than the best by this
_SLOW = 0.03  # growth, a second, that a "still" object of a blurred video may show
_SETTLED = 3.5  # seconds, after which what grows has nearly grown
# The axes (x, y) along which a motion leaves an object where it is, about.
_KEPT = {
    "left": (False, True), "right": (False, True), "up": (True, False), "down": (True, False),
    "other": (False, False), "": (True, True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Verdict:
    """right: each of ATTRIBUTES. wrong: a line for each thing that is not as asked."""

    right: dict[str, bool]
    wrong: tuple[str, ...]

    @property
    def all_right(self) -> bool:
        return all(self.right.values())

    @property
    def content_right(self) -> bool:
        """The objects, their colours and the background, whatever they do."""
        return all(self.right[name] for name in ("objects", "colours", "backgrounds"))


def judge(seen: Seen, asked: Asked, seconds: float = 0.0) -> Verdict:
    """Judges a chunk. seconds: from the beginning of its shot to the chunk's."""
    wrong: dict[str, list[str]] = {name: [] for name in ATTRIBUTES}
    if seen.background is None or BACKGROUNDS[seen.background] != asked.background:
        shown = "none" if seen.background is None else BACKGROUNDS[seen.background].words
        wrong["backgrounds"].append(f"background: {shown}, not {asked.background.words}")
    pairs = paired(seen, asked)
    places = _PLACES[len(asked.things)]
    for number, (thing, found) in enumerate(zip(asked.things, pairs)):
        name = f"{thing.colour} {thing.shape}"
        if found is None:
            for attribute in set(ATTRIBUTES) - {"backgrounds"}:
                wrong[attribute].append(f"{name}: is not there")
            continue
        for attribute, what in _differences(
            thing, found, len(asked.things), places[number], seconds
        ):
            wrong[attribute].append(f"{name}: {what}")
    for found in seen.things:
        if found not in pairs or found.extra:
            what = "a second " if found.extra else ""
            wrong["objects"].append(
                f"{what}{found.colour} {found.shape or 'object'}: not asked for"
            )
    lines = dict.fromkeys(itertools.chain(*wrong.values()))
    return Verdict({name: not found for name, found in wrong.items()}, tuple(lines))


def same_shape(found: Found, shape: str) -> bool:
    """Whether an object may be of this shape: none of the others fits it better."""
    return found.scores[shape] >= max(CLEAR, max(found.scores.values()) - _TIE)


def paired(seen: Seen, asked: Asked) -> tuple[Found | None, ...]:
    """The object that each thing is, as far as they agree."""
    candidates = (*seen.things, *(None,) * len(asked.things))
    ways = itertools.permutations(candidates, len(asked.things))
    return max(ways, key=lambda way: sum(map(_alike, asked.things, way)))


def _alike(thing: Thing, found: Found | None) -> float:
    if found is None:
        return 0.5
    return 2 * (found.colour == thing.colour) + 2 * same_shape(found, thing.shape) + 0.6


def _differences(thing: Thing, found: Found, count: int, place, seconds: float):
    if not same_shape(found, thing.shape):
        yield "objects", f"is {_a(found.shape)}" if found.shape else "has no clear shape"
    if found.colour != thing.colour:
        yield "colours", f"is {found.colour}"
    size = found.track.middle_size
    least, most = _SIZES[count]
    if thing.motion in ("grow", "shrink"):
        least, most = least * _GROWN[0], most * _GROWN[1]
    if np.isfinite(size) and not least / _SIZE_ERROR <= size <= most * _SIZE_ERROR:
        yield "sizes", f"is {size:.2f} heights across, not {least:.2f} to {most:.2f}"
    moves = _moves(thing.motion, found, size, count, seconds)
    if not moves:
        yield "motions", f"does: {found.motion or 'nothing clear'}, not: {thing.motion}"
    if (where := _misplaced(thing.motion, found, size, place)) is not None:
        yield "places", f"is at ({where[0]:.2f}, {where[1]:.2f}) heights"


def _a(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def _moves(motion: str, found: Found, size: float, count: int, seconds: float) -> bool:
    if found.motion == motion:
        return True
    if motion == "still":
        return found.motion in ("grow", "shrink") and abs(found.track.growth) < _SLOW
    if found.motion == "still" and seconds > _SETTLED:
        least, most = _SIZES[count]
        return (motion == "grow" and size >= 1.1 * least) or (
            motion == "shrink" and size <= 0.75 * most
        )
    return False


def _misplaced(motion: str, found: Found, size: float, place) -> tuple[float, float] | None:
    """Where an object is, if that is not where one of this motion may be."""
    base = place[0] * ASPECT, place[1]
    at = found.track.middle
    kept = [_KEPT.get(name, (True, True)) for name in (motion, found.motion)]
    for axis in (0, 1):
        if not (kept[0][axis] and kept[1][axis]) or not np.isfinite(at[axis]):
            continue
        reach = _JITTER[axis] + _PLACE_ERROR
        if "bounce" in (motion, found.motion) and axis == 1:
            reach += 0.2
        if "orbit" in (motion, found.motion):
            reach += 0.4 * (size if np.isfinite(size) else 0.4)
        if abs(at[axis] - base[axis]) > reach:
            return at
    return None
