"""Writes files as `torch.save` does, without torch: what the tests of the reader read.

`fixtures/` holds a few files of the real torch, which this writer was checked against.
"""

import pickle
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np

STORAGES = {
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.int64): "LongStorage",
    np.dtype(np.int32): "IntStorage",
    np.dtype(np.uint8): "ByteStorage",
}


class Strided:
    """A tensor that is a view: `shape` and `strides` (in elements) of `storage` from `offset`."""

    def __init__(self, storage, shape, strides, offset=0):
        self.storage, self.shape, self.strides, self.offset = storage, shape, strides, offset


class Raw:
    """Bytes to put into the pickle's program as they are; they push one object."""

    def __init__(self, program):
        self.program = program


def save(file, value, prefix="archive"):
    """Writes `value`: dicts, OrderedDicts, strings, numbers, NumPy arrays, `Strided`, `Raw`."""
    storages = []
    program = b"\x80\x02" + _dump(value, storages) + b"."
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{prefix}/data.pkl", program)
        archive.writestr(f"{prefix}/byteorder", "little")
        for i, storage in enumerate(storages):
            archive.writestr(f"{prefix}/data/{i}", storage.tobytes())
        archive.writestr(f"{prefix}/version", "3\n")


def _dump(value, storages):
    if isinstance(value, Raw):
        return value.program
    if isinstance(value, np.ndarray):
        strides = tuple(s // value.itemsize for s in np.empty(value.shape, value.dtype).strides)
        value = Strided(value.reshape(-1), value.shape, strides)
    if isinstance(value, Strided):
        key = str(len(storages))
        storages.append(value.storage)
        # Dtypes of the last years have no storage of their own: bytes, and the tensor says.
        kind = STORAGES.get(value.storage.dtype)
        persistent = (
            b"("
            + _scalar("storage")
            + (f"ctorch\n{kind}\n" if kind else "ctorch.storage\nUntypedStorage\n").encode()
            + _scalar(key)
            + _scalar("cpu")
            + _scalar(value.storage.size if kind else value.storage.nbytes)
            + b"tQ"
        )
        return (
            f"ctorch._utils\n_rebuild_tensor_{'v2' if kind else 'v3'}\n(".encode()
            + persistent
            + _scalar(value.offset)
            + _ints(value.shape)
            + _ints(value.strides)
            + b"\x89"  # requires_grad
            + b"ccollections\nOrderedDict\n)R"  # hooks
            + (b"" if kind else f"ctorch\n{value.storage.dtype}\n".encode())
            + b"tR"
        )
    if isinstance(value, dict):
        empty = b"ccollections\nOrderedDict\n)R" if isinstance(value, OrderedDict) else b"}"
        items = b"".join(_scalar(k) + _dump(v, storages) for k, v in value.items())
        built = b"}" + _scalar("_metadata") + b"}sb" if isinstance(value, OrderedDict) else b""
        return empty + b"(" + items + b"u" + built
    return _scalar(value)


def _ints(values):
    return b"(" + b"".join(map(_scalar, values)) + b"t"


def _scalar(value):
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    return pickle.dumps(value, 2)[2:-1]  # without protocol and stop
