"""Collectives of a compiled program, from its text: what devices send by kind, loops counted."""

import collections
import math
import re

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
# Of the bytes that one gives, how much a device sends to a group of n, by rings.
_SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-reduce": lambda n: 2 * (n - 1) / n,
}
_LINE = re.compile(r"^\s*(?:ROOT )?%?\S+ = (.*?) ([\w-]+)\(")


def sent(text: str, loops: int | None = None) -> dict[str, float]:
    """Bytes that a device sends by kind. loops: how often a loop of unknown length runs."""
    found = collections.defaultdict(float)
    parts, entry = _computations(text)
    _walk(parts, entry, 1, loops, found)
    return dict(found)


def _walk(parts, name, times, loops, found):
    for line in parts[name]:
        if not (match := _LINE.match(line)):
            continue
        shape, op = match[1], match[2].removesuffix("-start")
        if op in _SENT:
            result = shape if op == match[2] else _result(shape)
            found[op] += times * _size(result) * _SENT[op](_group(line))
        again = times
        if op == "while":
            count = re.search(r"known_trip_count\D+(\d+)", line)
            assert count or loops, line[:200]
            again = times * (int(count[1]) if count else loops)
        for inner in re.findall(
            r"(?:body|calls|to_apply|branch_computations)=\{?%?([\w.-]+)", line
        ):
            if op not in ("all-reduce", "reduce-scatter", "reduce") and inner in parts:
                _walk(parts, inner, again, loops, found)


def _computations(text):
    parts, entry, name = {}, None, None
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.-]+) .*\{$", line):
            name = head[2]
            entry = name if head[1] else entry
            parts[name] = []
        elif name is not None:
            parts[name].append(line)
    assert entry is not None
    return parts, entry


def _result(shape):
    """The last array of a started operation's (operand, result, ...)."""
    return re.findall(r"\w+\[[\d,]*\]", shape)[1]


def _size(shape):
    total = 0
    for kind, dims in re.findall(r"(\w+)\[([\d,]*)\]", shape):
        total += _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n)
    return total


def _group(line):
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return len(match[1].split(","))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    match = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line)
    assert match, line[:300]
    sizes = dict(pair.split("=") for pair in match[1].split(","))
    return math.prod(int(sizes[axis]) for axis in match[2].split(","))
