"""Our weights back to the original's keys and layouts, as one safetensors file a part."""

import os
from collections.abc import Callable, Iterator, Mapping

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

    Returns the number of tensors written.

    Raises:
      InputError: the checkpoint lacks the part, or is damaged.
    """
    stored = store.Stored(directory, part)
    spec = stored.spec()
    return _write(spec, stored.dtypes(), stored.pieces(), file, progress)


def export_tree(tree: params_lib.Tree, spec: params_lib.Tree, file: str | os.PathLike) -> int:
    """Writes a tree of arrays (of this process) to `file`; layers are fetched one at a time.

    Returns the number of tensors written.
    """
    leaves = params_lib.flatten(tree)
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}
    return _write(spec, dtypes, store.tree_pieces(tree, spec), file, lambda n: None)


def tensors(
    spec: params_lib.Tree, pieces: Iterator[store.Piece]
) -> Iterator[tuple[layout.Weight, str, np.ndarray]]:
    """The original's tensors, from pieces in the order of `layout.weights`."""
    for w in layout.weights(spec):
        rows = 1 if w.layer is not None else (w.shape[0] if w.shape else 1)
        start = w.layer or 0
        parts = []
        while rows > 0:
            piece = next(pieces)
            assert (piece.path, piece.start) == (w.path, start), (piece.path, piece.start, w)
            parts.append(piece.array)
            start, rows = start + len(piece.array), rows - len(piece.array)
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        array = array[0] if w.layer is not None else array
        for key, t in zip(w.keys, w.to_torch(array), strict=True):
            yield w, key, t


def _write(spec, dtypes: Mapping, pieces, file, progress) -> int:
    entries = {key: (w.torch_shape, dtypes[w.path]) for w in layout.weights(spec) for key in w.keys}

    def arrays():
        for _, key, t in tensors(spec, pieces):
            yield key, t
            progress(1)

    safetensors.write(file, entries, arrays(), {"format": "pt"})
    return len(entries)
