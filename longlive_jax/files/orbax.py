"""Orbax, which takes any folder name.

Its paths are those of etils.epath, whose `glob` takes the folder's own name for a part of the
pattern. In `run[lr=1e-5]` nothing is ever found: arrays are written, but not into the index of
their checkpoint, and nothing can be read again. Here names are escaped.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

__all__ = ["check_read", "ocp"]

_LOCAL = type(epath.Path(os.sep))
_elsewhere = _LOCAL.glob  # also of files on this machine, before


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    path = os.fspath(self)
    if "://" in path:  # object storage
        return _elsewhere(self, pattern)
    return map(type(self), glob.iglob(os.path.join(glob.escape(path), pattern)))


_LOCAL.glob = _glob


def check_read(tree: Any) -> None:
    """Refuses a tree with arrays that were not read: what metadata calls empty comes back as asked.

    Raises:
      ValueError: names the first of them.
    """
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float):
            raise ValueError(
                f"{jax.tree_util.keystr(path, simple=True, separator='/')} has no values"
            )
