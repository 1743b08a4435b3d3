"""Which video of a folder was made of which prompts."""

import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence

from longlive_jax.errors import InputError
from longlive_jax.files.names import is_stray


def videos(folder: pathlib.Path) -> list[pathlib.Path]:
    """All mp4s in a folder and in folders below, sorted.

    Raises:
      InputError: it is no folder, or there are none.
    """
    if not folder.is_dir():
        raise InputError(f"--videos={folder}: is no folder; give the one that the videos are in")
    found = sorted(p for p in folder.rglob("*.mp4") if not is_stray(p.name))
    if not found:
        raise InputError(f"--videos={folder}: has no .mp4; make some with launch.sample")
    return found


def matched(
    files: Iterable[pathlib.Path], scripts: Sequence[tuple[str, str]]
) -> Mapping[pathlib.Path, int]:
    """The number of the script that each file was made of.

    A file has the name of a script, or its first prompt and a number (as benchmarks want it), or
    the number of a script at its end, as launch.sample writes several videos. Of one script all
    files may be.

    Args:
      scripts: (name, first prompt), of each.

    Raises:
      InputError: a file that none of this holds for.
    """
    names = {name: i for i, (name, _) in enumerate(scripts)}
    prompts = [prompt for _, prompt in scripts]
    return {file: _match(file, names, prompts) for file in files}


def _match(file, names, prompts):
    stem = file.stem
    if stem in names:
        return names[stem]
    if numbered := re.fullmatch(r"(.*)-(\d+)", stem, re.DOTALL):
        same = [i for i, prompt in enumerate(prompts) if _shortened(prompt, numbered[1])]
        if same:
            return same[0]
        if len(prompts) > 1 and int(numbered[2]) < len(prompts):
            return int(numbered[2])
    if len(prompts) == 1:
        return 0
    raise InputError(
        f"{file}: its name does not say which of {len(prompts)} prompts it was made of: neither by "
        f"name ({', '.join([*names][:3])}, ...) nor by a number at its end, 000 to "
        f"{len(prompts) - 1:03d}"
    )


def _shortened(prompt: str, name: str) -> bool:
    return bool(name) and (prompt == name or (len(name) >= 180 and prompt.startswith(name)))
