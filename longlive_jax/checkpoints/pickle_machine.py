"""A machine for the pickles that hold weights: it makes plain containers, and runs nothing.

A pickle is a program for a machine with a stack and a memo. Python's own machine hashes, compares
and prints what the program likes, and twelve bytes make it reserve gigabytes. This one reads one
opcode after another. Keys of dicts and members of sets are texts and numbers, so that nothing
nested is ever hashed; names are resolved by the caller alone; and there are limits on the opcodes
and on what calls are given.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Iterable
from typing import Any

MAX_BYTES = 64 << 20  # of a program; of 1,000 tensors and their optimiser's state it has 1 MB
MAX_STEPS = 1_000_000  # opcodes, and values that calls are given; that file has 100,000
MAX_LEVELS = 100  # of containers in each other; state dicts have about six
_MAX_LONG = 255  # bytes of a whole number, as a random generator's state may have

_VALUES = frozenset(
    ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
     "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
     "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
)  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = frozenset(
    ("MARK", "POP", "POP_MARK", "DUP", "TUPLE", "LIST", "APPEND", "APPENDS", "DICT", "SETITEM",
     "SETITEMS", "ADDITEMS", "FROZENSET", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET",
     "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID")
)  # fmt: skip
_MARK = object()


class Call:
    """A callable that a program may use; it gets values of the machine, and checks them."""

    __slots__ = ("run",)

    def __init__(self, run: Callable):
        self.run = run

    def __setstate__(self, state):
        raise pickle.UnpicklingError("a callable cannot be changed")


class Dict(dict):
    """An OrderedDict's stand-in, which forgets attributes (state dicts carry `_metadata`)."""

    __slots__ = ()


def run(
    program: bytes, find: Callable[[str, str], Any], storage: Callable[[Any], Any]
) -> tuple[Any, int]:
    """Runs a program.

    Args:
      find: the object of a module and a name.
      storage: the object of a persistent id.

    Returns:
      the object that it makes, and the number of bytes that were read.

    Raises:
      pickle.UnpicklingError: it is damaged, passes a limit, or does what weights do not need.
      Exception: whatever `find`, `storage` and the callables raise.
    """
    if len(program) > MAX_BYTES:
        raise pickle.UnpicklingError(f"{len(program)} bytes, at most {MAX_BYTES} are read")
    machine = _Machine(find, storage)
    stream = io.BytesIO(program)
    for opcode, argument, _ in pickletools.genops(stream):
        machine.step(opcode.name, argument)
    if len(machine.stack) != 1 or machine.stack[0] is _MARK:
        raise pickle.UnpicklingError(f"{len(machine.stack)} objects are left at its end")
    _check_levels(machine.stack[0])
    return machine.stack[0], stream.tell()


def _check_levels(value: Any) -> None:
    """Refuses containers that contain themselves, and too many of them in each other."""
    levels: dict[int, int] = {}  # how many a container has below it; -1: it is being counted
    waiting = [value]
    while waiting:
        top = waiting[-1]
        if levels.get(id(top), -1) >= 0:  # it was reached on another way
            waiting.pop()
            continue
        inner = [x for x in _content(top) if isinstance(x, dict | list | tuple)]
        if id(top) in levels:
            waiting.pop()
            levels[id(top)] = 1 + max((levels[id(x)] for x in inner), default=0)
            if levels[id(top)] > MAX_LEVELS:
                raise pickle.UnpicklingError(f"more than {MAX_LEVELS} containers in each other")
            continue
        levels[id(top)] = -1
        if any(levels.get(id(x)) == -1 for x in inner):
            raise pickle.UnpicklingError("a container that contains itself")
        waiting += inner


def _content(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def plain(value: Any) -> Any:
    """`value`, if it is a text, bytes, a usual number or None: what may be hashed and printed.

    Raises:
      pickle.UnpicklingError: it is anything else.
    """
    # Larger whole numbers, and complex ones, can be chosen so that all have one hash.
    if isinstance(value, str | bytes | float | None) or (
        isinstance(value, int) and abs(value) < 1 << 63
    ):
        return value
    raise pickle.UnpicklingError(f"a {type(value).__name__} where a text or a number belongs")


class _Machine:
    def __init__(self, find, storage):
        self._find, self._storage = find, storage
        self.stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0

    def step(self, name: str, argument: Any) -> None:
        self._spend(1)
        if name in _VALUES:
            if type(argument) is int and argument.bit_length() > 8 * _MAX_LONG:
                raise pickle.UnpicklingError(f"a whole number of {argument.bit_length()} bits")
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            self._push_tuple(self._take_many(_TUPLES[name]))
        elif name in _OPCODES:
            getattr(self, f"_{name.lower()}")(argument)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise pickle.UnpicklingError(f"opcode {name}")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise pickle.UnpicklingError(f"more than {MAX_STEPS} steps")

    def _take(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise pickle.UnpicklingError("an empty stack")
        return self.stack.pop()

    def _top(self, kind: type | tuple[type, ...]) -> Any:
        """The object on top, which must be of this kind; it stays there."""
        if not self.stack or self.stack[-1] is _MARK or not isinstance(self.stack[-1], kind):
            raise pickle.UnpicklingError("an opcode for another object than the one on the stack")
        return self.stack[-1]

    def _take_many(self, number: int) -> list[Any]:
        return [self._take() for _ in range(number)][::-1]

    def _take_marked(self) -> list[Any]:
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise pickle.UnpicklingError("no mark on the stack")
        self.stack.pop()
        return items[::-1]

    def _mark(self, argument: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, argument: Any) -> None:
        if not self.stack:
            raise pickle.UnpicklingError("an empty stack")
        self.stack.pop()

    def _pop_mark(self, argument: Any) -> None:
        self._take_marked()

    def _dup(self, argument: Any) -> None:
        self.stack.append(self._top(object))

    # Containers.

    def _push_tuple(self, items: list[Any]) -> None:
        self.stack.append(tuple(items))

    def _tuple(self, argument: Any) -> None:
        self._push_tuple(self._take_marked())

    def _list(self, argument: Any) -> None:
        self.stack.append(self._take_marked())

    def _append(self, argument: Any) -> None:
        item = self._take()
        self._top(list).append(item)

    def _appends(self, argument: Any) -> None:
        items = self._take_marked()
        self._top(list).extend(items)

    def _dict(self, argument: Any) -> None:
        items = self._take_marked()
        self.stack.append({})
        self._update(items)

    def _setitem(self, argument: Any) -> None:
        self._update(self._take_many(2))

    def _setitems(self, argument: Any) -> None:
        self._update(self._take_marked())

    def _update(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise pickle.UnpicklingError("a key without a value")
        keys = [plain(key) for key in items[::2]]
        self._top(dict).update(zip(keys, items[1::2]))

    def _additems(self, argument: Any) -> None:
        items = self._take_marked()
        self._top(set).update(map(plain, items))

    def _frozenset(self, argument: Any) -> None:
        self.stack.append(frozenset(map(plain, self._take_marked())))

    # The memo.

    def _memoize(self, argument: Any) -> None:
        self._put(len(self._memo))

    def _put(self, argument: Any) -> None:
        self._memo[argument] = self._top(object)

    def _get(self, argument: Any) -> None:
        if argument not in self._memo:
            raise pickle.UnpicklingError(f"nothing is remembered as {argument}")
        self.stack.append(self._memo[argument])

    _binput = _long_binput = _put
    _binget = _long_binget = _get

    # Names and calls.

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(self._find(module, name))

    def _stack_global(self, argument: Any) -> None:
        module, name = self._take_many(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise pickle.UnpicklingError("a name that is no text")
        self.stack.append(self._find(module, name))

    def _reduce(self, argument: Any) -> None:
        call, arguments = self._take_many(2)
        if not isinstance(call, Call) or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError(f"a call of a {type(call).__name__}")
        self._spend(sum(len(a) for a in arguments if hasattr(a, "__len__")))
        self.stack.append(call.run(*arguments))

    def _build(self, argument: Any) -> None:
        self._take()
        self._top(Dict)  # its attributes are forgotten; no other object has any

    def _binpersid(self, argument: Any) -> None:
        self.stack.append(self._storage(self._take()))
