"""The engine: a picture and a pose for each action, the same ones for the same actions.

A picture is a tic of the game, of which there are 35 a second; shown at 24 a second, one walks at
24/35 of the game's speed, and every action counts once.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import struct
import tempfile
import weakref
from typing import Any

import numpy as np
from PIL import Image

from longlive_jax.data.worlds.doom.places import PLACES
from longlive_jax.data.worlds.poses import Pose, wrap
from longlive_jax.data.worlds.walkers import STILL, Held
from longlive_jax.errors import InputError

UNIT = 360 / 2**16  # degrees; the game turns by whole ones
SPEED = 8.3  # units of the map a picture: the fastest walk, ahead
VIEWS = ("first", "third")
_SETTLE = 20  # tics before a player can move, and after which he stands
_HIGH = 0.75  # half the height of what is seen a unit ahead, as by default
# Nothing that is walked over changes the world: one picks nothing up, is not hurt, goes nowhere.
_PLAYER = (
    ("DECORATE", "actor Walker : DoomPlayer { -PICKUP +INVULNERABLE +NOTELEPORT }"),
    ("KEYCONF", "clearplayerclasses\naddplayerclass Walker\n"),
)
_ARGUMENTS = "+sv_nomonsters 1 +sv_cheats 1 +movebob 0 +cl_showsecretmessage 0"


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a shot begins.

    place: of PLACES. x, y: whole units of the map. yaw: degrees, 0 is east and 90 south.
    seed: of what is random in the map, such as its lamps. view: "first" or "third".
    """

    place: str
    x: int
    y: int
    yaw: float = 0.0
    seed: int = 0
    view: str = "first"

    def __post_init__(self):
        for name, known in (("place", tuple(PLACES)), ("view", VIEWS)):
            if getattr(self, name) not in known:
                raise InputError(
                    f"{name}={getattr(self, name)!r:.60} must be one of {', '.join(known)}"
                )
        for name, least, most in (
            ("x", -(2**15), 2**15),
            ("y", -(2**15), 2**15),
            ("seed", 0, 2**31),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < most:
                raise InputError(
                    f"{name}={value!r:.60} must be a whole number, {least} to {most - 1}"
                )
        if not (isinstance(self.yaw, int | float) and math.isfinite(self.yaw)):
            raise InputError(f"yaw={self.yaw!r:.60} must be a number of degrees")

    def text(self) -> str:
        """As the `source` of a sidecar."""
        return "doom " + json.dumps(dataclasses.asdict(self))

    @classmethod
    def of_text(cls, text: str) -> "Start":
        """The start that a sidecar names.

        Raises:
          InputError: it names none.
        """
        try:
            if not text.startswith("doom "):
                raise ValueError("it does not begin with 'doom '")
            return cls(**json.loads(text.removeprefix("doom ")))
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"source={text!r:.80} is no start in Doom: {error}") from error


@dataclasses.dataclass(frozen=True)
class Size:
    """Pixels of pictures, each the mean of `supersample` x `supersample` that the game draws.

    Raises:
      InputError: the game draws no picture that is large enough.
    """

    height: int = 160
    width: int = 256
    supersample: int = 2

    def __post_init__(self):
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < 32 or value % 32:
                raise InputError(f"{name}={value} must be a multiple of 32, such as 160 or 256")
        if not 1 <= self.supersample <= 4:
            raise InputError(f"supersample={self.supersample} must be 1 to 4")

    @property
    def focal(self) -> float:
        """The focal length in pixels, at any size two thirds of the height."""
        return self.height / (2 * _HIGH)

    def drawn(self, known: list[tuple[int, int]]) -> tuple[int, int]:
        """(width, height) of the smallest of the game's sizes that holds a picture.

        Raises:
          InputError: there is none.
        """
        needed = self.width * self.supersample, self.height * self.supersample
        fits = [size for size in known if size[0] >= needed[0] and size[1] >= needed[1]]
        if not fits:
            raise InputError(
                f"height={self.height}, width={self.width}, supersample={self.supersample}: the "
                f"game would draw {needed[0]}x{needed[1]} pixels, it draws 1920x1080 at most; give "
                "a smaller size"
            )
        return min(fits, key=lambda size: size[0] * size[1])


class EpisodeEndedError(Exception):
    """The game's episode is over: its exit was found."""


class BlockedError(InputError):
    """Nobody can stand where a shot is to begin."""


def snap(held: Held) -> Held:
    """What the game makes of it: moves of the mouse in whole UNITs."""
    return Held(held.keys, *(round(x / UNIT) * UNIT for x in (held.pitch, held.yaw)))


def module() -> Any:
    """The vizdoom package.

    Raises:
      InputError: it is not installed.
    """
    try:
        import vizdoom
    except ImportError as error:
        raise InputError(
            f"Doom needs ViZDoom, which is not installed ({error}); run `pip install vizdoom`"
        ) from error
    return vizdoom


def sizes() -> list[tuple[int, int]]:
    """(width, height) of the pictures that the game can draw.

    Raises:
      InputError: it is not installed.
    """
    names = [name for name in dir(module().ScreenResolution) if name.startswith("RES_")]
    return [(int(w), int(h)) for w, h in (name[4:].split("X") for name in names)]


class Game:
    """An engine with freedoom2.wad, or with a scenario of ViZDoom's over it.

    It is a process of its own, which `close` ends; a context manager closes it. While one is made,
    the working directory of this process is another for an instant.
    """

    def __init__(self, scenario: str = "", size: Size | None = None):
        vizdoom, self.scenario, self.size = module(), scenario, size or Size()
        self._third = False  # the engine keeps it over episodes
        folder = pathlib.Path(tempfile.mkdtemp(prefix="doom-"))
        self._game = vizdoom.DoomGame()
        self._end = weakref.finalize(self, _end, self._game, folder)  # at exit, too
        try:
            self._drawn = self._set_up(vizdoom, folder)
        except BaseException:
            self._end()
            raise

    def _set_up(self, vizdoom: Any, folder: pathlib.Path) -> tuple[int, int]:
        """Starts the engine; returns (width, height) of what it draws."""
        game, package = self._game, pathlib.Path(vizdoom.__path__[0])
        game.set_doom_game_path(str(_file(package / "freedoom2.wad")))
        if self.scenario:
            game.set_doom_scenario_path(str(_file(package / "scenarios" / self.scenario)))
        drawn = self.size.drawn(sizes())
        name = "RES_{}X{}".format(*drawn)
        game.set_screen_resolution(getattr(vizdoom.ScreenResolution, name))
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        for what in ("hud", "weapon", "crosshair", "decals", "particles", "messages",
                     "screen_flashes"):  # fmt: skip
            getattr(game, f"set_render_{what}")(False)
        buttons = ("MOVE_FORWARD", "MOVE_BACKWARD", "MOVE_LEFT", "MOVE_RIGHT",
                   "LOOK_UP_DOWN_DELTA", "TURN_LEFT_RIGHT_DELTA")  # fmt: skip
        game.set_available_buttons([getattr(vizdoom.Button, name) for name in buttons])
        known = ("POSITION_X", "POSITION_Y", "POSITION_Z", "ANGLE", "PITCH")
        game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in known])
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_doom_skill(3)  # the highest forbids the console's commands
        game.set_episode_timeout(0)
        game.set_doom_config_path(str(folder / "vizdoom.ini"))
        _write_wad(folder / "walker.wad", _PLAYER)
        game.add_game_args(f"{_ARGUMENTS} -file walker.wad")
        with contextlib.chdir(folder):  # the engine makes folders where it is started
            game.init()
        return drawn

    def begin(self, start: Start) -> tuple[np.ndarray, Pose]:
        """The picture and the pose with which a shot begins.

        Raises:
          InputError: the place is of another scenario.
          BlockedError: nobody can stand there.
        """
        place, game = PLACES[start.place], self._game
        if place.scenario != self.scenario:
            raise InputError(
                f"place={place.name} is in {place.scenario or 'freedoom2.wad'}, this game has "
                f"{self.scenario or 'freedoom2.wad'}"
            )
        game.set_seed(start.seed)
        game.set_doom_map(place.map)
        game.new_episode()
        self._act(STILL, _SETTLE)
        self._warp(start)
        if not self._can_move(start):
            raise BlockedError(
                f"x={start.x}, y={start.y}: nobody can stand there in {place.name}; give another "
                "start"
            )
        if self._third != (start.view == "third"):
            game.send_game_command("chase")
            self._third = not self._third
        game.send_game_command(f"fov {self._fov():.4f}")
        pose = self._warp(start)
        self._act(snap(STILL._replace(yaw=wrap(start.yaw - pose.yaw))))
        self._act(STILL, _SETTLE)
        return self._seen()

    def step(self, held: Held) -> tuple[np.ndarray, Pose]:
        """The picture and the pose that come of what is held, a tic later.

        Raises:
          EpisodeEndedError: there is none, and until the next `begin` none will be.
        """
        self._act(snap(held))
        return self._seen()

    def close(self) -> None:
        self._end()

    def _warp(self, start: Start) -> Pose:
        self._game.send_game_command(f"warp {start.x} {-start.y}")
        self._act(STILL)
        return self._seen()[1]

    def _can_move(self, start: Start) -> bool:
        """Whether one can walk from where one is; in a wall or a tree one cannot, either way."""
        for key in (0, 1):
            self._act(Held(tuple(key == i for i in range(4))), 6)
            pose = self._seen()[1]
            if math.hypot(pose.x - start.x, pose.y - start.y) > 1:
                break
        else:
            return False
        self._act(STILL, _SETTLE)
        return True

    def _fov(self) -> float:
        """Degrees to ask the game for, to see as much of the world's height at any size."""
        width, height = self._drawn
        shown = _HIGH * width / (self.size.height * self.size.supersample)  # half, with the margins
        # The game's degrees are of a screen of 4 to 3, and it adds what is to its sides.
        return 2 * math.degrees(math.atan(shown / (width / height / (4 / 3))))

    def __enter__(self) -> "Game":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _act(self, held: Held, tics: int = 1) -> None:
        self._game.make_action([*map(float, held.keys), held.pitch, held.yaw], tics)
        if self._game.is_episode_finished():
            raise EpisodeEndedError

    def _seen(self) -> tuple[np.ndarray, Pose]:
        state = self._game.get_state()
        x, y, z, angle, pitch = state.game_variables.tolist()
        pose = Pose(x, -y, -z, wrap(-angle), -pitch)
        return _middle(state.screen_buffer, self.size), pose


class Games:
    """The engines of a process, made as they are needed. A context manager closes them."""

    def __init__(self, size: Size | None = None):
        self.size = size or Size()
        self._games: dict[str, Game] = {}

    def of(self, place: str) -> Game:
        """The engine that has a place."""
        scenario = PLACES[place].scenario
        if scenario not in self._games:
            self._games[scenario] = Game(scenario, self.size)
        return self._games[scenario]

    def __enter__(self) -> "Games":
        return self

    def __exit__(self, *error) -> None:
        while self._games:
            self._games.popitem()[1].close()


def _end(game: Any, folder: pathlib.Path) -> None:
    """The engine writes its settings into the folder, so it goes first."""
    game.close()
    shutil.rmtree(folder, ignore_errors=True)


def _middle(drawn: np.ndarray, size: Size) -> np.ndarray:
    """The picture, uint8 [height, width, 3], in the middle of what the game drew."""
    n = size.supersample
    top = (drawn.shape[0] - n * size.height) // 2
    left = (drawn.shape[1] - n * size.width) // 2
    drawn = drawn[top : top + n * size.height, left : left + n * size.width]
    return drawn.copy() if n == 1 else np.asarray(Image.fromarray(drawn).reduce(n))


def _file(path: pathlib.Path) -> pathlib.Path:
    if not path.is_file():
        raise InputError(
            f"{path}: no such file, which ViZDoom comes with; run `pip install --force-reinstall "
            "vizdoom`"
        )
    return path


def _write_wad(path: str | os.PathLike, lumps) -> None:
    """A file of the game: a header, texts, and a table of where each is and what it is called."""
    body, table = b"", b""
    for name, text in lumps:
        table += struct.pack("<ii8s", 12 + len(body), len(text), name.encode())
        body += text.encode()
    head = struct.pack("<4sii", b"PWAD", len(lumps), 12 + len(body))
    pathlib.Path(path).write_bytes(head + body + table)
