"""Our weights back to the original's keys and layouts, as one safetensors file a part."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, safetensors, store


def export_store(
    directory: str | os.PathLike,
    part: str,
    file: str | os.PathLike,
    progress: Callable[[int], None] = lambda n: None,
) -> int:
    """Writes a part of our checkpoint to `file`, bit for bit, reading one group at a time.

    Args:
      progress: is told how many tensors have been written since the last call.

    Returns:
      The number of tensors written.

    Raises:
      InputError: the checkpoint lacks the part, or is damaged.
    """
    stored = store.Stored(directory, part)
    return _write(stored.spec(), stored.dtypes(), stored.extents(), stored.pieces(), file, progress)


def export_tree(tree: params_lib.Tree, spec: params_lib.Tree, file: str | os.PathLike) -> int:
    """Writes a tree of arrays (of this process) to `file`; layers are fetched one at a time.

    Returns:
      The number of tensors written.
    """
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in params_lib.flatten(tree).items()}
    extents = [(w.path, w.layer or 0, 1 if w.layer is not None else w.shape[0])
               for w in layout.weights(spec)]  # fmt: skip
    return _write(spec, dtypes, extents, store.tree_pieces(tree, spec), file, lambda n: None)


def _write(
    spec: params_lib.Tree,
    dtypes: Mapping[params_lib.Path, np.dtype],
    extents: Iterable[tuple[params_lib.Path, int, int]],
    pieces: Iterable[store.Piece],
    file: str | os.PathLike,
    progress: Callable[[int], None],
) -> int:
    # Tensors lie in the file in the order in which they come.
    counted = ((path, start, range(rows)) for path, start, rows in extents)
    entries = {
        key: (w.torch_shape, dtypes[w.path]) for w, _ in _weights(spec, counted) for key in w.keys
    }

    def arrays() -> Iterator[tuple[str, np.ndarray]]:
        for w, rows in _weights(spec, pieces):
            array = rows[0] if len(rows) == 1 else np.concatenate(rows)
            yield from zip(w.keys, w.to_torch(array), strict=True)
            progress(len(w.keys))

    safetensors.write(file, entries, arrays(), {"format": "pt"})
    return len(entries)


def _weights(
    spec: params_lib.Tree, pieces: Iterable[tuple[params_lib.Path, int, Any]]
) -> Iterator[tuple[layout.Weight, list]]:
    """Each weight as soon as all of its rows have come, with them."""
    leaves = params_lib.flatten(spec)
    held: dict[params_lib.Path, dict[int, Any]] = {}
    for path, start, rows in pieces:
        s = leaves[path]
        if layout.is_stacked(s):
            for i, row in enumerate(rows):
                yield layout.Weight(path, start + i, s.shape[1:]), [row]
            continue
        held.setdefault(path, {})[start] = rows
        if sum(map(len, held[path].values())) == s.shape[0]:
            yield layout.Weight(path, None, s.shape), [r for _, r in sorted(held.pop(path).items())]
