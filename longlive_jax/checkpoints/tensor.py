"""A tensor that lies in a file and is read when its values are asked for."""

import dataclasses
import math
import zlib
from typing import Any, Protocol

import numpy as np

from longlive_jax.errors import InputError


class Tensor(Protocol):
    """A tensor in a file: shape and dtype now, values on `read`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows `start` to `stop` of the leading axis (default: all), as a row-major array."""
        ...


MAX_AXES = 16  # of a tensor in a file; weights have at most five, and NumPy ends at 64
_BLOCK = 4 << 20  # bytes read at once


@dataclasses.dataclass(eq=False)
class Member:
    """A part of a file with a CRC-32: the storage of tensors in an archive, sizes in bytes."""

    file: str
    name: str
    offset: int
    size: int
    crc: int
    good: bool = False  # once it was compared

    def check(self, content: np.ndarray | None = None) -> None:
        """Compares the part with its CRC, once.

        Args:
          content: all of its bytes, if they are in memory; else they are read.

        Raises:
          InputError: they differ.
        """
        if self.good:
            return
        value = zlib.crc32(b"" if content is None else content)
        if content is None:
            with open(self.file, "rb", buffering=0) as f:
                f.seek(self.offset)
                left = self.size
                while left and (block := f.read(min(left, _BLOCK))):
                    value, left = zlib.crc32(block, value), left - len(block)
        if value != self.crc:
            raise InputError(
                f"{self.file}: {self.name} has CRC {value:08x}, its archive says {self.crc:08x}; "
                "copy or download the file again (if torch wrote it without CRCs: torch.save again)"
            )
        self.good = True


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A strided tensor inside a file. `strides` are in elements, `offset` in bytes.

    member: the part of the file that it lies in, compared with its CRC at the first read.

    The file is not mapped but read: pages of a mapping would count as this process's memory.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]
    offset: int
    member: Member | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def __setstate__(self, state):
        raise TypeError(
            "a FileTensor is never unpickled: a file could have itself read another one"
        )

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Tensor`.

        Raises:
          InputError: the file has become shorter or unreadable.
        """
        shape, offset = self.shape, self.offset
        if shape:
            stop = shape[0] if stop is None else stop
            shape = (stop - start, *shape[1:])
            offset += start * self.strides[0] * self.dtype.itemsize
        if 0 in shape:
            return np.empty(shape, self.dtype)
        count = span(shape, self.strides)
        try:
            flat = np.fromfile(self.file, np.uint8, count * self.dtype.itemsize, offset=offset)
            if self.member is not None and flat.size == count * self.dtype.itemsize:
                self.member.check(flat if flat.size == self.member.size else None)
        except OSError as error:
            raise InputError(f"{self.file}: {error.strerror or error}") from error
        if flat.size != count * self.dtype.itemsize:
            raise InputError(f"{self.file}: ends inside a tensor; copy or download it again")
        strides = tuple(s * self.dtype.itemsize for s in self.strides)
        array = np.ndarray(shape, self.dtype, flat, strides=strides)
        return np.ascontiguousarray(array).reshape(shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ArrayTensor:
    """A tensor whose values are in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Tensor`."""
        return np.ascontiguousarray(self.array[start:stop] if self.shape else self.array)


def span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Number of elements from the first to the last that a strided tensor touches."""
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def check_finite(array: np.ndarray, name: str) -> None:
    """Refuses NaN and infinity.

    Raises:
      InputError: naming the tensor and how many of its values are not finite.
    """
    flat = array.reshape(-1)
    step = 1 << 22  # bounds the memory of the mask
    finite = (np.isfinite(flat[i : i + step]).sum() for i in range(0, flat.size, step))
    bad = flat.size - int(sum(finite))
    if bad:
        raise InputError(
            f"{name}: {bad} of {array.size} values are not finite (NaN or infinity); the file is "
            "damaged or its training diverged, use an earlier one"
        )


def promote(dtypes: Any) -> np.dtype:
    """The smallest float dtype that holds all values of these dtypes exactly."""
    dtypes = sorted(set(map(np.dtype, dtypes)), key=str)
    if len(dtypes) == 1:
        return dtypes[0]
    return np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
