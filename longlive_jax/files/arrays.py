"""Named arrays in .npz files."""

import math
import os
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Container, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax.errors import InputError
from longlive_jax.files import regular
from longlive_jax.files.atomic import atomic_path

# What compressed arrays of a file may get in memory, bytes: a small file can say a thousand times
# its size. Those that are not compressed are as large as the file.
MAX_UNPACKED = 4 << 30
_DAMAGE = (
    OSError, EOFError, ValueError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile,
    zlib.error,
)  # fmt: skip


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


def load_npz(
    path: str | os.PathLike, required: Iterable[str] = (), only: Container[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads arrays of a .npz file.

    Args:
      required: names that must be there.
      only: names that are read; others are not looked at. None: all.

    Raises:
      InputError: the file is missing, damaged or not .npz; a `required` name is absent; a floating
        point array holds NaN or infinity; an array holds pickled objects, which could run code, or
        declares another size than it has; compressed arrays get larger than MAX_UNPACKED.
    """
    path = pathlib.Path(path)
    try:
        regular.check(path)
        file = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not a .npz file of arrays ({_found(path)})") from error
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: holds one unnamed array; a .npz file of named arrays is needed")
    arrays, unpacked, names = {}, 0, list(file.files)
    with file:
        for name in names:
            if only is not None and name not in only:
                continue
            try:
                assert file.zip is not None  # it is open
                unpacked += _check_member(file.zip, name)
                if unpacked > MAX_UNPACKED:
                    raise ValueError(
                        f"compressed arrays of {unpacked} bytes, the limit is {MAX_UNPACKED}; save "
                        "them with np.savez, which does not compress"
                    )
                array = file[name]
            except _DAMAGE as error:
                reason = "pickled objects are refused" if "pickle" in str(error) else str(error)
                raise InputError(f"{path}: array {name!r} cannot be read: {reason}") from error
            if not isinstance(array, np.ndarray):  # numpy gives other members of a zip as bytes
                raise InputError(f"{path}: {name!r} in it is not an array; not a .npz file")
            arrays[name] = array
    missing = [name for name in required if name not in arrays]
    if missing:
        found = ", ".join(names) or "nothing"
        raise InputError(f"{path}: array {missing[0]!r} is missing; found: {found}")
    for name, array in arrays.items():
        if array.dtype.kind in "fc" and not (finite := np.isfinite(array)).all():
            bad = array.size - np.count_nonzero(finite)
            raise InputError(f"{path}: {bad} of {array.size} values of {name!r} are not finite")
    return arrays


def _check_member(archive: zipfile.ZipFile, name: str) -> int:
    """Refuses an array that declares another size than it has, before memory is taken for it.

    Returns:
      the bytes that it gets when it is unpacked; 0 for one that is not compressed.

    Raises:
      ValueError, and what zipfile raises: it cannot be read.
    """
    member = f"{name}.npy" if f"{name}.npy" in archive.namelist() else name
    info = archive.getinfo(member)
    if info.flag_bits & 1:
        raise ValueError("it is encrypted; save it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression method {info.compress_type}; save it with np.savez")
    with archive.open(info) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            return 0  # another kind of file
        file.seek(0)
        version = np.lib.format.read_magic(file)
        header = np.lib.format.read_array_header_1_0
        if version > (1, 0):
            header = np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        declared, there = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
    if not dtype.hasobject and declared != there:
        raise ValueError(f"it declares {declared} bytes, {shape} {dtype}, and has {there}")
    return info.file_size if info.compress_type != zipfile.ZIP_STORED else 0


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
        regular.check(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            return f"{size} bytes, the first are {file.read(8)!r}" if size else "it is empty"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
