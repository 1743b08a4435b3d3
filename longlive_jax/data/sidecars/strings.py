"""Actions in a line of text: "w*48, a*12, w+d*6, yaw+3*24, w+pitch-1*8, still*10".

    actions  piece, piece, ...         one after the other
    piece    what+what+...*pictures    all of these at once, for so many pictures
    what     w, up, space, KeyW, ...   a key that is held (`sidecars.keys`), in any case
             yaw+3, pitch-1.5          the mouse, in degrees a picture: right and up are positive
             still                     nothing

The last piece may have no number of pictures: it lasts to the end of the video.
"""

import re
from typing import NoReturn

import numpy as np

from longlive_jax.data.sidecars import keys as keys_lib
from longlive_jax.data.sidecars.actions import Actions
from longlive_jax.errors import InputError

MAX_PICTURES = 10_000_000  # of a line: five days; a larger number is a slip of the pen
_MAX_TEXT = 1 << 20
STILL = "still"
_SPACES = re.compile(r"\s*([+*-])\s*")
_COUNT = re.compile(r"\*(\d+)$")
_JOIN = re.compile(r"(?<!yaw)(?<!pitch)\+", re.IGNORECASE)  # an axis has a sign of its own
_LOOK = re.compile(r"(yaw|pitch)([+-](?:\d+\.?\d*|\.\d+))?", re.IGNORECASE)


def parse(text: str, frames: int | None = None, fps: float = 24.0) -> Actions:
    """The actions of a line.

    Args:
      frames: pictures of the video; None: as many as the line says.
      fps: of the video.

    Raises:
      InputError: something that is not in the grammar above, named by its piece; other than
        `frames` pictures.
    """
    if len(text) > _MAX_TEXT:
        raise InputError(f"actions: a line of {len(text)} characters; write a sidecar instead")
    texts = [piece.strip() for piece in text.split(",")]
    pieces = [_piece(piece, i, len(texts), frames) for i, piece in enumerate(texts)]
    total = sum(count for _, _, count in pieces if count is not None)
    if pieces[-1][2] is None:
        assert frames is not None
        if total >= frames:
            raise InputError(
                f"actions: {total} pictures before the last piece {texts[-1]!r:.60}, which is to "
                f"last to the end of a video of {frames}: longer than the video; shorten them"
            )
        pieces[-1] = (*pieces[-1][:2], frames - total)
    elif frames is not None and total < frames:
        raise InputError(
            f"actions: {total} pictures for a video of {frames}: shorter than the video; end with "
            f"', {STILL}', or another piece without a number: it lasts to the end"
        )
    if (total := sum(count or 0 for _, _, count in pieces)) > MAX_PICTURES:
        raise InputError(f"actions: {total} pictures, the limit is {MAX_PICTURES}")
    names = tuple(dict.fromkeys(name for held, _, _ in pieces for name in held))
    counts = [count or 0 for _, _, count in pieces]
    keyboard = np.zeros((len(pieces), len(names)), np.float32)
    for row, (held, _, _) in enumerate(pieces):
        keyboard[row, [names.index(name) for name in held]] = 1
    mouse = np.asarray([move for _, move, _ in pieces], np.float32)
    actions = Actions(
        keyboard=keyboard.repeat(counts, axis=0), mouse=mouse.repeat(counts, axis=0), fps=fps,
        keys=names, source="a line of text",
    )  # fmt: skip
    actions.check_video(frames)
    return actions


def _piece(
    text: str, index: int, number: int, frames: int | None
) -> tuple[list[str], tuple[float, float], int | None]:
    """Codes that are held, degrees of (pitch, yaw), and pictures; None: to the end."""

    def refuse(why: str) -> NoReturn:
        raise InputError(f"actions: piece {index + 1} of {number}, {text[:60]!r}: {why}")

    if not text:
        refuse("is empty; write what is held, such as w*12")
    plain = _SPACES.sub(r"\1", text)
    match = _COUNT.search(plain)
    whats = _JOIN.split(plain[: match.start()] if match else plain)
    held, move = list[str](), dict[str, float]()
    for what in whats:
        if look := _LOOK.fullmatch(what):
            axis, degrees = look[1].lower(), look[2]
            if degrees is None:
                refuse(f"{axis} needs degrees a picture with a sign, such as {axis}+3")
            if axis in move:
                refuse(f"{axis} is in it twice; give it once")
            move[axis] = float(degrees)
        elif what.lower() == STILL:
            if len(whats) > 1:
                refuse(f"{STILL} stands alone: nothing is held or moved")
        else:
            name = keys_lib.named(what)
            if name is None:
                refuse(
                    f"{what[:20]!r} is unknown; a piece is keys (w, up, space, KeyW), yaw+DEGREES "
                    f"and pitch-DEGREES joined with +, or {STILL}, and then *PICTURES"
                )
            if name in held:
                refuse(f"{name} is in it twice; give it once")
            held.append(name)
    count = _count(match, refuse, index + 1 == number, frames)
    return held, (move.get("pitch", 0.0), move.get("yaw", 0.0)), count


def _count(match, refuse, last: bool, frames: int | None) -> int | None:
    if match is None:
        if not last:
            refuse("needs a number of pictures, such as w*12; only the last piece may be without")
        if frames is None:
            refuse("needs a number of pictures, such as w*12: there is no video that ends it")
        return None
    digits = match[1]
    if len(digits) > len(str(MAX_PICTURES)) or not 1 <= int(digits) <= MAX_PICTURES:
        refuse(f"lasts {digits[:20]} pictures; it must be 1 to {MAX_PICTURES}")
    return int(digits)
