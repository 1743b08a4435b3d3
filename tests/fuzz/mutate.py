"""Mutations of bytes and of JSON: functions of a random generator and of what they change."""

import copy
import json
import random
import struct

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 1 << 20, 1 << 27, (1 << 31) - 1,
            1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)  # fmt: skip
_FORMS = ("<B", "<H", ">H", "<I", ">I", "<Q", ">Q")


def mutated(draw: random.Random, data: bytes, others: list[bytes]) -> bytes:
    """`data` after one to three mutations; `others`: more files of the kind, to splice with."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        change = draw.choice(_BYTES)
        data = _splice(draw, data, others) if change is _splice else change(draw, data)
    return data


def _at(draw, data, size=1):
    """Where to change: half of the time among the first bytes, where headers are."""
    most = max(0, len(data) - size)
    return draw.randint(0, min(most, 128) if draw.random() < 0.5 else most)


def _range(draw, data):
    start = _at(draw, data)
    return start, min(len(data), start + int(2 ** draw.uniform(0, 10)))


def _flip(draw, data):
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 4, 16)) if data else 0):
        out[_at(draw, out)] ^= 1 << draw.randrange(8)
    return bytes(out)


def _set(draw, data):
    out = bytearray(data)
    if out:
        out[_at(draw, out)] = draw.choice((0, 1, 0x20, 0x7F, 0x80, 0xFF, draw.randrange(256)))
    return bytes(out)


def _number(draw, data):
    """A number at an extreme: most of them are lengths, counts and offsets."""
    form = draw.choice(_FORMS)
    size = struct.calcsize(form)
    value = draw.choice((*EXTREMES, len(data), len(data) - 1)) & ((1 << 8 * size) - 1)
    at = _at(draw, data, size)
    return data[:at] + struct.pack(form, value) + data[at + size :]


def _cut(draw, data):
    return data[: _at(draw, data)]


def _insert(draw, data):
    at = _at(draw, data)
    start, end = _range(draw, data)
    new = draw.choice((draw.randbytes(draw.randint(1, 64)), data[start:end], bytes(end - start)))
    return data[:at] + new + data[at:]


def _delete(draw, data):
    start, end = _range(draw, data)
    return data[:start] + data[end:]


def _fill(draw, data):
    start, end = _range(draw, data)
    return data[:start] + draw.choice((b"\0", b"\xff")) * (end - start) + data[end:]


def _swap(draw, data):
    """Two pieces that lie side by side change places."""
    start, end = _range(draw, data)
    last = min(len(data), 2 * end - start)
    return data[:start] + data[end:last] + data[start:end] + data[last:]


def _append(draw, data):
    return data + draw.choice((b"\0" * 100, data[: draw.randint(1, 4096)], b"\n", b"{}"))


def _splice(draw, data, others):
    other = draw.choice(others)
    return data[: _at(draw, data)] + other[_at(draw, other) :]


_BYTES = (_flip, _flip, _flip, _set, _number, _number, _cut, _insert, _delete, _fill, _swap,
          _append, _splice)  # fmt: skip


# JSON.

_VALUES = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, "", "0",
    "a" * 300, "../x", "/etc/passwd", "\0", "\ud800", "é\u2028", "float32", "object", "bfloat16",
    [], {}, [[]], [None], [0], [-1], [1 << 40], [1] * 100, {"": {}}, {"a": 1}, "1" * 5000,
)  # fmt: skip
_TEXTS = ("NaN", "Infinity", "1e999", "[" * 100_000, '{"a":' * 20_000, "1" * 5_000, '"\\ud800"')
_HOLE = "hole-of-the-text"


def mutated_json(draw: random.Random, data: bytes) -> bytes:
    """A JSON text after one to three changes of its structure."""
    value = json.loads(data)
    text = None
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if draw.random() < 0.1:
            value, text = _replaced(draw, value, _HOLE), draw.choice(_TEXTS)
        else:
            value = _changed(draw, value)
    out = json.dumps(value)
    if text is not None:
        out = out.replace(f'"{_HOLE}"', text)
    if draw.random() < 0.05 and out.startswith("{") and len(out) > 2:  # a name twice
        out = out[:-1] + "," + out[1:]
    return out.encode()


def _places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*path, key))


def _get(value, path):
    for key in path:
        value = value[key]
    return value


def _replaced(draw, value, new, path=None):
    path = draw.choice(list(_places(value))) if path is None else path
    if not path:
        return new
    value = copy.deepcopy(value)
    _get(value, path[:-1])[path[-1]] = new
    return value


def _changed(draw, value):
    places = list(_places(value))
    path, other = draw.choice(places), draw.choice(places)
    old = _get(value, path)
    change = draw.randrange(6)
    if change == 0 and path:
        value = copy.deepcopy(value)
        del _get(value, path[:-1])[path[-1]]
        return value
    if change == 1 and isinstance(old, dict):
        new = {
            **old,
            draw.choice(("", "x", "..", "a/b", "0", "__metadata__")): draw.choice(_VALUES),
        }
    elif change == 2 and isinstance(old, list) and old:
        new = draw.choice((old + old, old[::-1], old[:-1], old[1:], [old]))
    elif change == 3 and isinstance(old, int | float):
        new = draw.choice((old + 1, old - 1, -old, old * 2, str(old), old + 0.5, *EXTREMES))
    elif change == 4:
        new = copy.deepcopy(_get(value, other))
    else:
        new = draw.choice(_VALUES)
    return _replaced(draw, value, new, path)


def mutated_chunks(draw: random.Random, chunks: list[bytes]) -> list[bytes]:
    """Pieces of a file (boxes, members, lines): one is left out, twice, moved or swapped."""
    chunks = list(chunks)
    i, j = draw.randrange(len(chunks)), draw.randrange(len(chunks))
    match draw.randrange(4):
        case 0:
            chunks[i], chunks[j] = chunks[j], chunks[i]
        case 1:
            chunks.insert(j, chunks[i])
        case 2:
            chunks.pop(i)
        case 3:
            chunks[i] = chunks[j]
    return chunks
