"""Types of settings that state their limits, and sections that check themselves.

A section is a frozen dataclass whose fields' types carry their limits: `steps: Count = 4` is
checked when the section is made, so that no other code has to check it.
"""

import dataclasses
import functools
import math
import typing
from collections.abc import Collection
from typing import Annotated, Any

from longlive_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`, `above` one or `below` one. `hint`: a way out."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        # NaN fails every comparison.
        inside = self.least <= value <= self.most and self.above < value < self.below
        return inside and math.isfinite(value)

    def __str__(self) -> str:
        bounds = {
            "at least": self.least, "above": self.above, "at most": self.most, "below": self.below,
        }  # fmt: skip
        limits = [f"{word} {n:.15g}" for word, n in bounds.items() if math.isfinite(n)]
        return " and ".join(limits or ["finite"]) + (f"; {self.hint}" if self.hint else "")


class OneOf:
    """The values a setting may have: `Annotated[str, OneOf(("width", "halo"))]`, or a table's."""

    def __init__(self, values: Collection[str] | Collection[int]):
        self.values = values  # not a copy: a table may gain an entry

    def __contains__(self, value: str | int) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


INT32_MAX = 2**31 - 1  # positions, steps and seeds are int32 on devices

Count = Annotated[int, Range(1, INT32_MAX)]
# Of a network. Its layers are written down one by one, in messages too; the deepest have about 100.
Layers = Annotated[int, Range(1, 1000)]
Index = Annotated[int, Range(0, INT32_MAX)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, below=1)]  # of a moving average


def refuse(what: str, why: str) -> typing.NoReturn:
    """Raises InputError: which setting, its value, the limit and the way out."""
    raise InputError(f"config: {what} {why}")


def divides(name: str, value: int, by_name: str, by: int) -> None:
    """Refuses a value that is no multiple of `by`, and names the nearest ones that are."""
    if value % by:
        near = [n for n in (value // by * by, (value // by + 1) * by) if n > 0]
        refuse(f"{name}={value}", f"must be a multiple of {by_name}={by}; nearest: {near}")


@dataclasses.dataclass(frozen=True)
class Section:
    """Settings of one kind. A subclass names itself as the command line does.

    Raises:
      InputError: a value outside what its field's type allows.
    """

    NAME: typing.ClassVar[str]

    def __post_init__(self):
        for name, kind in hints(type(self)).items():
            _check(f"{self.NAME}.{name}".lstrip("."), getattr(self, name), kind)


@functools.cache
def hints(section: type[Section]) -> dict[str, Any]:
    """The fields of a section by name, each with its type and limits."""
    kinds = typing.get_type_hints(section, include_extras=True)
    return {field.name: kinds[field.name] for field in dataclasses.fields(section)}


def values(section: Section) -> dict[str, Any]:
    """Settings by name, for records; a section within by "section.key", if it is not the default.

    So records of before a section was there are those of one that is not used.
    """
    result: dict[str, Any] = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if not isinstance(value, Section):
            result[field.name] = value
        elif value != field.default:
            result |= {f"{field.name}.{key}": x for key, x in values(value).items()}
    return result


def plain(kind: Any) -> Any:
    """A field's type without its limits: int, float, str, bool, tuple[float, ...] or a section."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _check(name: str, value: Any, kind: Any) -> None:
    origin = typing.get_origin(kind)
    if origin is Annotated:
        limits = typing.get_args(kind)[1]
    elif kind is float or origin is tuple:  # all our tuples are of floats
        limits = Range()
    else:
        return
    if not all(x in limits for x in (value if origin is tuple else (value,))):
        refuse(f"{name}={value!r}", f"must be {limits}")
