"""What the content of a JSON file must look like; checked once, where the file is opened.

A schema is
    str, bool, float, int   a value of this type; an int may stand for a float, and no bool for an
                            int, which is also below 2^63
    None                    null
    object                  anything
    (A, B)                  one of these
    [A]                     a list of any length
    {str: A}                an object of any keys
    {"a": A, "b?": B}       an object with these keys, b if it likes; others are not looked at
"""

from typing import Any

_MAX_INT = 2**63  # what arrays can count


def mismatch(value: Any, schema: Any, at: str = "") -> str:
    """Where and how `value` differs from a schema; "" if it does not."""
    where = at or "the content"
    match schema:
        case type():
            return "" if _is(value, schema) else f"{where} is {_kind(value)}, not {_name(schema)}"
        case None:
            return "" if value is None else f"{where} is {_kind(value)}, not null"
        case tuple():
            found = [mismatch(value, one, at) for one in schema]
            return "" if "" in found else found[0]
        case [one]:
            if not isinstance(value, list):
                return f"{where} is {_kind(value)}, not a list"
            found = (mismatch(item, one, f"{at}[{i}]") for i, item in enumerate(value))
            return next(filter(None, found), "")
    if not isinstance(value, dict):
        return f"{where} is {_kind(value)}, not an object"
    if str in schema:
        pairs = [(key, schema[str]) for key in value]
    else:
        missing = [k for k in schema if not k.endswith("?") and k not in value]
        if missing:
            return f"{where} has no {missing[0]!r}"
        pairs = [(k.removesuffix("?"), one) for k, one in schema.items()]
        pairs = [(k, one) for k, one in pairs if k in value]
    found = (mismatch(value[key], one, f"{at}.{key[:60]}".lstrip(".")) for key, one in pairs)
    return next(filter(None, found), "")


def _is(value: Any, kind: type) -> bool:
    if kind is int:
        return type(value) is int and abs(value) < _MAX_INT
    if kind is float:
        return type(value) is float or _is(value, int)
    return isinstance(value, kind)


_NAMES = {str: "a text", bool: "true or false", int: "a whole number below 2^63", float: "a number"}


def _name(kind: type) -> str:
    return _NAMES.get(kind, kind.__name__)


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if not isinstance(value, int) or abs(value) < _MAX_INT else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."
