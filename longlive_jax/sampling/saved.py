"""Files of sessions: facts as JSON and arrays of any dtype, complete or not there at all.

They are .npz files. Each array is stored as its bytes, since NumPy's format knows neither bfloat16
nor FP8 nor FP4; a checksum of the zip archive covers each. Nothing in them is ever run.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, save_npz

FORMAT, VERSION = "longlive_jax session", 1
_HEAD = "session"


def write(path: str | os.PathLike, facts: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Writes facts, which JSON can hold, and arrays of the host or of devices.

    Raises:
      InputError: nothing can be written at `path`.
      OSError: ENOSPC, naming `path`.
    """
    arrays = {name: np.asarray(x) for name, x in arrays.items()}
    kinds = {name: (x.dtype.name, x.shape) for name, x in arrays.items()}
    head = {"format": FORMAT, "version": VERSION, "facts": facts, "arrays": kinds}
    stored = {name: np.frombuffer(x.tobytes(), np.uint8) for name, x in arrays.items()}
    stored[_HEAD] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    save_npz(path, **stored)


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Facts and arrays of a file that `write` wrote.

    Raises:
      InputError: no such file, or one that is damaged, or of another format or version.
    """
    stored = load_npz(path, required=(_HEAD,))
    try:
        head = json.loads(stored[_HEAD].tobytes())
        found = head["format"], head["version"]
        if found != (FORMAT, VERSION):
            raise InputError(
                f"{path}: has format {found[0]!r} version {found[1]}, this program reads "
                f"{FORMAT!r} version {VERSION}; save the session again"
            )
        arrays = {
            name: np.frombuffer(stored[name], jnp.dtype(dtype)).reshape(shape)
            for name, (dtype, shape) in head["arrays"].items()
        }
        return head["facts"], arrays
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is damaged ({error}); save the session again") from error


def leaves(tree: Any) -> dict[str, Any]:
    """The arrays of a pytree, by their paths."""
    flat, _ = jax.tree.flatten_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


def tree(path: str | os.PathLike, like: Any, prefix: str, arrays: Mapping[str, np.ndarray]) -> Any:
    """The pytree of the structure of `like` whose `leaves` those below `prefix` are.

    Raises:
      InputError: others than in `like`, or of other shapes or dtypes. It names `path`.
    """
    wanted = {name: (x.shape, jnp.dtype(x.dtype)) for name, x in leaves(like).items()}
    found = {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}
    has = {name: (x.shape, x.dtype) for name, x in found.items()}
    for name in sorted({*wanted, *has}):
        if wanted.get(name) != has.get(name):
            raise InputError(
                f"{path}: {name} is {has.get(name)}, a stream of these settings has "
                f"{wanted.get(name)}; give the settings it was made with"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])
