"""The published files of TAEHV: of an encoder and a decoder, the decoder."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from longlive_jax.checkpoints.tensor import Tensor

_DECODER = "decoder."


@dataclasses.dataclass(frozen=True)
class _LastRows:
    """A tensor's last rows."""

    whole: Tensor
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.whole.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        skipped = self.whole.shape[0] - self.rows
        stop = self.rows if stop is None else stop
        return self.whole.read(skipped + start, skipped + stop)


def decoder(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The decoder's tensors, by the original's keys; others of a file without a decoder.

    A growth in time of more frames than `expected` keeps the last ones, as the original does.
    """
    found = {k: t for k, t in tensors.items() if k.startswith(_DECODER)}

    def fitting(key: str, tensor: Tensor) -> Tensor:
        rows = expected.get(key, tensor.shape)[:1]
        grows = key.endswith(".conv.weight") and rows and tensor.shape[0] > rows[0]
        return _LastRows(tensor, rows[0]) if grows else tensor

    return {k: fitting(k, t) for k, t in found.items()} or dict(tensors)
