"""Names of keys: the W3C's codes, which name a place on the keyboard and not a letter.

Buttons of a mouse have no code there; here they are Mouse0 (left), Mouse1 (middle), Mouse2 (right),
Mouse3 and Mouse4, by the numbers of the W3C's `MouseEvent.button`.
"""

import difflib
import string
from collections.abc import Iterable

from longlive_jax.errors import InputError

_SIDES = ("Left", "Right")
CODES = (
    *(f"Key{letter}" for letter in string.ascii_uppercase),
    *(f"Digit{n}" for n in range(10)),
    *(f"Arrow{way}" for way in ("Up", "Down", "Left", "Right")),
    *(f"{name}{side}" for name in ("Shift", "Control", "Alt", "Meta") for side in _SIDES),
    "Space", "Enter", "Tab", "Escape", "Backspace", "CapsLock", "ContextMenu",
    "Backquote", "Minus", "Equal", "BracketLeft", "BracketRight", "Backslash", "IntlBackslash",
    "Semicolon", "Quote", "Comma", "Period", "Slash",
    "Insert", "Delete", "Home", "End", "PageUp", "PageDown",
    *(f"F{n}" for n in range(1, 13)),
    *(f"Numpad{n}" for n in range(10)),
    *(f"Numpad{name}" for name in ("Add", "Subtract", "Multiply", "Divide", "Decimal", "Enter")),
    *(f"Mouse{n}" for n in range(5)),
)  # fmt: skip
_ALL = frozenset(CODES)
# What people write for them, in any case; a code's own name is taken too.
_SHORT = {
    **{letter: f"Key{letter.upper()}" for letter in string.ascii_lowercase},
    **{str(n): f"Digit{n}" for n in range(10)},
    **{way: f"Arrow{way.title()}" for way in ("up", "down", "left", "right")},
    "shift": "ShiftLeft", "ctrl": "ControlLeft", "control": "ControlLeft", "alt": "AltLeft",
    "esc": "Escape",
    **{code.lower(): code for code in CODES},
}  # fmt: skip


def named(word: str) -> str | None:
    """The code of a key as people write it: "w", "up", "space", "shift", "keyw"; None: no key."""
    return _SHORT.get(word.lower())


def check(names: Iterable[str], where: str) -> tuple[str, ...]:
    """The names, each a known code and there once.

    Raises:
      InputError: an unknown one, or one that is there twice. `where` is for the message.
    """
    names = tuple(names)
    for i, name in enumerate(names):
        if name not in _ALL:
            near = named(str(name)) or (*difflib.get_close_matches(str(name), CODES, 1), "KeyW")[0]
            raise InputError(
                f"{where}: unknown key {name!r:.60}; keys are W3C codes such as {near!r}, and "
                "Mouse0 to Mouse4"
            )
        if name in names[:i]:
            raise InputError(f"{where}: key {name!r} is there twice; name each once")
    return names
