"""How our arrays and the original's tensors correspond, derived from a tree of ParamSpecs.

Paths are the original's keys split at the dots; layers are stacked. A weight of a linear layer is
ours [in, out], theirs (out, in); q, k, v are one matrix here and three there.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from longlive_jax import params as params_lib

_FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}
_EMBEDDINGS = ("token_embedding", "embedding")  # tables to look up, not matrices to multiply with
_PATCH = (1, 2, 2)  # of the transformer's patch convolution: frames, rows, columns


class Piece(NamedTuple):
    """Rows of one of our arrays, from `start` on; a layer is one row of a stacked array."""

    path: params_lib.Path
    start: int
    array: np.ndarray


@dataclasses.dataclass(frozen=True)
class Weight:
    """One of our arrays, or one layer of it, and the original's tensors that make it."""

    path: params_lib.Path
    layer: int | None  # its place on the leading axis of our stacked array
    shape: tuple[int, ...]  # ours, without the layer axis

    @property
    def keys(self) -> tuple[str, ...]:
        """The original's keys; several are joined along our last axis."""
        path = list(self.path)
        if self.layer is not None:
            path.insert(1, str(self.layer))
        names = _FUSED.get(path[-2], (path[-2],)) if len(path) > 1 else ()
        return tuple(".".join([*path[:-2], n, path[-1]]) for n in names) or (path[-1],)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The original's shape; the same for all of `keys`."""
        *lead, last = self.shape
        shape = (*lead, last // len(self.keys))
        match self._kind:
            case "linear":
                return shape[::-1]
            case "patch":
                return (last, self.shape[0] // math.prod(_PATCH), *_PATCH)
            case "conv":
                return (shape[-1], shape[-2], *shape[:-2])
            case "gamma":
                # Attention looks at single frames: one axis less.
                return (last, 1, 1) if self.path[-2] == "norm" else (last, 1, 1, 1)
            case "modulation":
                return (1, *shape)
        return shape

    def from_torch(self, tensors: Sequence[np.ndarray]) -> np.ndarray:
        """Our array of the original's tensors, a view where one is possible."""
        arrays = [self._from_torch(t) for t in tensors]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)

    def to_torch(self, array: np.ndarray) -> list[np.ndarray]:
        """The inverse of `from_torch`: one view for each of `keys`."""
        return [self._to_torch(a) for a in np.split(array, len(self.keys), axis=-1)]

    @property
    def rows_are_rows(self) -> bool:
        """Whether our rows are the original's rows, so that some can be read alone."""
        return self._kind == "plain" and len(self.keys) == 1

    @property
    def _kind(self) -> str:
        if self.path[-1] == "modulation":
            return "modulation"
        if self.path[-1] == "gamma":
            return "gamma"
        if self.path == ("patch_embedding", "weight"):
            return "patch"
        if len(self.shape) > 2:
            return "conv"
        if len(self.shape) == 2 and self.path[-2] not in _EMBEDDINGS:
            return "linear"
        return "plain"

    @property
    def _axes(self) -> tuple[int, ...]:
        """The original's axes in the order of ours."""
        axes = range(len(self.torch_shape))
        match self._kind:
            case "linear" | "conv":
                return (*axes[2:], 1, 0)
            case "patch":
                return (*axes[1:], 0)
        return tuple(axes)

    def _from_torch(self, t: np.ndarray) -> np.ndarray:
        return t.transpose(self._axes).reshape(*self.shape[:-1], -1)

    def _to_torch(self, a: np.ndarray) -> np.ndarray:
        theirs, axes = self.torch_shape, self._axes
        return a.reshape([theirs[i] for i in axes]).transpose(np.argsort(axes))


def weights(spec: params_lib.Tree) -> Iterator[Weight]:
    """All weights of a model: first those outside the layers, then layer by layer."""
    leaves = params_lib.flatten(spec)
    stacked = {p: s for p, s in leaves.items() if is_stacked(s)}
    for path, s in leaves.items():
        if path not in stacked:
            yield Weight(path, None, s.shape)
    for layer in range(max((s.shape[0] for s in stacked.values()), default=0)):
        for path, s in stacked.items():
            if layer < s.shape[0]:
                yield Weight(path, layer, s.shape[1:])


def is_stacked(s: params_lib.ParamSpec) -> bool:
    """Whether the leading axis of a parameter counts layers."""
    return s.axes[:1] == ("layer",)


def torch_shapes(spec: params_lib.Tree) -> dict[str, tuple[int, ...]]:
    """Key and shape of each of the original's tensors."""
    return {key: w.torch_shape for w in weights(spec) for key in w.keys}
