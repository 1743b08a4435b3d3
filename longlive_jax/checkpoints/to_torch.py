"""Our weights back to the original's keys and layouts, as one safetensors file a part.

Weights quantised to NVFP4 get the tensors of `model_4o6.pt`, see `checkpoints.four_over_six`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import actions, four_over_six, layout, quantized, safetensors, store
from longlive_jax.errors import InputError
from longlive_jax.recipes import Recipe


def export_store(
    directory: str | os.PathLike,
    part: str,
    file: str | os.PathLike,
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Writes a part of our checkpoint to `file`, bit for bit, reading one group at a time.

    Args:
      progress: called with the number of tensors written since the last call.

    Returns:
      The number of tensors written.

    Raises:
      InputError: as `check`; or the part is damaged.
    """
    stored = check(directory, part)
    content = stored.spec(), stored.dtypes(), stored.extents(), stored.pieces()
    return _write(file, *content, progress=progress, recipe=stored.recipe)


def check(directory: str | os.PathLike, part: str) -> store.Stored:
    """The stored part, if the original has a format for it.

    Raises:
      InputError: the checkpoint lacks the part, or its recipe has another format than NVFP4.
    """
    stored = store.Stored(directory, part)
    if stored.recipe is not None and not four_over_six.holds(stored.recipe):
        raise InputError(
            f"{directory}: its {part} is quantised by recipe {stored.recipe.name!r}, and the "
            "original has no files of that; give the checkpoint that it was made of"
        )
    return stored


def export_tree(tree: params_lib.Tree, spec: params_lib.Tree, file: str | os.PathLike) -> int:
    """Writes a tree of arrays (of this process) to `file`; layers are fetched one at a time.

    Returns:
      The number of tensors written.
    """
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params_lib.flatten(tree).items()}
    extents = [(w.path, w.layer or 0, 1 if w.layer is not None else w.shape[0])
               for w in layout.weights(spec)]  # fmt: skip
    return _write(file, spec, dtypes, extents, store.tree_pieces(tree, spec))


def _write(
    file: str | os.PathLike,
    spec: params_lib.Tree,
    dtypes: Mapping[params_lib.Path, np.dtype],
    extents: Iterable[tuple[params_lib.Path, int, int]],
    pieces: Iterable[layout.Piece],
    *,
    progress: Callable[[int], None] = lambda n: None,
    recipe: Recipe | None = None,
) -> int:
    prefix = "" if recipe is None else four_over_six.PREFIX
    header = {} if recipe is None else four_over_six.header(recipe)
    # Tensors lie in the file in the order in which they come.
    counted = ((path, start, range(rows)) for path, start, rows in extents)
    entries = {
        prefix + key: entry
        for w, _ in _weights(spec, counted)
        for key, entry in _entries(w, dtypes[w.path]).items()
    }

    extra = actions.norms(spec)
    entries |= {prefix + key: (array.shape, array.dtype) for key, array in extra.items()}

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for w, rows in _weights(spec, pieces):
            array = rows[0] if len(rows) == 1 else np.concatenate(rows)
            keys = [prefix + key for key in _entries(w, dtypes[w.path])]
            yield from zip(keys, _arrays(w, array), strict=True)
            progress(len(keys))
        yield from ((prefix + key, array) for key, array in extra.items())

    safetensors.write(file, entries, arrays(), {"format": "pt"} | header)
    return len(entries)


def _entries(w: layout.Weight, dtype: np.dtype) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    if quantized.is_field(w.path):
        return four_over_six.entries(w)
    return {key: (w.torch_shape, dtype) for key in w.keys}


def _arrays(w: layout.Weight, array: np.ndarray) -> list[np.ndarray]:
    return four_over_six.arrays(w, array) if quantized.is_field(w.path) else w.to_torch(array)


def _weights(
    spec: params_lib.Tree, pieces: Iterable[tuple[params_lib.Path, int, Any]]
) -> Iterator[tuple[layout.Weight, list]]:
    """Each weight with its rows, as soon as all of them have come."""
    leaves = params_lib.flatten(spec)
    waiting: dict[params_lib.Path, dict[int, Any]] = {}
    for path, start, rows in pieces:
        s = leaves[path]
        if layout.is_stacked(s):
            for i, row in enumerate(rows):
                yield layout.Weight(path, start + i, s.shape[1:]), [row]
            continue
        waiting.setdefault(path, {})[start] = rows
        if sum(map(len, waiting[path].values())) == s.shape[0]:
            whole = layout.Weight(path, None, s.shape)
            yield whole, [rows for _, rows in sorted(waiting.pop(path).items())]
