"""Files of `torch.save` (PyTorch 1.6 and later), read without torch and without running them.

Such a file is a zip archive: `data.pkl`, a pickle of nested containers, and `data/KEY`, the raw
bytes of each storage. A pickle is a program that may call anything that can be imported. Here it
may call only the names in `_Unpickler._GLOBALS`, each of which resolves to an immutable stand-in
of this file. Any other name stops the load with an error that names it.
"""

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from longlive_jax.checkpoints import tensor as tensor_lib
from longlive_jax.errors import InputError

_TORCH_DTYPES = {
    "float64": np.float64,
    "double": np.float64,
    "float32": np.float32,
    "float": np.float32,
    "float16": np.float16,
    "half": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "int64": np.int64,
    "long": np.int64,
    "int32": np.int32,
    "int": np.int32,
    "int16": np.int16,
    "short": np.int16,
    "int8": np.int8,
    "uint8": np.uint8,
    "uint16": np.uint16,
    "uint32": np.uint32,
    "uint64": np.uint64,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_STORAGES = {
    f"{kind}Storage": _TORCH_DTYPES[name]
    for kind, name in (
        ("Double", "double"), ("Float", "float"), ("Half", "half"), ("BFloat16", "bfloat16"),
        ("Long", "long"), ("Int", "int"), ("Short", "short"), ("Char", "int8"), ("Byte", "uint8"),
        ("Bool", "bool"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128"),
        ("Untyped", "uint8"),
    )
}  # fmt: skip
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch.save before 1.6
_RESAVE = "load it with the torch that wrote it, then torch.save(state_dict, NEW_FILE)"


def read(file: str | os.PathLike) -> Any:
    """The saved object: dicts, lists, tuples and scalars, with `FileTensor`s for tensors.

    Raises:
      InputError: the file is damaged or of another kind, or its pickle calls anything but the few
        constructors that weights need (nothing of it is run).
    """
    file = os.fspath(file)
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as raw:
            reader = _Archive(file, archive, raw)
            program = reader.member("data.pkl")
            try:
                return _Unpickler(io.BytesIO(program), reader).load()
            except (InputError, KeyboardInterrupt):
                raise
            except Exception as error:  # a damaged pickle can raise any of them
                raise InputError(
                    f"{file}: its data.pkl is damaged ({type(error).__name__}: {error}); copy or "
                    "download the file again"
                ) from error
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, struct.error, NotImplementedError, EOFError) as error:
        raise InputError(f"{file}: {_foreign(file)}") from error


def _foreign(file: str) -> str:
    with open(file, "rb") as f:
        start = f.read(512)
    if not start:
        return "is empty; copy or download it again"
    if start.startswith(_LEGACY_MAGIC):
        return f"is in the torch.save format of before PyTorch 1.6; {_RESAVE}"
    if start[257:262] == b"ustar":
        return f"is a tar archive (PyTorch before 0.1.10, or an archive to unpack first); {_RESAVE}"
    if start.startswith(b"PK"):
        return "is a torch.save file that was cut short; copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights; run `git lfs pull`"
    return "is neither a torch.save nor a safetensors file"


class _Archive:
    """Where each member of an uncompressed zip archive lies in its file."""

    def __init__(self, file: str, archive: zipfile.ZipFile, raw):
        self.file, self._archive, self._raw = file, archive, raw
        names = [n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"]
        if len(names) != 1:
            raise InputError(
                f"{file}: is a zip archive, but not one of torch.save: it has no single data.pkl"
            )
        self._prefix = names[0].removesuffix("data.pkl")
        self._members = set(archive.namelist())
        if self._prefix + "byteorder" in self._members:
            order = self.member("byteorder")
            if order != b"little":
                raise InputError(f"{file}: is {order[:9]!r}-endian; {_RESAVE} on a usual machine")

    def member(self, name: str) -> bytes:
        offset, size = self.extent(name)
        self._raw.seek(offset)
        return self._raw.read(size)

    def extent(self, name: str) -> tuple[int, int]:
        """Offset and size, in bytes, of a member."""
        name = self._prefix + name
        if name not in self._members:
            raise InputError(f"{self.file}: has no {name}; copy or download it again")
        info = self._archive.getinfo(name)
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{self.file}: {name} is compressed, torch.save's never is; {_RESAVE}")
        # The local header's name and extra field may be longer than the directory's.
        self._raw.seek(info.header_offset)
        header = self._raw.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(name)
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name_size + extra_size
        if offset + info.file_size > os.fstat(self._raw.fileno()).st_size:
            raise zipfile.BadZipFile(name)
        return offset, info.file_size


class _Sealed:
    """An object that a pickle can reach but must not change, since later loads share it."""

    __slots__ = ()

    def __setstate__(self, state):
        raise pickle.UnpicklingError(f"a pickle tried to change a {type(self).__name__}")


class _Call(_Sealed):
    """A callable that a pickle may use."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable):
        self._call = call

    def __call__(self, *args):
        return self._call(*args)


class _DType(_Sealed):
    """Stand-in for a storage's class or a `torch.dtype`."""

    __slots__ = ("dtype",)

    def __init__(self, dtype):
        self.dtype = np.dtype(dtype)


class _Storage(_Sealed):
    """Bytes of the archive, not read yet."""

    __slots__ = ("dtype", "offset", "size")

    def __init__(self, offset: int, size: int, dtype: np.dtype):
        self.offset, self.size, self.dtype = offset, size, dtype


class _Dict(dict):
    """An OrderedDict's stand-in, which forgets attributes (state dicts carry `_metadata`)."""

    __slots__ = ()

    def __setstate__(self, state):
        pass


def _encode(text: str, encoding: str) -> bytes:
    """`bytes` in pickles of protocol 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    def __init__(self, program: io.BytesIO, archive: _Archive):
        super().__init__(program)
        self._archive = archive

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_DTYPES:
            return _DType(_TORCH_DTYPES[name])
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _DType(_STORAGES[name])
        if (module, name) in self._GLOBALS:
            return _Call(getattr(self, self._GLOBALS[module, name]))
        if (module, name) in _PLAIN:
            return _Call(_PLAIN[module, name])
        raise InputError(
            f"{self._archive.file}: wants to run {module}.{name} while loading; that is not needed "
            "to hold weights, and nothing was run. If you trust the file, load it with torch and "
            "torch.save only its state dict"
        )

    _GLOBALS: ClassVar = {
        ("torch._utils", "_rebuild_tensor"): "_tensor",
        ("torch._utils", "_rebuild_tensor_v2"): "_tensor",
        ("torch._utils", "_rebuild_tensor_v3"): "_tensor_v3",
        ("torch._utils", "_rebuild_parameter"): "_parameter",
        ("torch._utils", "_rebuild_parameter_with_state"): "_parameter",
        ("torch._tensor", "_rebuild_from_type_v2"): "_from_type",
    }

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _DType) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown persistent id {kind!r}")
        offset, size = self._archive.extent(f"data/{key}")
        if type(count) is not int or not 0 <= count * storage.dtype.itemsize <= size:
            raise InputError(
                f"{self._archive.file}: storage {key} has {size} bytes, {count} values of "
                f"{storage.dtype} were announced; copy or download the file again"
            )
        return _Storage(offset, size, storage.dtype)

    def _tensor(self, storage, offset, size, stride, *rest) -> tensor_lib.FileTensor:
        del rest  # requires_grad, hooks, metadata
        return self._view(storage, storage.dtype, offset, size, stride)

    def _tensor_v3(self, storage, offset, size, stride, *rest) -> tensor_lib.FileTensor:
        _requires_grad, _hooks, dtype, *_ = rest
        return self._view(storage, dtype.dtype, offset, size, stride)

    def _view(self, storage: _Storage, dtype, offset, shape, strides) -> tensor_lib.FileTensor:
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and n >= 0 for n in numbers) or len(shape) != len(strides):
            raise pickle.UnpicklingError(f"tensor of shape {shape}, strides {strides} at {offset}")
        shape, strides = tuple(shape), tuple(strides)
        if (offset + tensor_lib.span(shape, strides)) * dtype.itemsize > storage.size:
            raise pickle.UnpicklingError(
                f"tensor of shape {shape}, strides {strides} at {offset} leaves its storage of "
                f"{storage.size} bytes"
            )
        start = storage.offset + offset * dtype.itemsize
        return tensor_lib.FileTensor(self._archive.file, shape, dtype, strides, start)

    def _parameter(self, data, *rest):
        del rest  # requires_grad, hooks, attributes
        return data

    def _from_type(self, rebuild, kind, args, state):
        del kind, state  # a Parameter, and its attributes
        if not isinstance(rebuild, _Call):
            raise pickle.UnpicklingError("unknown way to rebuild a tensor")
        return rebuild(*args)


# Plain containers and values. Each makes a new object and touches nothing else.
_PLAIN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): lambda *args: _Dict(*args),
    ("torch", "Size"): lambda *args: tuple(*args),
    ("torch", "device"): lambda *args: ":".join(map(str, args)),
    ("torch", "Tensor"): lambda *args: None,
    ("torch.nn.parameter", "Parameter"): lambda data, *args: data,
    ("_codecs", "encode"): _encode,
    ("builtins", "set"): lambda *args: set(*args),
    ("__builtin__", "set"): lambda *args: set(*args),
    ("builtins", "frozenset"): lambda *args: frozenset(*args),
    ("__builtin__", "frozenset"): lambda *args: frozenset(*args),
    ("builtins", "complex"): lambda *args: complex(*args),
    ("__builtin__", "complex"): lambda *args: complex(*args),
}
