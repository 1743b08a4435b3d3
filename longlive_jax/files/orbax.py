"""Orbax, which takes any folder name.

Its paths are those of etils.epath, whose `glob` takes the folder's own name for a part of the
pattern. In `run[lr=1e-5]` nothing is ever found: arrays are written, but not into the index of
their checkpoint, and nothing can be read again. Here names are escaped.
"""

import glob
import os
from collections.abc import Iterator

from etils import epath
from orbax.checkpoint import v1 as ocp

__all__ = ["ocp"]

_LOCAL = type(epath.Path(os.sep))
_elsewhere = _LOCAL.glob  # also of files on this machine, before


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    path = os.fspath(self)
    if "://" in path:  # object storage
        return _elsewhere(self, pattern)
    return map(type(self), glob.iglob(os.path.join(glob.escape(path), pattern)))


_LOCAL.glob = _glob
