"""Named arrays in .npz files."""

import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path


def save_npz(path: str | os.PathLike, /, **arrays) -> None:
    """Writes arrays (anything np.asarray takes) under their names, all or nothing.

    Raises:
      InputError: a dtype that .npz cannot hold (bfloat16, float8, objects), or an unwritable path.
      OSError: ENOSPC, naming `path`.
    """
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    for name, array in arrays.items():
        if array.dtype.kind in "OV":  # ml_dtypes' types would come back as raw bytes
            raise InputError(f"{path}: {name!r} is {array.dtype}; cast it to float32 to save it")
    with atomic_path(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def load_npz(path: str | os.PathLike, required: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """Reads all arrays of a .npz file.

    Raises:
      InputError: the file is missing, damaged or not .npz; a `required` name is absent; a floating
        point array holds NaN or infinity; an array holds pickled objects, which could run code.
    """
    path = pathlib.Path(path)
    try:
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a .npz file of arrays ({_found(path)})") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: holds one unnamed array; a .npz file of named arrays is needed")
    arrays = {}
    with file:
        for name in file.files:
            try:
                array = file[name]
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                reason = "pickled objects are refused" if "pickle" in str(error) else str(error)
                raise InputError(f"{path}: array {name!r} cannot be read: {reason}") from error
            if not isinstance(array, np.ndarray):  # numpy gives other members of a zip as bytes
                raise InputError(f"{path}: {name!r} in it is not an array; not a .npz file")
            arrays[name] = array
    missing = [name for name in required if name not in arrays]
    if missing:
        found = ", ".join(arrays) or "nothing"
        raise InputError(f"{path}: array {missing[0]!r} is missing; found: {found}")
    for name, array in arrays.items():
        if array.dtype.kind in "fc" and not (finite := np.isfinite(array)).all():
            bad = array.size - np.count_nonzero(finite)
            raise InputError(f"{path}: {bad} of {array.size} values of {name!r} are not finite")
    return arrays


def narrow(array: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """The array in another dtype. `name` is for the message.

    Raises:
      InputError: a number that the dtype has only as infinity.
    """
    with np.errstate(over="ignore"):
        narrowed = array.astype(dtype, copy=False)
    finite = np.isfinite(narrowed)
    if not finite.all() and (lost := ~finite & np.isfinite(array)).any():
        most = float(ml_dtypes.finfo(dtype).max)
        raise InputError(
            f"{name}: {array[lost][0]} is infinite in {np.dtype(dtype)}, which goes to {most:.4g}, "
            f"as are {np.count_nonzero(lost)} of {array.size} values; scale them before they are "
            f"saved"
        )
    return narrowed


def _found(path: pathlib.Path) -> str:
    if path.is_dir():
        return "it is a folder"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return f"{size} bytes, the first are {file.read(8)!r}" if size else "it is empty"
    except OSError as error:
        return error.strerror or str(error)
