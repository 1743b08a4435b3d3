"""Files of `torch.save`, read without torch and without running them.

Since PyTorch 1.6 such a file is a zip archive: `data.pkl`, a pickle of nested containers, and
`data/KEY`, the raw bytes of each storage. A pickle is a program that may call anything that can be
imported. Here it is read by a machine of our own, which hashes and prints nothing nested, and may
call only what `_Names` finds: stand-ins of this file. Any other name stops the load with an error
that names it.
"""

import contextlib
import errno
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from longlive_jax.checkpoints import foreign, pickle_machine
from longlive_jax.checkpoints import tensor as tensor_lib
from longlive_jax.checkpoints.pickle_machine import Call, Dict, plain
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
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # flags of a zip archive's members
_MAX_EXPANDED = 64 << 20  # bytes of a tensor that repeats its storage: a bias for all positions
_RESAVE = "load it with the torch that wrote it, then torch.save(state_dict, NEW_FILE)"


def read(file: str | os.PathLike) -> Any:
    """The saved object: dicts, lists, tuples and scalars, with `FileTensor`s for tensors.

    Raises:
      InputError: the file is damaged or of another kind, or its pickle calls anything but the few
        constructors that weights need (nothing of it is run).
    """
    file = os.fspath(file)
    try:
        with open(file, "rb") as raw:
            if raw.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
                raw.seek(0)
                return _read_legacy(file, raw)
            with zipfile.ZipFile(file) as archive:
                members = _Archive(file, archive, raw)
                program = members.member("data.pkl")
                with _damage(file, "data.pkl"):
                    names = _Names(file, members.storage)
                    return pickle_machine.run(program, names.find, names.storage)[0]
    except InputError:
        raise
    except OSError as error:
        if error.strerror is None or error.errno == errno.EINVAL:  # an offset that no file has
            raise InputError(f"{file}: {_foreign(file)}") from error
        raise InputError(f"{file}: {error.strerror}") from error
    except (
        zipfile.BadZipFile, struct.error, NotImplementedError, RuntimeError, EOFError, ValueError,
        OverflowError,
    ) as error:  # fmt: skip
        raise InputError(f"{file}: {_foreign(file)}") from error


@contextlib.contextmanager
def _damage(file: str, what: str) -> Iterator[None]:
    """Makes an InputError of whatever a damaged pickle raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file}: its {what} is damaged ({type(error).__name__}: {str(error)[:200]}); copy or "
            "download the file again"
        ) from error


def _read_legacy(file: str, raw: IO[bytes]) -> Any:
    """The object in a file of PyTorch before 1.6: five pickles, then the storages one by one.

    The pickles are a magic number, a version, facts of the machine, the object, and the storages'
    keys in their order. Each storage is the number of its values, int64, and the values.
    """
    content = raw.read(pickle_machine.MAX_BYTES)
    total = os.fstat(raw.fileno()).st_size
    announced: dict[str, tuple[np.dtype, int]] = {}

    def announce(key: str, dtype: np.dtype, count: int) -> tensor_lib.Member:
        if announced.setdefault(key, (dtype, count)) != (dtype, count):
            raise pickle.UnpicklingError("a storage of two kinds")
        return tensor_lib.Member(file, key, 0, count * dtype.itemsize, 0)

    def placed(key: str, dtype: np.dtype, count: int) -> tensor_lib.Member:
        return members[key]

    def run(at: int, storage: Callable = announce) -> tuple[Any, int]:
        names = _Names(file, storage)
        value, size = pickle_machine.run(content[at:], names.find, names.storage)
        return value, at + size

    with _damage(file, "pickle"):
        values, ends = [], [0]
        for _ in range(5):  # in this pass tensors have no place yet
            value, end = run(ends[-1])
            values.append(value)
            ends.append(end)
        _, version, machine, _, keys = values
        start, at = ends[3], ends[5]
        if version != 1001 or not isinstance(machine, dict) or not machine.get("little_endian"):
            raise pickle.UnpicklingError("another version, or a machine of another byte order")
        if not isinstance(keys, list) or sorted(map(plain, keys)) != sorted(announced):
            raise pickle.UnpicklingError("other storages than its tensors have")
        members: dict[str, tensor_lib.Member] = {}
        for key in keys:
            dtype, count = announced[key]
            raw.seek(at)
            if raw.read(8) != struct.pack("<q", count):
                raise pickle.UnpicklingError(f"storage {key[:40]} has another size than announced")
            size = count * dtype.itemsize
            members[key] = tensor_lib.Member(file, key, at + 8, size, 0, good=True)  # has no CRC
            at += 8 + size
        if at != total:
            raise pickle.UnpicklingError(f"it ends at byte {total}, its storages at byte {at}")
        return run(start, placed)[0]


def _foreign(file: str) -> str:
    with open(file, "rb") as f:
        start = f.read(512)
    if start[257:262] == b"ustar":
        return f"is a tar archive (PyTorch before 0.1.10, or an archive to unpack first); {_RESAVE}"
    if start.startswith(b"PK"):
        return "is a torch.save file that was cut short or is damaged; copy or download it again"
    return foreign.describe(start) or "is neither a torch.save nor a safetensors file"


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
        if len(self._members) < len(archive.namelist()):
            raise InputError(f"{file}: has members of one name; copy or download it again")
        self._extents: dict[str, tensor_lib.Member] = {}
        if self._prefix + "byteorder" in self._members:
            order = self.member("byteorder")
            if order != b"little":
                raise InputError(f"{file}: is {order[:9]!r}-endian; {_RESAVE} on a usual machine")

    def member(self, name: str) -> bytes:
        """The content of a small member, compared with its CRC."""
        extent = self.extent(name)
        if extent.size > pickle_machine.MAX_BYTES:
            raise InputError(
                f"{self.file}: {name} has {extent.size} bytes, at most {pickle_machine.MAX_BYTES} "
                "are read; torch.save only the state dict"
            )
        self._raw.seek(extent.offset)
        content = self._raw.read(extent.size)
        extent.check(np.frombuffer(content, np.uint8))
        return content

    def storage(self, key: str, dtype: np.dtype, count: int) -> tensor_lib.Member:
        """Where the values of a storage lie."""
        member = self.extent(f"data/{key}")
        if count * dtype.itemsize > member.size:
            raise InputError(
                f"{self.file}: storage {key[:80]} has {member.size} bytes, {count} values of "
                f"{dtype} were announced; copy or download the file again"
            )
        return member

    def extent(self, name: str) -> tensor_lib.Member:
        """Where a member lies, and its CRC."""
        name = self._prefix + name
        if name in self._extents:
            return self._extents[name]
        if name not in self._members:
            raise InputError(f"{self.file}: has no {name[:80]}; copy or download it again")
        info = self._archive.getinfo(name)
        if info.flag_bits & _ENCRYPTED:
            raise InputError(f"{self.file}: {name} is encrypted; unpack it, and {_RESAVE}")
        if info.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{self.file}: {name} is compressed, torch.save's never is; {_RESAVE}")
        # The local header's name and extra field may be longer than the directory's.
        self._raw.seek(info.header_offset)
        header = self._raw.read(30)
        if len(header) < 30 or header[:4] != b"PK\x03\x04":
            raise zipfile.BadZipFile(name)
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + 30 + name_size + extra_size
        total = os.fstat(self._raw.fileno()).st_size
        if info.file_size != info.compress_size or offset + info.file_size > total:
            raise zipfile.BadZipFile(name)
        member = tensor_lib.Member(self.file, name, offset, info.file_size, info.CRC)
        self._extents[name] = member
        return member


class _DType(NamedTuple):
    """Stand-in for a storage's class or a `torch.dtype`."""

    dtype: np.dtype


class _Storage(NamedTuple):
    """Bytes of the archive, not read yet."""

    member: tensor_lib.Member
    dtype: np.dtype


def _encode(text: str, encoding: str) -> bytes:
    """`bytes` in pickles of protocol 2."""
    if encoding != "latin1" or not isinstance(text, str):
        raise pickle.UnpicklingError("bytes in another encoding than latin1")
    return text.encode("latin1")


class _Names:
    """What a pickle may name: a few constructors of tensors and of plain containers."""

    def __init__(self, file: str, storage: Callable[[str, np.dtype, int], tensor_lib.Member]):
        self._file, self._storage = file, storage
        tensor, parameter = Call(self._tensor), Call(lambda data, *rest: data)
        self._calls = _PLAIN | {
            ("torch._utils", "_rebuild_tensor"): tensor,
            ("torch._utils", "_rebuild_tensor_v2"): tensor,
            ("torch._utils", "_rebuild_tensor_v3"): Call(self._tensor_v3),
            ("torch._utils", "_rebuild_parameter"): parameter,
            ("torch._utils", "_rebuild_parameter_with_state"): parameter,
            ("torch._tensor", "_rebuild_from_type_v2"): Call(self._from_type),
        }

    def find(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_DTYPES:
            return _DType(np.dtype(_TORCH_DTYPES[name]))
        if module in ("torch", "torch.storage") and name in _STORAGES:
            return _DType(np.dtype(_STORAGES[name]))
        if (module, name) in self._calls:
            return self._calls[module, name]
        raise InputError(
            f"{self._file}: wants to run {module[:80]}.{name[:80]} while loading; that is "
            "not needed to hold weights, and nothing was run. If you trust the file, load it with "
            "torch and torch.save only its state dict"
        )

    def storage(self, pid: Any) -> _Storage:
        kind, storage, key, _, count, *view = pid
        if kind != "storage" or not isinstance(storage, _DType) or not isinstance(key, str):
            raise pickle.UnpicklingError("an unknown persistent id")
        if type(count) is not int or not 0 <= count < 1 << 60 or any(view):
            raise pickle.UnpicklingError("a storage of no size, or a part of another one")
        return _Storage(self._storage(key, storage.dtype, count), storage.dtype)

    def _tensor(self, storage, offset, size, stride, *rest) -> tensor_lib.FileTensor:
        del rest  # requires_grad, hooks, metadata
        return self._view(storage, storage.dtype, offset, size, stride)

    def _tensor_v3(self, storage, offset, size, stride, *rest) -> tensor_lib.FileTensor:
        _requires_grad, _hooks, dtype, *_ = rest
        return self._view(storage, dtype.dtype, offset, size, stride)

    def _view(self, storage, dtype, offset, shape, strides) -> tensor_lib.FileTensor:
        if not isinstance(storage, _Storage) or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError("a tensor without a storage")
        rank = len(shape)
        if rank != len(strides) or rank > tensor_lib.MAX_AXES:
            raise pickle.UnpicklingError(f"a tensor of {rank} axes and {len(strides)} strides")
        numbers = (offset, *shape, *strides)
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise pickle.UnpicklingError("a tensor whose sizes are no whole numbers above -1")
        shape, strides, member = tuple(shape), tuple(strides), storage.member
        size = (offset + tensor_lib.span(shape, strides)) * dtype.itemsize
        expanded = math.prod(shape) * dtype.itemsize
        if size > member.size or expanded > max(member.size, _MAX_EXPANDED):
            raise pickle.UnpicklingError(
                f"tensor of shape {shape}, strides {strides} at {offset} leaves its storage of "
                f"{member.size} bytes"
            )
        start = member.offset + offset * dtype.itemsize
        return tensor_lib.FileTensor(self._file, shape, dtype, strides, start, member)

    def _from_type(self, rebuild, kind, args, state):
        del kind, state  # a Parameter, and its attributes
        if not isinstance(rebuild, Call):
            raise pickle.UnpicklingError("unknown way to rebuild a tensor")
        return rebuild.run(*args)


def _ordered(pairs=()) -> Dict:
    if isinstance(pairs, dict):
        return Dict(pairs)
    return Dict((plain(key), value) for key, value in pairs)


# Plain containers and values. Each makes a new object, touches nothing else, and hashes and prints
# only texts and numbers.
_SETS = {kind: Call(lambda items=(), kind=kind: kind(map(plain, items)))
         for kind in (set, frozenset)}  # fmt: skip
_COMPLEX = Call(lambda *args: complex(*map(plain, args)))
_PLAIN: dict[tuple[str, str], Call] = {
    ("collections", "OrderedDict"): Call(_ordered),
    ("torch", "Size"): Call(lambda sizes=(): tuple(map(plain, sizes))),
    ("torch", "device"): Call(lambda *args: ":".join(str(plain(a)) for a in args)),
    ("torch", "Tensor"): Call(lambda *args: None),
    ("torch.nn.parameter", "Parameter"): Call(lambda data, *args: data),
    ("_codecs", "encode"): Call(_encode),
    ("builtins", "set"): _SETS[set],
    ("__builtin__", "set"): _SETS[set],
    ("builtins", "frozenset"): _SETS[frozenset],
    ("__builtin__", "frozenset"): _SETS[frozenset],
    ("builtins", "complex"): _COMPLEX,
    ("__builtin__", "complex"): _COMPLEX,
}
