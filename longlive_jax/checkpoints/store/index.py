"""index.json of a network: its arrays, and the group and the rows in which each of them lies."""

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from longlive_jax import params as params_lib
from longlive_jax.checkpoints.store import checksums
from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import schema as schema_lib
from longlive_jax.files import versioned
from longlive_jax.files.names import is_plain
from longlive_jax.files.remote import AnyPath

FILE = "index.json"
_SCHEMA = {
    "leaves": {str: {"shape": [int], "dtype": str, "stacked": bool}},
    "groups": {str: {str: [int]}},
    "checksums?": {str: {str: str}},  # checkpoints of before they were written have none
}
_MAX_AXES = 8  # an array's; ours have at most five, and a layer axis
_ONE_LAYER = re.compile(r"(.+?)_(\d{2,})(?:_\d+)?")  # the name of a group of one layer

Rows = tuple[int, int]  # the first, and how many


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool  # whether its leading axis counts layers


@dataclasses.dataclass(frozen=True)
class Index:
    """The content of index.json: all rows of each array lie in one group each.

    Attributes:
      checksums: of each group's files; empty in checkpoints of before they were written.
    """

    leaves: Mapping[params_lib.Path, Leaf]
    groups: Mapping[str, Mapping[params_lib.Path, Rows]]
    checksums: Mapping[str, checksums.Checksums]


def read(folder: AnyPath, checksum: str | None, way_out: str) -> Index:
    """The index of the network in `folder`.

    Args:
      checksum: that index.json must have; None: any.
      way_out: what to do about damage; ends the message.

    Raises:
      InputError: the index is missing or damaged, or does not have every row exactly once.
    """
    file = folder / FILE
    try:
        if checksum is not None and (found := checksums.of_file(file)) != checksum:
            raise ValueError(f"it has the checksum {found}, it was saved with {checksum}")
        content = versioned.parse(file.read_bytes())
        if wrong := schema_lib.mismatch(content, _SCHEMA):
            raise ValueError(wrong)
        leaves = {_path(key): _leaf(key, leaf) for key, leaf in content["leaves"].items()}
        groups = {
            group: {_path(key): _rows(key, rows) for key, rows in members.items()}
            for group, members in content["groups"].items()
        }
        sums = content.get("checksums", {})
        _check_names(groups, sums)
        _check_rows(leaves, groups)
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{folder}: {FILE} is damaged ({reason}); {way_out}") from error
    return Index(leaves, groups, sums)


def _path(key: str) -> params_lib.Path:
    return tuple(key.split("/"))


def _leaf(key: str, leaf: Mapping) -> Leaf:
    shape = tuple(leaf["shape"])
    if not 1 <= len(shape) <= _MAX_AXES or min(shape) < 0:
        raise ValueError(f"{key} has shape {shape[:_MAX_AXES]}")
    try:
        dtype = jnp.dtype(leaf["dtype"])
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{key} has the unknown dtype {leaf['dtype']!r:.40}") from error
    if not (dtype.kind == "b" or jnp.issubdtype(dtype, np.number)) or dtype.name != leaf["dtype"]:
        raise ValueError(f"{key} has dtype {leaf['dtype']!r:.40}")
    return Leaf(shape, dtype, leaf["stacked"])


def _rows(key: str, rows: list[int]) -> Rows:
    if len(rows) != 2 or min(rows) < 0:
        raise ValueError(f"{key} has rows {rows[:3]}; first and number are needed")
    return rows[0], rows[1]


def _check_names(groups: Mapping, sums: Mapping[str, checksums.Checksums]) -> None:
    for name in groups:
        if not is_plain(name):
            raise ValueError(f"{name[:80]!r} is not the name of a folder in it")
    if sums and sums.keys() != groups.keys():
        other = sorted(sums.keys() ^ groups.keys())[0]
        raise ValueError(f"{other[:80]!r} has no group or no checksums")
    for name, files in sums.items():
        for file in files:
            if not all(map(is_plain, file.split("/"))):
                raise ValueError(f"{file[:80]!r} is not the name of a file in {name}")


def _check_rows(leaves: Mapping[params_lib.Path, Leaf], groups: Mapping) -> None:
    """Every row exactly once, and a layer's in the group that has its number."""
    inner = {path[:n] for path in leaves for n in range(1, len(path))}
    if both := sorted(inner & leaves.keys()):
        raise ValueError(f"{'/'.join(both[0])[:80]} is an array, and holds some")
    found: dict[params_lib.Path, list[Rows]] = {path: [] for path in leaves}
    for group, members in groups.items():
        named = _ONE_LAYER.fullmatch(group)
        for path, rows in members.items():
            key = "/".join(path)
            if path not in leaves:
                raise ValueError(f"{key[:80]}, in group {group}, is none of its arrays")
            if named and named[1] == path[0] and rows != (int(named[2]), 1):
                raise ValueError(f"group {group} has rows {rows} of {key}")
            found[path].append(rows)
    for path, pieces in found.items():
        end, key = 0, "/".join(path)
        for start, count in sorted(pieces):
            if start != end:
                what = f"no row {end}" if start > end else f"row {start} twice"
                raise ValueError(f"{key} has {what}")
            end = start + count
        if end != leaves[path].shape[0]:
            raise ValueError(f"{key} has {end} of {leaves[path].shape[0]} rows")
