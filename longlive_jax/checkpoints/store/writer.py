"""Writes our checkpoints, one group of arrays after another; see the package."""

import collections
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, quantized
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.checkpoints.layout import Piece
from longlive_jax.checkpoints.store import checksums
from longlive_jax.checkpoints.store import directory as directory_lib
from longlive_jax.checkpoints.store import index as index_lib
from longlive_jax.checkpoints.store.reader import Stored
from longlive_jax.errors import InputError
from longlive_jax.files import scratch, versioned
from longlive_jax.files.atomic import atomic_path
from longlive_jax.files.orbax import ocp
from longlive_jax.files.remote import AnyPath, RemotePath
from longlive_jax.models import tokenizer as tokenizer_lib
from longlive_jax.recipes import Recipe

_GROUP_BYTES = 256 << 20  # a group is in memory about three times while it is written
_NAME = re.compile(r"[A-Za-z]\w*")
_MAX_NAME = 200  # bytes of a network's name: its folder's may have 255, and is longer


Send = Callable[[pathlib.Path], None]


class Summary(NamedTuple):
    """The result of `save`. `dtypes`: names, the most frequent first."""

    parameters: int
    bytes: int
    dtypes: tuple[str, ...]

    def describe(self, recipe: Recipe | None = None) -> str:
        """A line for the user. recipe: by which the weights are quantised."""
        dtypes = "/".join(self.dtypes) + (f" by recipe {recipe.name}" if recipe else "")
        return f"{self.parameters:,} parameters, {dtypes}, {self.bytes / 2**20:,.1f} MiB"


def save(
    directory: str | os.PathLike,
    name: str,
    pieces: Iterable[Piece],
    spec: params_lib.Tree,
    *,
    section: Any = None,
    network: str | None = None,
    sources: Iterable[str] = (),
    recipe: Recipe | None = None,
) -> Summary:
    """Adds a network to a checkpoint, or replaces it; creates the checkpoint if there is none.

    Args:
      name: of the network: one of `parts.PARTS`, or any other of letters, digits and _.
      pieces: all rows of all of `spec`'s arrays, in any order; taken one by one. With a recipe the
        linear layers' weights come quantised, from `checkpoints.quantized.pieces`.
      section: the dataclass of the config that `spec` was made of, kept for messages.
      network: the kind, of `parts.PARTS`, if the name is none of them: a critic may be a "dit".
      sources: what the weights came from, kept for the reader: names of files, without their
        folders, or addresses `hf://...`.
      recipe: by which the weights are quantised; None: they are not.

    Until the last piece is on disk, the directory keeps its old content.

    Raises:
      InputError: the directory holds other files, or another process is writing to it, or the name
        is invalid.
    """

    def write(folder: pathlib.Path, send: Send) -> dict:
        index = _write_groups(folder, pieces, quantized.spec(spec, recipe), send)
        versioned.write_json(folder / index_lib.FILE, index)
        kind = parts_lib.PARTS.get(network or name)
        info = {
            "sources": [_source(s) for s in sources],
            **_summary(index, params_lib.count(spec))._asdict(),
            "config": {kind.section: config_lib.values(section)} if kind and section else {},
            "index_checksum": checksums.of_file(folder / index_lib.FILE),
        }
        info |= {"network": network} if network not in (None, name) else {}
        return info if recipe is None else info | {"recipe": recipe.name}

    info = _add(directory, name, write)
    return Summary(*(info[field] for field in Summary._fields))


def save_tree(
    directory: str | os.PathLike, name: str, tree: params_lib.Tree, spec: params_lib.Tree, **kwargs
) -> Summary:
    """`save` of arrays that are in memory, see `tree_pieces`; `kwargs`: as of `save`."""
    return save(directory, name, tree_pieces(tree, spec), spec, **kwargs)


def copy(stored: Stored, directory: str | os.PathLike) -> None:
    """Adds a network of another checkpoint unchanged, or replaces one of its name.

    Raises:
      InputError: as `save`.
    """

    def write(folder: pathlib.Path, send: Send) -> dict:
        del send
        stored.copy(folder)
        return stored.info

    _add(directory, stored.name, write)


def _add(
    directory: str | os.PathLike, name: str, write: Callable[[pathlib.Path, Send], dict]
) -> dict[str, Any]:
    """Adds a network that `write` writes to an empty folder; returns what `write` returns.

    `write` also gets a function for a folder in it that is whole, which may be gone afterwards.
    """
    too_long = len(name.encode(errors="replace")) > _MAX_NAME
    if not _NAME.fullmatch(name) or too_long or name == tokenizer_lib.NAME:
        raise InputError(
            f"{directory}: {name[:_MAX_NAME]!r} cannot be the name of a network; take letters, "
            f"digits and _, at most {_MAX_NAME} bytes"
        )
    with directory_lib.writing(directory) as (root, parts):
        if isinstance(root, RemotePath):
            return _add_remote(root, name, parts, write)
        # Left by a process that was killed.
        partial = root / f".{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        directory_lib.remove_unused(root, name, parts)
        partial.mkdir()
        try:
            info = write(partial, lambda folder: None)
            final = _free(root, name)
            partial.rename(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        parts[name] = info | {"directory": final.name}
        directory_lib.write(root, parts)
        directory_lib.remove_unused(root, name, parts)
    return info


def _free(root: AnyPath, name: str) -> AnyPath:
    """A name for a network's folder that none has yet."""
    names = (name if i == 0 else f"{name}_{i}" for i in range(1 << 20))
    return next(root / n for n in names if not (root / n).exists())


def _add_remote(root: RemotePath, name: str, parts: dict, write: Callable) -> dict[str, Any]:
    """As `_add`, on object storage: files have their final names, and metadata.json is last."""
    directory_lib.remove_unused(root, name, parts)
    final, here = _free(root, name), scratch.folder()
    assert isinstance(final, RemotePath)
    (final / directory_lib.UNFINISHED).write_bytes(b"")

    def send(folder: pathlib.Path) -> None:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            (final / path.relative_to(here).as_posix()).write_bytes(path.read_bytes())
            path.unlink()

    try:
        info = write(here, send)
        send(here)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    parts[name] = info | {"directory": final.name}
    directory_lib.write(root, parts)
    (final / directory_lib.UNFINISHED).unlink(missing_ok=True)
    directory_lib.remove_unused(root, name, parts)
    return info


def save_tokenizer(
    directory: str | os.PathLike, file: str | os.PathLike, source: str | None = None
) -> None:
    """Adds the tokenizer of a tokenizer.json or a spiece.model to a checkpoint.

    source: what it came from, as of `save`; None: the file.

    Raises:
      InputError: as `save`; or not UMT5's tokenizer.
    """
    tokenizer_lib.Tokenizer.from_file(file)  # refuses what is none
    with directory_lib.writing(directory) as (root, parts):
        with atomic_path(root / tokenizer_lib.FILE) as partial:
            partial.write_bytes(tokenizer_lib.as_json(file))
        parts[tokenizer_lib.NAME] = {"sources": [_source(source or os.fspath(file))]}
        directory_lib.write(root, parts)


def _source(source: str) -> str:
    return source if source.startswith("hf://") else os.path.basename(source)


def tree_pieces(tree: params_lib.Tree, spec: params_lib.Tree) -> Iterator[Piece]:
    """A tree's arrays as pieces, in the order of `layout.weights`; the host has one layer of them.

    The arrays must be addressable by this process: NumPy's, or a mesh's of one process.
    """
    leaves = params_lib.flatten(tree)
    for w in layout.weights(spec):
        leaf = leaves[w.path]
        rows = leaf if w.layer is None else leaf[w.layer : w.layer + 1]
        yield Piece(w.path, w.layer or 0, np.asarray(jax.device_get(rows)))


def _write_groups(
    directory: pathlib.Path, pieces: Iterable[Piece], spec: params_lib.Tree, send: Send
) -> dict:
    """Writes pieces as they come, in groups of about `_GROUP_BYTES`; `send` gets each group."""
    leaves = params_lib.flatten(spec)
    dtypes: dict[params_lib.Path, np.dtype] = {}
    groups: dict[str, dict[str, list[int]]] = {}
    sums: dict[str, dict[str, str]] = {}
    rows_left = {p: s.shape[0] for p, s in leaves.items()}
    group: list[Piece] = []
    group_name = ""

    def flush() -> None:
        if not group:
            return
        name, i = group_name, 1
        while name in groups:
            name, i = f"{group_name}_{i}", i + 1
        context = ocp.Context()
        context.array.saving.use_compression = False  # weights hardly compress
        with context:
            ocp.save(str(directory / name), params_lib.unflatten({p.path: p.array for p in group}))
        sums[name] = checksums.of_folder(directory / name)
        send(directory / name)
        groups[name] = {"/".join(p.path): [p.start, len(p.array)] for p in group}
        group.clear()

    for piece in pieces:
        path, s = piece.path, leaves[piece.path]
        assert piece.array.shape[1:] == s.shape[1:], (path, piece.array.shape, s.shape)
        assert dtypes.setdefault(path, piece.array.dtype) == piece.array.dtype, path
        one_layer = layout.is_stacked(s) and len(piece.array) == 1
        name = f"{path[0]}_{piece.start:02d}" if one_layer else "rest"
        size = sum(p.array.nbytes for p in group) + piece.array.nbytes
        if name != group_name or size > _GROUP_BYTES or any(p.path == path for p in group):
            flush()
        group_name = name
        group.append(piece)
        rows_left[path] -= len(piece.array)
        del piece
    flush()
    assert not any(rows_left.values()), {p: n for p, n in rows_left.items() if n}
    return {
        "leaves": {
            "/".join(p): {
                "shape": s.shape,
                "dtype": dtypes[p].name,
                "stacked": layout.is_stacked(s),
            }
            for p, s in leaves.items()
        },
        "groups": groups,
        "checksums": sums,
    }


def _summary(index: dict, parameters: int) -> Summary:
    by_dtype: collections.Counter[str] = collections.Counter()
    for leaf in index["leaves"].values():
        by_dtype[leaf["dtype"]] += math.prod(leaf["shape"])
    size = sum(n * jnp.dtype(d).itemsize for d, n in by_dtype.items())
    return Summary(parameters, size, tuple(dtype for dtype, _ in by_dtype.most_common()))
