"""Places of Freedoom's maps and of ViZDoom's scenarios: their words, and where walks begin.

Lengths are the map's units, 56 to the player's height. x points east, y south: it is the maps' own
y with the other sign, so that yaw grows to the right.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Room:
    """A part of a place, from (left, top) to (right, bottom)."""

    words: str
    left: float
    top: float
    right: float
    bottom: float

    def holds(self, x, y):
        return (self.left <= x) & (x <= self.right) & (self.top <= y) & (y <= self.bottom)


@dataclasses.dataclass(frozen=True)
class Place:
    """A map, or a part of one that looks the same everywhere.

    map: of freedoom2.wad, or of `scenario`, a file of ViZDoom's.
    words: what a caption says of it, after "First person view, ".
    starts: where a walk begins, within `spread` each way. Walls are 16 away at least, and who can
      stand behind one is 32 away: too far for `spread`.
    rooms: that captions name.
    ways: straight ways between points, each with those that it leads to.
    share: how often it is filmed, against 1 of another place.
    held_out: whether it is for evaluation alone.
    """

    name: str
    map: str
    words: str
    starts: tuple[Point, ...]
    spread: int = 20
    scenario: str = ""
    rooms: tuple[Room, ...] = ()
    ways: Mapping[Point, Sequence[Point]] = dataclasses.field(default_factory=dict)
    share: float = 1.0
    held_out: bool = False

    def caption(self, view: str, track: np.ndarray) -> str:
        """What a shot shows.

        Args:
          view: "first" or "third".
          track: [picture, 2], x and y. Of the rooms that it leads through, up to three are named,
            those where it stays longest, in their order.
        """
        words = f"{view.capitalize()} person view, {self.words}"
        x, y = track.T
        inside = [room.holds(x, y) for room in self.rooms]
        longest = sorted(range(len(inside)), key=lambda i: -inside[i].sum())[:3]
        seen = sorted((int(inside[i].argmax()), i) for i in longest if inside[i].any())
        if seen:
            words += " with " + ", then ".join(self.rooms[i].words for _, i in seen)
        return f"{words}."


def _both_ways(*pairs: tuple[Point, Point]) -> dict[Point, tuple[Point, ...]]:
    ways: dict[Point, tuple[Point, ...]] = {}
    for a, b in pairs:
        ways[a] = (*ways.get(a, ()), b)
        ways[b] = (*ways.get(b, ()), a)
    return ways


# The centres of my_way_home's rooms, and the ends of its two blind corridors.
_STEEL, _NAVY, _CRATES, _WHITE = (240, 176), (464, 176), (464, -48), (688, 176)
_LAMPS, _RED, _BLUE, _VINES = (688, -48), (464, 464), (1040, -48), (1040, 176)
_BEND, _NOOK, _END = (464, 672), (544, 672), (1040, 360)
_WAYS = _both_ways(
    (_STEEL, _NAVY), (_NAVY, _CRATES), (_NAVY, _WHITE), (_NAVY, _RED), (_CRATES, _LAMPS),
    (_WHITE, _LAMPS), (_RED, _BEND), (_BEND, _NOOK), (_LAMPS, _BLUE), (_BLUE, _VINES),
    (_VINES, _END),
)  # fmt: skip


def _room(words: str, centre: Point) -> Room:
    x, y = centre
    return Room(words, x - 80, y - 80, x + 80, y + 80)


PLACES = {
    place.name: place
    for place in (
        Place(
            "maze",
            "MAP01",
            "a maze of brown brick",
            starts=tuple(_WAYS),
            spread=12,
            scenario="my_way_home.wad",
            rooms=(
                _room("grey steel doors", _STEEL),
                _room("a dark blue wall", _NAVY),
                _room("a wall of grey crates", _CRATES),
                _room("a white panel wall", _WHITE),
                _room("a black wall with orange lamps", _LAMPS),
                _room("a red wall", _RED),
                _room("a silver wall with blue lights", _BLUE),
                _room("a green vine wall", _VINES),
            ),
            ways=_WAYS,
            share=3.0,  # a world of rooms, each with words of its own
        ),
        Place(
            "lava",
            "MAP29",
            "a lake of lava and white rocks under a red sky",
            starts=(
                (4256, -1248), (4600, -320), (992, 2336), (3952, -936), (2728, -560),
                (3232, -1472), (1360, 1608), (992, 1696), (3784, 1008), (3680, 416), (3896, 1496),
            ),
            rooms=(Room("a lawn and a keep of green stone", 2624, 256, 4224, 1984),),
        ),
        Place(
            "canyon",
            "MAP10",
            "a canyon of brown rock with grass and blue water under a dark sky",
            starts=(
                (-1264, -776), (-4368, -848), (-520, -584), (-1472, -3024), (-2160, -872),
                (-3784, 136), (-1840, -720), (-2896, 368), (912, -1456), (-1312, -368),
            ),
        ),
        Place(
            "fortress",
            "MAP32",
            "a fortress of green stone with a floor of moss",
            starts=(
                (-1376, -384), (704, -448), (1216, -1312), (-544, 192), (1936, -960), (1248, -416),
                (-16, -192), (528, 192), (1760, -1504), (2240, -896),
            ),
        ),
        Place(
            "quarry",
            "MAP07",
            "a quarry of white and grey rock with green slime under a dark sky",
            starts=(
                (-1120, 592), (-2080, 1088), (-544, 832), (-1056, -1440), (-1504, -1440),
                (-1392, -736), (-1720, -552),
            ),
        ),
        Place(
            "village",
            "MAP17",
            "a village of brown stone with grass and blue water under a night sky",
            starts=(
                (56, 592), (1056, -656), (-760, -888), (-240, -2624), (-376, 1352), (-144, -1136),
                (640, -832), (288, -1824), (-424, -3232), (-352, -736), (400, -1232), (128, -1376),
            ),
            held_out=True,
        ),
    )
}  # fmt: skip
