"""The safetensors format: read lazily, written tensor by tensor, with the floats of ml_dtypes."""

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np

from longlive_jax.checkpoints import foreign
from longlive_jax.checkpoints import tensor as tensor_lib
from longlive_jax.errors import InputError
from longlive_jax.files import schema as schema_lib
from longlive_jax.files import versioned
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
_ENTRY = {"dtype": str, "shape": [int], "data_offsets": [int]}


def read(file: str | os.PathLike) -> tuple[dict[str, tensor_lib.FileTensor], dict[str, str]]:
    """Tensors by name, unread, and the header's `__metadata__`.

    Raises:
      InputError: not a safetensors file, or cut short; its tensors overlap or leave bytes out, or
        have a dtype that is not known.
    """
    file = os.fspath(file)
    try:
        total = os.path.getsize(file)
        with open(file, "rb") as f:
            start = f.read(8)
            size = struct.unpack("<Q", start)[0] if len(start) == 8 else total + 1
            if size > min(total - 8, _MAX_HEADER):
                f.seek(0)
                what = foreign.describe(f.read(512))
                if what is not None:
                    raise InputError(f"{file}: {what}")
                raise ValueError(f"a header of {size} bytes in a file of {total}")
            encoded = f.read(size)
            if encoded[:1] != b"{":
                raise ValueError("its header is no JSON object")
            header = versioned.parse(encoded)
        metadata = header.pop("__metadata__", {})
        if wrong := schema_lib.mismatch(metadata, {str: object}, "__metadata__"):
            raise ValueError(wrong)
        tensors = {k: _tensor(file, k, v, 8 + size) for k, v in header.items()}
        _check_extents(tensors, 8 + size, total)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(
            f"{file}: not a whole safetensors file ({error}); copy or download it again"
        ) from error
    return tensors, metadata


def _tensor(file: str, name: str, entry: dict, data: int) -> tensor_lib.FileTensor:
    name = name[:80]
    if wrong := schema_lib.mismatch(entry, _ENTRY, name):
        raise ValueError(wrong)
    if entry["dtype"] not in DTYPES:
        raise InputError(
            f"{file}: {name} has dtype {entry['dtype'][:20]}, which is not read (those that are: "
            f"{', '.join(DTYPES)}); give a file of the same weights in BF16"
        )
    dtype, shape, offsets = np.dtype(DTYPES[entry["dtype"]]), entry["shape"], entry["data_offsets"]
    if len(shape) > tensor_lib.MAX_AXES or len(offsets) != 2 or min(*shape, *offsets) < 0:
        raise ValueError(f"{name} has shape {shape[:8]}, at bytes {offsets[:2]}")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for {name}, of shape {shape} and dtype {dtype}")
    strides = tensor_lib.contiguous_strides(tuple(shape))
    return tensor_lib.FileTensor(file, tuple(shape), dtype, strides, data + begin)


def _check_extents(tensors: Mapping[str, tensor_lib.FileTensor], data: int, total: int) -> None:
    """Every byte after the header belongs to one tensor, as the format demands."""
    end, last = data, "its header"
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if t.offset != end and t.size:
            what = "overlaps" if t.offset < end else "leaves a hole after"
            raise ValueError(f"{name[:80]} {what} {last[:80]}")
        if t.size:
            end, last = t.offset + t.size * t.dtype.itemsize, name
    if end != total:
        raise ValueError(f"it ends at byte {total}, its tensors at byte {end}")


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
