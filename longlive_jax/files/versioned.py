"""JSON files, written in one step. Files of our own formats name format and version."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import regular
from longlive_jax.files import schema as schema_lib
from longlive_jax.files.atomic import atomic_path
from longlive_jax.files.remote import AnyPath


def read(
    file: AnyPath,
    form: str,
    version: int,
    way_out: str,
    *,
    older: Sequence[int] = (),
    schema: Any = object,
) -> dict[str, Any]:
    """The content of a file with these "format" and "version".

    Args:
      older: earlier versions that are also read.
      schema: of the content, in the notation of `files.schema`.
      way_out: what to do about a file that is damaged, or of another version; ends the message.

    Raises:
      InputError: it cannot be read, is no JSON object of this schema, or is of another format or
        version.
    """
    try:
        content = parse(regular.read(file))
        wrong = schema_lib.mismatch(content, {"format": (str, None), "version": (int, None)})
        if wrong:
            raise ValueError(wrong)
        found = content["format"], content["version"]
        known = found[0] == form and found[1] in (version, *older)
        if known and (wrong := schema_lib.mismatch(content, schema)):
            raise ValueError(wrong)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: is damaged ({_reason(error)}); {way_out}") from error
    if not known:
        raise InputError(
            f"{file}: has format {found[0]!r:.80} version {found[1]}, this program reads {form!r} "
            f"version {version}; {way_out}"
        )
    return content


def write(file: AnyPath, form: str, version: int, content: Mapping[str, Any]) -> None:
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


def read_json(file: str | os.PathLike, schema: Any = object) -> Any:
    """The content of a JSON file of any format; `schema`: in the notation of `files.schema`.

    Raises:
      InputError: it cannot be read, is not JSON, or does not fit the schema.
    """
    try:
        content = parse(regular.read(file))
    except StorageError:
        raise
    except OSError as error:
        raise InputError(f"{file}: {_reason(error)}") from error
    except ValueError as error:
        raise InputError(f"{file}: is not JSON ({error}); copy or download it again") from error
    if wrong := schema_lib.mismatch(content, schema):
        raise InputError(f"{file}: {wrong}; copy or download it again")
    return content


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it is no JSON, has a name twice in one object, or is nested too deep.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name[:80]!r} is in it twice")
        result[name] = value
    return result


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
