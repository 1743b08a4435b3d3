"""When a cut takes effect: from which frame on the new shot is seen, and the old one is not."""

import numpy as np

from longlive_jax.data.worlds.shapes import BACKGROUNDS
from longlive_jax.grading import fit, segment
from longlive_jax.grading.caption import Asked

_HOLDS = 3  # frames in a row that show the new shot


def is_measured(old: Asked, new: Asked) -> bool:
    """Whether single frames of the two shots differ: not where only motions do."""
    return old.background != new.background or _looks(old) != _looks(new)


def shows(frames: segment.Frames, old: Asked, new: Asked) -> np.ndarray:
    """bool [frame]: whether a frame shows what only `new` has, and nothing that only `old` has.

    The background decides, where the two differ in it, together with colours that only one has.
    Where both have the same colours, the shapes do.
    """
    result = np.ones(len(frames), bool)
    if old.background != new.background:
        result &= frames.grounds == BACKGROUNDS.index(new.background)
    had, has = _colours(old), _colours(new)
    present = frames.present
    for colour in had - has:
        result &= ~present[:, colour]
    if has - had:
        # One of them is enough: an object may be outside of the picture.
        result &= present[:, sorted(has - had)].any(1)
    elif old.background == new.background and had == has:
        result &= _shapes(frames, old, new)
    return result


def latency(shown: np.ndarray) -> int | None:
    """The first frame of the shot from which on it is seen for some frames; None: never."""
    holds = min(_HOLDS, len(shown))
    for i in range(len(shown) - holds + 1):
        if shown[i : i + holds].all():
            return i
    return None


def _shapes(frames, old, new):
    """Whether each frame's objects of these colours fit the new shapes better than the old."""
    before = {thing.colour: thing.shape for thing in old.things}
    changed = [thing for thing in new.things if before[thing.colour] != thing.shape]
    votes = np.zeros(len(frames))
    for i in range(len(frames)):
        colours = [segment.NAMES.index(thing.colour) for thing in changed]
        seen = [c for c in colours if frames.present[i, c]]
        one = frames[i : i + 1]
        for region in segment.regions(one, int(one.grounds[0]), seen):
            view = fit.view(region.alpha[0], region.hidden[0])
            thing = next(t for t in changed if t.colour == segment.NAMES[region.colour])
            if view is not None:
                scores = [
                    fit.fit(view, s, blurred=True).score
                    for s in (thing.shape, before[thing.colour])
                ]
                votes[i] += scores[0] - scores[1]
    return votes > 0


def _colours(asked: Asked) -> set[int]:
    return {segment.NAMES.index(thing.colour) for thing in asked.things}


def _looks(asked: Asked) -> set[tuple[str, str]]:
    return {(thing.shape, thing.colour) for thing in asked.things}
