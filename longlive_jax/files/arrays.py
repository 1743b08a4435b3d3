"""Named arrays in .npz files."""

import math
import os
import pathlib
import zipfile
from collections.abc import Iterable
from typing import IO, Any

import ml_dtypes
import numpy as np

from longlive_jax.errors import InputError
from longlive_jax.files import regular
from longlive_jax.files.atomic import atomic_path

# What arrays of a compressed file may take, times its size, or at all: numbers that were drawn or
# measured compress to a tenth at best, masks and zeros to a thousandth.
_MOST_TIMES, _FREE = 64, 256 << 20
MAX_UNPACKED = 4 << 30  # bytes of compressed arrays together, whatever the size of their file


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
    path: str | os.PathLike, required: Iterable[str] = (), optional: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Reads arrays of a .npz file: the required ones, and those of `optional` that it has.

    Args:
      optional: None: all that it has.

    Raises:
      InputError: the file is missing, damaged or not .npz; a `required` name is absent; it unpacks
        to more than its size or MAX_UNPACKED allows; a floating point array holds NaN or infinity;
        an array holds pickled objects, which could run code, or declares another size than it has.
    """
    path, required = pathlib.Path(path), list(required)
    try:
        regular.check(path)
        with path.open("rb") as raw:
            start = raw.read(6)
        if start == b"\x93NUMPY":
            raise InputError(
                f"{path}: holds one unnamed array; a .npz file of named arrays is needed"
            )
        if start[:2] != b"PK":
            raise ValueError("no zip archive")
        file = np.load(path, allow_pickle=False)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"{path}: not a .npz file of arrays ({_found(path)})") from error
    with file:
        assert file.zip is not None  # it is open
        found = ", ".join(file.files[:8]) or "nothing"
        if missing := [name for name in required if name not in file.files]:
            raise InputError(f"{path}: array {missing[0]!r} is missing; found: {found}")
        wanted = file.files if optional is None else [*required, *optional]
        names = [name for name in file.files if name in wanted]
        if len(set(names)) < len(names):
            raise InputError(f"{path}: has arrays of one name; found: {found}; save it again")
        _check_size(path, file.zip, names)
        arrays = {name: _array(path, file, file.zip, name) for name in names}
    for name, array in arrays.items():
        if array.dtype.kind in "fc" and not (finite := np.isfinite(array)).all():
            bad = array.size - np.count_nonzero(finite)
            raise InputError(f"{path}: {bad} of {array.size} values of {name!r} are not finite")
    return arrays


def load_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of an .npy file, which holds one.

    Raises:
      InputError: the file is missing, damaged or not .npy; it holds pickled objects, which could
        run code.
    """
    path = pathlib.Path(path)
    try:
        regular.check(path)
        with path.open("rb") as file:
            if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
                raise InputError(f"{path}: not a .npy file of an array ({_found(path)})")
            file.seek(0)
            _check_header(file, path.stat().st_size)
        return np.load(path, allow_pickle=False)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except Exception as error:  # NumPy parses an array's head as Python, which raises anything
        if "allow_pickle" in str(error):
            raise InputError(
                f"{path}: holds pickled objects, which are refused: they could run code. Where you "
                f"trust it, a dict of arrays becomes an .npz by np.savez('NEW.npz', "
                f"**np.load({path.name!r}, allow_pickle=True).item())"
            ) from error
        raise InputError(f"{path}: cannot be read: {str(error)[:200]}") from error


def _check_size(path: pathlib.Path, archive: zipfile.ZipFile, names: list[str]) -> None:
    """Refuses a small file that unpacks to a large one, and large ones that are compressed."""
    members = [_member(archive, name) for name in names]
    total = sum(info.file_size for info in members)
    packed = sum(i.file_size for i in members if i.compress_type != zipfile.ZIP_STORED)
    most = max(_FREE, _MOST_TIMES * path.stat().st_size)
    for size, limit, of in (
        (total, most, "a file of its size"),
        (packed, MAX_UNPACKED, "compressed arrays"),
    ):
        if size > limit:
            raise InputError(
                f"{path}: unpacks to {size} bytes, the limit for {of} is {limit}; save it with "
                "np.savez, which does not compress"
            )


def _array(
    path: pathlib.Path, file: np.lib.npyio.NpzFile, archive: zipfile.ZipFile, name: str
) -> np.ndarray:
    try:
        _check_member(archive, name)
        array = file[name]
    except Exception as error:  # NumPy parses an array's head as Python, which raises anything
        reason = "pickled objects are refused" if "pickle" in str(error) else str(error)
        raise InputError(f"{path}: array {name!r} cannot be read: {reason[:200]}") from error
    if not isinstance(array, np.ndarray):  # numpy gives other members of a zip as bytes
        raise InputError(f"{path}: {name!r} in it is not an array; not a .npz file")
    return array


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    return archive.NameToInfo.get(f"{name}.npy") or archive.getinfo(name)


def _check_member(archive: zipfile.ZipFile, name: str) -> None:
    """Refuses an array that declares another size than it has, before memory is taken for it.

    Raises:
      ValueError, and what zipfile and NumPy raise: it cannot be read.
    """
    info = _member(archive, name)
    if info.flag_bits & 1:
        raise ValueError("it is encrypted; save it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compression method {info.compress_type}; save it with np.savez")
    with archive.open(info) as file:
        if file.read(len(np.lib.format.MAGIC_PREFIX)) != np.lib.format.MAGIC_PREFIX:
            return  # another kind of file
        file.seek(0)
        _check_header(file, info.file_size)


def _check_header(file: IO[bytes], size: int) -> None:
    """Refuses an array of a file of `size` bytes that declares more or less of them."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0
    if version > (1, 0):
        header = np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    declared, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if not dtype.hasobject and declared != there:
        raise ValueError(f"it declares {declared} bytes, {shape} {dtype}, and has {there}")


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
