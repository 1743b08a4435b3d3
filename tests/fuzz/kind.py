"""What a kind of file is to the fuzzer."""

import dataclasses
import pathlib
import random
from collections.abc import Callable
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files of one kind.

    seeds: writes valid ones to an empty folder, and returns their paths: files, or folders.
    read: the product's reader; returns what it read, for `values` to be compared, or None.
    share: of all mutations, relative to other kinds; cheap readers have more.
    short: mutations in the short form.
    inner: mutations that keep a file's outer form (checksums, lengths), by the end of a file's
      name; they get the whole file.
    outer: mutations of a whole copy of a folder, in place.
    silent: whether other values than the seed's are an error, after mutations of bytes.
    apart: each file is read in a process of its own, whose exit code 2 is a refusal.
    """

    name: str
    seeds: Callable[[pathlib.Path], list[pathlib.Path]]
    read: Callable[[pathlib.Path], Any]
    share: float = 1
    short: int = 10
    inner: tuple[tuple[str, Mutation], ...] = ()
    outer: tuple[Callable[[random.Random, pathlib.Path], None], ...] = ()
    silent: bool = False
    apart: bool = False
