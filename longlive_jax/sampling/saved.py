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

from longlive_jax import config as config_lib
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


def below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): x for k, x in arrays.items() if k.startswith(prefix)}


# What a stream does not depend on once its prompts are embedded.
_FREE = ("chunks", "height", "image_fit", "image_to_video", "negative_prompt",
         "vae_latents_per_call", "width")  # fmt: skip


def settings(cfg: config_lib.Config) -> dict[str, Any]:
    """All that latents depend on but the weights, by the names of the flags."""
    sections = {name: getattr(cfg, name) for name in ("model", "video", "sample", "quant", "vae")}
    made = {
        f"{s}.{k}": v
        for s, section in sections.items()
        for k, v in config_lib.values(section).items()
    }
    made = {name: v for name, v in made.items() if name.split(".")[1] not in _FREE}
    return made | {"dtype": cfg.dtype}


def trim(row: np.ndarray) -> np.ndarray:
    """An embedding without the zeros behind the prompt."""
    used = np.flatnonzero(np.asarray(row, np.float32).any(axis=1))
    return row[: used[-1] + 1 if len(used) else 0]
