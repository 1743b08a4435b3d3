"""The safetensors format: read lazily, written tensor by tensor, with the floats of ml_dtypes."""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from longlive_jax.checkpoints import tensor as tensor_lib
from longlive_jax.errors import InputError
from longlive_jax.files.atomic import atomic_path

DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_NAMES = {np.dtype(v): k for k, v in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the format's own limit


def read(file: str | os.PathLike) -> tuple[dict[str, tensor_lib.FileTensor], dict[str, str]]:
    """Tensors by name, unread, and the header's `__metadata__`.

    Raises:
      InputError: not a safetensors file, or cut short.
    """
    file = os.fspath(file)
    try:
        total = os.path.getsize(file)
        with open(file, "rb") as f:
            start = f.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else total + 1
            if size > min(total - 8, _MAX_HEADER):
                raise ValueError(f"a header of {size} bytes in a file of {total}")
            header = json.loads(f.read(size))
        metadata = header.pop("__metadata__", {})
        tensors = {k: _tensor(file, v, 8 + size, total) for k, v in header.items()}
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({_reason(error)}); copy or download it again"
        ) from error
    return tensors, metadata if isinstance(metadata, dict) else {}


def _tensor(file: str, entry: dict, data: int, total: int) -> tensor_lib.FileTensor:
    dtype = np.dtype(DTYPES[entry["dtype"]])
    shape = tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"shape {shape} at bytes {begin} to {end}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor of shape {shape} and dtype {dtype}")
    if data + end > total:
        raise ValueError(f"it ends at byte {total}, its tensors at byte {data + end}")
    strides = tensor_lib.contiguous_strides(shape)
    return tensor_lib.FileTensor(file, shape, dtype, strides, data + begin)


def _reason(error: Exception) -> str:
    return f"unknown dtype {error}" if isinstance(error, KeyError) else str(error)


def write(
    file: str | os.PathLike,
    entries: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    arrays: Iterable[tuple[str, np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a file whose tensors come one at a time, in the order of `entries`.

    Args:
      entries: shape and dtype by name.
      arrays: name and array (row-major or not), in the same order.

    The file appears under its name only when it is whole.

    Raises:
      ValueError: an array that `entries` does not announce at this place.
    """
    header: dict = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (shape, dtype) in entries.items():
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {
            "dtype": _NAMES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes
    with atomic_path(file) as partial, partial.open("wb") as f:
        f.write(struct.pack("<Q", len(encoded)) + encoded)
        written = 0
        for (name, (shape, dtype)), (got, array) in zip(entries.items(), arrays, strict=True):
            if (name, tuple(shape), np.dtype(dtype)) != (got, array.shape, array.dtype):
                raise ValueError(f"{got} {array.shape} {array.dtype} at the place of {name}")
            # numpy's tofile knows no ml_dtypes; bytes are bytes.
            np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(f)
            written += array.nbytes
        assert written == offset, (written, offset)
