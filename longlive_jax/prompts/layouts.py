"""File names that benchmarks of video models look for, of prompts in a file of theirs.

vbench, vbench_long: `<prompt>-<sample>.mp4`, of a text with a prompt a line.
vbench2: `<dimension>/<first 180 characters of the prompt>-<sample>.mp4`, of a folder with a text
  for each dimension, or of one such text.
The prompts are the benchmarks' own, which their rules forbid to change: they are read from where
the user has them.
"""

import dataclasses
import os
import pathlib

from longlive_jax.errors import InputError
from longlive_jax.files import regular
from longlive_jax.files.names import entries

LAYOUTS = ("vbench", "vbench2", "vbench_long")
_SHORT = 180  # characters of a prompt in a name of vbench2
_LONGEST = 255  # bytes of a file name
_PARTIAL = len(".") + len(".partial-12345678-4194304")  # of the file while it is written


@dataclasses.dataclass(frozen=True)
class Item:
    """A video to make. file: relative to the benchmark's folder. sample: from 0."""

    file: str
    prompt: str
    sample: int


def items(layout: str, path: str | os.PathLike, samples: int) -> list[Item]:
    """All videos that a layout of LAYOUTS wants of these prompts, in the order of the prompts.

    Lines that are the same are made once.

    Raises:
      InputError: no such prompts; or one that cannot be a file's name, or has that of another.
    """
    path = pathlib.Path(path)
    found: dict[str, Item] = {}
    for folder, text in _texts(layout, path):
        for number, prompt in enumerate(_lines(text), start=1):
            where = f"--prompts={text}: prompt {number}, {prompt[:60]!r}"
            short = prompt[:_SHORT].rstrip() if layout == "vbench2" else prompt
            for sample in range(samples):
                name = f"{short}-{sample}.mp4"
                _check(name, where)
                item = Item(f"{folder}{name}", prompt, sample)
                if found.setdefault(item.file, item) != item:
                    raise InputError(f"{where}: another prompt has its file name {item.file!r}")
    return list(found.values())


def _texts(layout, path):
    """(folder of the videos, with a slash, or "", text) of each text with prompts."""
    if not path.exists():
        raise InputError(f"--prompts={path}: does not exist; give the prompts of the benchmark")
    if layout != "vbench2":
        if path.is_dir():
            raise InputError(f"--prompts={path}: is a folder; {layout} needs a .txt of prompts")
        return [("", path)]
    texts = [path] if path.is_file() else [p for p in entries(path, ".txt") if p.is_file()]
    if not texts:
        raise InputError(f"--prompts={path}: has no .txt; vbench2 has one for each dimension")
    return [(f"{text.stem}/", text) for text in texts]


def _lines(text: pathlib.Path) -> list[str]:
    try:
        content = regular.read(text, regular.MAX_TEXT).decode("utf-8-sig")
        lines = content.replace("\r", "\n").split("\n")
    except (OSError, ValueError) as error:  # not UTF-8, too large, a pipe
        raise InputError(f"--prompts={text}: cannot be read: {error}") from error
    lines = [line.strip() for line in lines]
    if not any(lines):
        raise InputError(f"--prompts={text}: is empty; write a prompt to each line")
    return [line for line in lines if line]


def _check(name: str, where: str) -> None:
    if bad := [c for c in "/\\\0" if c in name]:
        raise InputError(f"{where}: has {bad[0]!r}, which no file's name can have; change the line")
    if (size := len(name.encode())) > _LONGEST - _PARTIAL:
        raise InputError(
            f"{where}: would have a file name of {size} bytes, the limit is "
            f"{_LONGEST - _PARTIAL}: {_LONGEST} less what is added while it is written; shorten it"
        )
