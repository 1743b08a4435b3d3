"""JSON files, written in one step. Files of our own formats name format and version."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path


def read(
    file: pathlib.Path, form: str, version: int, way_out: str, *, older: Sequence[int] = ()
) -> dict[str, Any]:
    """The content of a file with these "format" and "version".

    Args:
      older: earlier versions that are also read.
      way_out: what to do about a file that is damaged, or of another version; ends the message.

    Raises:
      InputError: it cannot be read, is no JSON object, or is of another format or version.
    """
    try:
        content = json.loads(file.read_text())
        found = content["format"], content["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: is damaged ({error}); {way_out}") from error
    if found[0] != form or found[1] not in (version, *older):
        raise InputError(
            f"{file}: has format {found[0]!r} version {found[1]}, this program reads {form!r} "
            f"version {version}; {way_out}"
        )
    return content


def write(file: pathlib.Path, form: str, version: int, content: Mapping[str, Any]) -> None:
    """Writes a file that `read` reads; see `write_json`."""
    write_json(file, {"format": form, "version": version, **content})


def write_json(file: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON, dataclasses as objects: the file has its old content or the new.

    Raises:
      InputError: nothing can be written at `file`.
      OSError: ENOSPC, naming `file`.
    """
    with atomic_path(file) as partial, partial.open("w") as f:
        json.dump(value, f, indent=1, default=dataclasses.asdict)
        f.flush()
        os.fsync(f.fileno())


def read_json(file: str | os.PathLike) -> Any:
    """The content of a JSON file of any format.

    Raises:
      InputError: it cannot be read, or is not JSON.
    """
    try:
        with open(file, encoding="utf-8") as f:
            return json.load(f)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{file}: is not JSON ({error}); copy or download it again") from error
