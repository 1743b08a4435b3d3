"""Orbax, which takes any folder name, and writes to gs:// and s3:// alike.

Its paths are those of etils.epath, whose `glob` takes the folder's own name for a part of the
pattern. In `run[lr=1e-5]` nothing is ever found: arrays are written, but not into the index of
their checkpoint, and nothing can be read again. Here names are escaped.

Of object storage it knows gs://: there a state has its files under their final names, and an object
`commit_success.txt` that is written last and without which there is no state. Here s3:// is the
same, and the stores of both are those of `files.remote`.
"""

import glob
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from longlive_jax.files import remote

__all__ = ["COMMITTED", "check_read", "ocp"]

COMMITTED = "commit_success.txt"  # of a whole state on object storage

_LOCAL = type(epath.Path(os.sep))
_elsewhere = _LOCAL.glob  # also of files on this machine, before


def _glob(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
    path = os.fspath(self)
    if "://" in path:  # object storage
        return _elsewhere(self, pattern)
    return map(type(self), glob.iglob(os.path.join(glob.escape(path), pattern)))


_LOCAL.glob = _glob

_gcs_spec = tensorstore_utils.build_kvstore_tspec


def _spec(directory: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """TensorStore's description of where the arrays of a folder lie."""
    text = os.fspath(directory)
    if not remote.is_remote(text):
        return _gcs_spec(text, *args, **kwargs)
    scheme, _, rest = text.partition("://")
    return _with_store(_gcs_spec(f"gs://{rest}", *args, **kwargs), scheme)


def _with_store(value: Any, scheme: str) -> Any:
    """A description with each gs:// in it as the same key of the scheme's store."""
    if isinstance(value, str) and value.startswith("gs://"):
        return _store(f"{scheme}://{value.removeprefix('gs://')}")
    if isinstance(value, dict) and value.get("driver") in ("gcs", "gcs_grpc"):
        return _store(f"{scheme}://{value['bucket']}/{value['path']}")
    if isinstance(value, dict):
        return {key: _with_store(one, scheme) for key, one in value.items()}
    return [_with_store(one, scheme) for one in value] if isinstance(value, list) else value


def _store(address: str) -> dict[str, Any]:
    """As `remote.spec`. Each object of a state has one writer, and a conditional write whose answer
    is lost is refused when it is made again, which would end the save.
    """
    found = remote.spec(address)
    return found | ({"use_conditional_write": False} if found["driver"] == "s3" else {})


def _is_object_storage(path: Any) -> bool:
    return remote.is_remote(path.as_posix() if hasattr(path, "as_posix") else path)


tensorstore_utils.build_kvstore_tspec = _spec
gcs_utils.is_gcs_path = _is_object_storage
# It would ask Google's client, a package of its own, to remove folders without anything in them.
gcs_utils.is_hierarchical_namespace_enabled = lambda path: False


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
