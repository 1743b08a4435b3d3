"""Messages of a stream's WebSocket: text up and down, and pictures down with a binary header."""

import json
import struct
from typing import Any, NamedTuple

from longlive_jax.serving.limits import Limits, Refused

# magic, version, flags, stream, chunk, frame, event, payload bytes, server time in ms since epoch.
HEADER = struct.Struct("<HBBIIIIId")
HEADER_BYTES = 32
MAGIC, VERSION = 0x4C4C, 1
KEY, FIRST, JPEG, CUT = 1, 2, 4, 8  # flags

MODES = ("continue", "cut", "recache", "blend")
_NUMBER = (int, float)


class Header(NamedTuple):
    """What stands before a picture. `event`: the newest applied event's, 0 for none."""

    flags: int
    stream: int
    chunk: int
    frame: int
    event: int
    size: int
    time_ms: float

    def pack(self) -> bytes:
        """The 32 bytes, little-endian."""
        return HEADER.pack(MAGIC, VERSION, *self)


def unpack(message: bytes) -> tuple[Header, bytes]:
    """The header and the payload of a picture's message."""
    magic, version, *rest = HEADER.unpack_from(message)
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(f"not a picture: magic {magic:#x}, version {version}")
    header = Header(*rest)
    return header, message[HEADER_BYTES : HEADER_BYTES + header.size]


# The fields of each message up: name, types, whether it must be there.
UP: dict[str, dict[str, tuple[Any, bool]]] = {
    "prompt": {"text": (str, True), "mode": (str, False), "chunks": (int, False),
               "at": (int, False), "event_id": (int, False)},
    "keys": {"t": (_NUMBER, False), "codes": (list, True), "dx": (_NUMBER, False),
             "dy": (_NUMBER, False), "event_id": (int, False)},
    "pause": {"paused": (bool, True), "event_id": (int, False)},
    "settings": {"steps": (int, False), "guidance": (_NUMBER, False), "event_id": (int, False)},
    "keyframe": {"event_id": (int, False)},
    "seen": {"frame": (int, True)},
}  # fmt: skip
DOWN = ("hello", "accepted", "applied", "queue", "stats", "error", "end")


def parse(text: str, limits: Limits) -> dict[str, Any]:
    """A message of a client, checked field by field.

    Raises:
      Refused: it is none of `UP`, or over a limit.
    """
    if len(text) > limits.message_bytes:
        raise Refused(413, f"a message of {len(text)} bytes; the limit is {limits.message_bytes}")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "a message that is not JSON") from error
    if not isinstance(message, dict) or message.get("type") not in UP:
        raise Refused(400, f"a message needs a type: one of {', '.join(UP)}")
    kind = message["type"]
    fields = UP[kind]
    for name, value in message.items():
        if name == "type":
            continue
        if name not in fields:
            raise Refused(400, f"{kind}: unknown field; known: {', '.join(fields)}")
        _check(kind, name, value, fields[name][0])
    for name, (_, needed) in fields.items():
        if needed and name not in message:
            raise Refused(400, f"{kind}: {name} is missing")
    if kind == "prompt":
        message["text"] = prompt(message["text"], limits)
        if message.setdefault("mode", "continue") not in MODES:
            raise Refused(400, f"prompt: mode must be one of {', '.join(MODES)}")
        if not 1 <= message.setdefault("chunks", 4) <= 100:
            raise Refused(400, "prompt: chunks must be 1 to 100")
    if kind == "keys" and (
        len(message["codes"]) > 16
        or not all(isinstance(code, str) and len(code) <= 32 for code in message["codes"])
    ):
        raise Refused(400, "keys: codes must be at most 16 names of keys")
    return message


def prompt(text: Any, limits: Limits) -> str:
    """A prompt in one line.

    Raises:
      Refused: it is empty, too long, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise Refused(400, "the prompt is empty; write what the video shows")
    if len(text) > limits.prompt:
        raise Refused(
            413, f"a prompt of {len(text)} characters; the limit is {limits.prompt}: shorten it"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(400, "the prompt has half a character (a lone surrogate)") from error
    return " ".join(text.replace("\0", " ").split())


def whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number of a request.

    Raises:
      Refused: it is another thing, or outside least..most.
    """
    if type(value) is not int or not least <= value <= most:
        raise Refused(400, f"{name} must be a whole number from {least} to {most}")
    return value


def _check(kind, name, value, types):
    good = isinstance(value, types) and (types is bool or not isinstance(value, bool))
    if good and types is int:
        good = 0 <= value < 2**32
    elif good and types is _NUMBER:
        good = abs(value) < 1e15  # NaN and infinity fail, too
    if not good:
        raise Refused(400, f"{kind}: {name} is of the wrong type, or out of range")
