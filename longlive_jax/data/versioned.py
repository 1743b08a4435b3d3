"""JSON files that say of which format and version they are."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from longlive_jax.errors import InputError


def read(
    file: pathlib.Path, form: str, version: int, way_out: str, *, older: Sequence[int] = ()
) -> dict[str, Any]:
    """The content of a file with these "format" and "version".

    way_out: what to do about another one, for messages. older: versions that are read too.

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
