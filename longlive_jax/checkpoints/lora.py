"""Low-rank adapters of the transformer, merged into its weights: W + (alpha / rank) B A.

Files also hold differences of whole weights and biases, which are added as they are, and biases of
lora_B, which have the adapter's scale.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, lora_scale, names
from longlive_jax.checkpoints.tensor import ArrayTensor, Tensor, check_finite
from longlive_jax.errors import InputError

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora[_.](?P<side>A|B|down|up)(?:\.(?!weight$|bias$)[^.]+)?"
    r"\.(?P<what>weight|bias)"
)
_SIDES = {"A": "A", "B": "B", "down": "A", "up": "B"}
# Whole differences: what they are added to.
_DIFFERENCES = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}


@dataclasses.dataclass(frozen=True)
class Merged:
    """A `Tensor` that is `base` plus its adapter, summed in float32 and rounded once."""

    base: Tensor
    factors: tuple[Tensor, Tensor] | None  # (rank, in), (out, rank)
    scale: float
    differences: tuple[tuple[float, Tensor], ...]  # with their scales

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `tensor.Tensor`."""
        if self.factors is None:
            merged = self.base.read(start, stop).astype(np.float32)
        else:
            a, b = self.factors
            merged = b.read(start, stop).astype(np.float32) @ (
                np.float32(self.scale) * a.read().astype(np.float32)
            )
            merged += self.base.read(start, stop)
        for scale, difference in self.differences:
            merged += np.float32(scale) * difference.read(start, stop).astype(np.float32)
        return merged.astype(self.dtype)


@dataclasses.dataclass
class Adapter:
    """What a file has for one module, by its name there."""

    module: str
    factors: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by A or B
    differences: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # by weight or bias
    bias: Tensor | None = None  # of lora_B
    alpha: float | None = None


def merge(
    base: Mapping[str, Tensor], saved: Any, alpha: float | None, file: str
) -> dict[str, Tensor]:
    """`base`, with the LoRA in `saved` merged into the weights it adapts, when they are read.

    Args:
      base: the transformer's tensors by the original's keys.
      saved: the LoRA file's content, see `names.lora_state_dict`.
      alpha: numerator of all scales; default each adapter's own, by the file: an alpha beside it,
        else one for its name, else the file's, else its rank (scale 1).

    Raises:
      InputError: an adapter is incomplete, has other sizes, or is for a weight `base` lacks; or its
        scale is none that an adapter can have.
    """
    merged: dict[str, Tensor] = dict(base)
    scales = lora_scale.read({} if alpha is not None else saved, file)
    for module, adapter in adapters(base, saved, file).items():
        scale = 1.0
        extra: dict[str, list[tuple[float, Tensor]]] = {}
        for leaf, t in adapter.differences.items():
            extra.setdefault(leaf, []).append((1.0, t))
        factors = None
        if adapter.factors or adapter.bias is not None:
            factors = _factors(base, module, adapter, file)
            rank = factors[0].shape[0]
            if alpha is not None:
                scale = lora_scale.check(alpha, rank, f"--lora_alpha: {module}", zero=True)
            else:
                own = names.lora_module(adapter.module)
                scale = scales.of((module, own), rank, own=adapter.alpha)
            if adapter.bias is not None:
                extra.setdefault("bias", []).append((scale, adapter.bias))
        for leaf in {**({"weight": 1} if factors else {}), **extra}:
            key = f"{module}.{leaf}"
            differences = [(s, _fitted(base, key, t, file)) for s, t in extra.get(leaf, [])]
            own_factors = factors if leaf == "weight" else None
            merged[key] = Merged(base[key], own_factors, scale, tuple(differences))
    return merged


def merged_pieces(
    pieces: Iterable[layout.Piece], spec: params_lib.Tree, merged: Mapping[str, Any]
) -> Iterator[layout.Piece]:
    """A stored transformer's pieces, with the adapters merged into them row by row.

    Args:
      merged: of `merge`, whose `base` was `placeholders(spec)`.

    Raises:
      InputError: a merged array is not finite.
    """
    shapes = params_lib.flatten(spec)
    for piece in pieces:
        stacked = layout.is_stacked(shapes[piece.path])
        rows = list(enumerate(piece.array, piece.start)) if stacked else [(None, piece.array)]
        for layer, array in rows:
            w = layout.Weight(piece.path, layer, array.shape)
            own = [merged[key] for key in w.keys]
            if any(isinstance(t, Merged) for t in own):
                arrays = [
                    dataclasses.replace(t, base=ArrayTensor(base)).read()
                    if isinstance(t, Merged)
                    else base
                    for t, base in zip(own, w.to_torch(array), strict=True)
                ]
                array = w.from_torch(arrays)
                check_finite(array, f"{'/'.join(piece.path)} of layer {layer}, merged")
            start = piece.start if layer is None else layer
            yield layout.Piece(piece.path, start, array if layer is None else array[None])


def placeholders(spec: params_lib.Tree) -> dict[str, Tensor]:
    """Tensors of a transformer's names and shapes, without values: a `base` for `merge`."""
    zero = np.zeros((), np.float32)
    return {
        key: ArrayTensor(np.broadcast_to(zero, shape))
        for key, shape in layout.torch_shapes(spec).items()
    }


def adapters(base: Mapping[str, Any], saved: Any, file: str) -> dict[str, Adapter]:
    """What a file holds, by the original's names of modules.

    base: the transformer's keys, by which modules written with underscores are told apart.

    Raises:
      InputError: a tensor is no part of a LoRA, no float, or there twice.
    """
    found: dict[str, Adapter] = {}
    written = {key.rpartition(".")[0].replace(".", "_"): key.rpartition(".")[0] for key in base}

    def of(module: str) -> Adapter:
        target = names.lora_target(module, written)
        return found.setdefault(target, Adapter(module))

    def once(holder: dict[str, Tensor], name: str, t: Tensor, key: str) -> None:
        if name in holder:
            raise InputError(f"{file}: has {key[:120]!r} twice, by other names; remove one")
        holder[name] = t

    for key, t in names.lora_state_dict(saved, file).items():
        module, _, last = (stripped := names.strip(key)).rpartition(".")
        whole = jnp.issubdtype(t.dtype, jnp.integer)
        if match := _FACTOR.fullmatch(stripped):
            adapter, side = of(match["module"]), _SIDES[match["side"]]
            if match["what"] == "weight":
                once(adapter.factors, side, t, key)
            elif side == "B" and adapter.bias is None:
                adapter.bias = t
            else:
                raise InputError(f"{file}: {key[:120]!r} is no part of a LoRA that can be merged")
        elif module and last in _DIFFERENCES:
            once(of(module).differences, _DIFFERENCES[last], t, key)
        elif module and last == "alpha" and t.shape in ((), (1,)) and (whole or _is_float(t)):
            adapter = of(module)
            if adapter.alpha is not None:
                raise InputError(f"{file}: has {key[:120]!r} twice, by other names; remove one")
            adapter.alpha = float(t.read().reshape(()))
            continue
        else:
            raise InputError(f"{file}: {key[:120]!r} is no part of a LoRA that can be merged")
        if not _is_float(t):
            raise InputError(f"{file}: {key[:120]!r} is {t.dtype}; adapters are floats")
    return {target: a for target, a in found.items() if a.factors or a.bias or a.differences}


def _is_float(t: Tensor) -> bool:
    return bool(jnp.issubdtype(t.dtype, jnp.floating))


def _factors(
    base: Mapping[str, Tensor], module: str, adapter: Adapter, file: str
) -> tuple[Tensor, Tensor]:
    """A and B of an adapter, which fit the weight and are finite."""
    key = f"{module}.weight"
    if len(adapter.factors) != 2:
        side = "".join(adapter.factors) or "B's bias"
        raise InputError(f"{file}: has lora_{side} but not its other half, for {key}")
    a, b = adapter.factors["A"], adapter.factors["B"]
    whole = _base(base, key, file).shape
    if len(a.shape) != 2 or (b.shape, a.shape) != (
        (whole[0], a.shape[0]),
        (a.shape[0], whole[-1]),
    ):
        raise InputError(
            f"{file}: lora_B {b.shape} x lora_A {a.shape} do not give {key} {whole}; "
            "is it for this model?"
        )
    if not 0 < a.shape[0] <= max(whole):
        raise InputError(
            f"{file}: the adapter of {key} has rank {a.shape[0]}; it must be from 1 to "
            f"{max(whole)}, the weight's larger side"
        )
    for side, t in adapter.factors.items():
        check_finite(t.read(), f"{file}: lora_{side} of {key}")
    return a, b


def _base(base: Mapping[str, Tensor], key: str, file: str) -> Tensor:
    if key not in base:
        raise InputError(
            f"{file}: adapts {key[:120]}, which the weights to merge into lack; is it for this "
            "model?"
        )
    return base[key]


def _fitted(base: Mapping[str, Tensor], key: str, difference: Tensor, file: str) -> Tensor:
    """A whole difference, or the bias of lora_B, if it has the shape of what it is added to."""
    shape = _base(base, key, file).shape
    if difference.shape != shape:
        raise InputError(
            f"{file}: the difference of {key} has shape {difference.shape}, the weight {shape}; "
            "is it for this model?"
        )
    check_finite(difference.read(), f"{file}: the difference of {key}")
    return difference
