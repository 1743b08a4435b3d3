"""Low-rank adapters of the transformer, merged into its weights: W + (alpha / rank) B A."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from longlive_jax.checkpoints import names
from longlive_jax.checkpoints.tensor import Tensor, check_finite
from longlive_jax.errors import InputError

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")


@dataclasses.dataclass(frozen=True)
class Merged:
    """A `Tensor` that is `base` plus its adapter, summed in float32 and rounded once."""

    base: Tensor
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> np.dtype:
        return self.base.dtype

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `tensor.Tensor`."""
        b = self.b.read(start, stop).astype(np.float32)
        merged = b @ (np.float32(self.scale) * self.a.read().astype(np.float32))
        merged += self.base.read(start, stop)
        return merged.astype(self.dtype)


def merge(
    base: Mapping[str, Tensor], saved: Any, alpha: float | None, file: str
) -> dict[str, Tensor]:
    """`base`, with the LoRA in `saved` merged into the weights it adapts, when they are read.

    Args:
      base: the transformer's tensors by the original's keys.
      saved: the LoRA file's content, see `names.lora_state_dict`.
      alpha: numerator of the scale; default the file's, else each adapter's rank (scale 1).

    Raises:
      InputError: an adapter is incomplete, has other sizes, or is for a weight `base` lacks.
    """
    tensors = names.lora_state_dict(saved, file)
    adapters: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    for key, t in tensors.items():
        stripped = names.strip(key).removeprefix("transformer.")
        if match := _KEY.fullmatch(stripped):
            adapters.setdefault(_target(match["module"]), {})[match["side"]] = t
        elif stripped.endswith(".alpha") and math.prod(t.shape) == 1:
            alphas[_target(stripped.removesuffix(".alpha"))] = float(t.read().reshape(()))
        else:
            raise InputError(f"{file}: {key!r} is no part of a LoRA that can be merged")
    if alpha is None:
        alpha = _alpha(saved, file)
    merged = dict(base)
    for key, pair in adapters.items():
        if len(pair) != 2:
            raise InputError(
                f"{file}: has lora_{next(iter(pair))} but not its other half, for {key}"
            )
        if key not in base:
            raise InputError(
                f"{file}: adapts {key}, which the weights to merge into lack; is it for this model?"
            )
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or (b.shape, a.shape) != (
            (base[key].shape[0], a.shape[0]),
            (a.shape[0], base[key].shape[-1]),
        ):
            raise InputError(
                f"{file}: lora_B {b.shape} x lora_A {a.shape} do not give {key} {base[key].shape}; "
                "is it for this model?"
            )
        for side, t in pair.items():
            check_finite(t.read(), f"{file}: lora_{side} of {key}")
        rank = a.shape[0]
        own = alpha if alpha is not None else alphas.get(key, rank)
        merged[key] = Merged(base[key], a, b, own / rank)
    return merged


def _target(module: str) -> str:
    return names.dit_key(f"{module}.weight")


def _alpha(saved: Any, file: str) -> float | None:
    """The alpha of all adapters, from the file itself or from PEFT's adapter_config.json."""
    if not isinstance(saved, Mapping):
        return None
    for settings in (saved, *(saved.get(k) for k in ("adapter_config", "lora_config", "adapter"))):
        if not isinstance(settings, Mapping):
            continue
        if settings.get("use_rslora") or settings.get("use_dora"):
            raise InputError(
                f"{file}: is a rank-stabilised or DoRA adapter; only plain LoRA merges"
            )
        for key in ("lora_alpha", "alpha"):
            try:
                return float(settings[key])  # in a safetensors header it is a string
            except (KeyError, TypeError, ValueError):
                continue
    return None
