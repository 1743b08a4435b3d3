"""What a prompt of the world of shapes asks for, from its words."""

import dataclasses
import re

from longlive_jax.captions import clean
from longlive_jax.data.worlds.shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Background
from longlive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object that a prompt names."""

    shape: str
    colour: str
    motion: str


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a chunk shall show. Of two things the first is at the upper left, the other opposite."""

    background: Background
    things: tuple[Thing, ...]


_GROUND = {ground.words: ground for ground in BACKGROUNDS}
_MOTION = {words: name for name, ways in MOTIONS.items() for words in ways}


def _either(words) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_THERE = f"(?P<there>{_either(_GROUND)})"
_CLAUSE = f"an? (?:{_either(COLOURS)}) (?:{_either(SHAPES)}) (?:{_either(_MOTION)})"
_FORMS = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"(?P<what>{_CLAUSE}(?: and {_CLAUSE})?) over {_THERE}\.?",
        rf"over {_THERE}, (?P<what>{_CLAUSE}(?: while {_CLAUSE})?)\.?",
        rf"there is {_THERE}\. (?P<what>{_CLAUSE}(?: and {_CLAUSE})?)\.?",
    )
]
_PARTS = re.compile(
    f"({_either(COLOURS)}) ({_either(SHAPES)}) ({_either(_MOTION)})(?= and | while |$)",
    re.IGNORECASE,
)


def parse(prompt: str) -> Asked:
    """Reads a caption as `shapes.shot` writes them, without the words of a cut before it.

    Raises:
      InputError: it is none.
    """
    text = clean(prompt)
    found = next(filter(None, (form.fullmatch(text) for form in _FORMS)), None)
    if found is None:
        raise InputError(
            f"prompt {text[:160]!r} is not of the world of shapes: it must name one or two objects "
            f"(colours {', '.join(COLOURS)}; shapes {', '.join(SHAPES)}), what each does, and the "
            "background, as captions of launch.make_tiny_world do"
        )
    what = [tuple(word.lower() for word in part) for part in _PARTS.findall(found["what"])]
    things = tuple(Thing(shape, colour, _MOTION[motion]) for colour, shape, motion in what)
    return Asked(_GROUND[found["there"].lower()], things)
