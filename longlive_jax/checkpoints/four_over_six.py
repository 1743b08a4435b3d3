"""The original's NVFP4 files, `model_4o6.pt`: a linear layer's weight is four tensors there.

    ...quantized_weight_values          uint8 (N', K' / 2), the even column in the low four bits
    ...quantized_weight_scale_factors   float8_e4m3fn, flat, in the order of the hardware
    ...quantized_weight_amax            float32 (1,) or ()
    ...quantized_weight_metadata        int32 (4,): N, K, N', K'

N is out and K in, N' and K' their next multiples of 128 and 64. q, k and v are apart. The file
names the scale rule by which its weights were quantised; no tensor shows it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import layout
from longlive_jax.checkpoints.tensor import Tensor, check_finite
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from longlive_jax.formats import from_hardware_order, nvfp4, to_hardware_order
from longlive_jax.recipes import NVFP4, Recipe

FORMAT = "longlive_generator_nvfp4"
PREFIX = "model."  # of all keys
_BUFFER = "quantized_weight_"
_DTYPES = {
    "values": np.uint8,
    "scale_factors": ml_dtypes.float8_e4m3fn,
    "amax": np.float32,
    "metadata": np.int32,
}
_TILE = 128, 64  # rows and columns that weights are padded to multiples of
_DEFAULT = "nvfp4_w4a4"  # the recipe that quantises weights as the original does
_OTHERWISE = "convert the bfloat16 file of the same model instead (model_bf16.pt, or model_te.pt)"


@dataclasses.dataclass(frozen=True)
class Packed:
    """A quantised weight in a file: the weight's own shape now, the quantised values on `read`."""

    name: str  # of the file and the tensors, for messages
    shape: tuple[int, int]  # out, in
    tensors: Mapping[str, Tensor]  # by the last part of their keys

    dtype = np.dtype(ml_dtypes.float4_e2m1fn)

    def read(self) -> dict[str, np.ndarray]:
        """values uint8 [out, in / 2], scales float8_e4m3fn [out, in / 16] row-major, amax [].

        Raises:
          InputError: scales that are not finite or negative, or a file that changed.
        """
        n, k = self.shape
        flat, amax = self.tensors["scale_factors"].read(), self.tensors["amax"].read()
        for part, array in (("scale_factors", flat), ("amax", amax)):
            check_finite(array, f"{self.name}{part}")
            if negative := int((array < 0).sum()):
                raise InputError(
                    f"{self.name}{part}: {negative} of {array.size} values are negative; they are "
                    "magnitudes, so the file is damaged: copy or download it again"
                )
        return {
            "values": self.tensors["values"].read(0, n)[:, : k // 2],
            "scales": from_hardware_order(flat, n, k // nvfp4.BLOCK),
            "amax": amax.reshape(()),
        }


def collect(tensors: Mapping[str, Tensor], file: str) -> dict[str, Tensor | Packed]:
    """`tensors`, with the four of each quantised weight as one `Packed` under the weight's key.

    Raises:
      InputError: some of the four are missing, or they do not belong together.
    """
    result: dict[str, Tensor | Packed] = {}
    groups: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        module, buffer, name = key.rpartition(_BUFFER)
        if buffer and name in _DTYPES:
            groups.setdefault(module, {})[name] = t
        else:
            result[key] = t
    for module, group in groups.items():
        if f"{module}weight" in result:
            raise InputError(f"{file}: has {module}weight twice, once quantised; remove one")
        result[f"{module}weight"] = _packed(group, f"{file}: {module}{_BUFFER}")
    return result


def _packed(group: Mapping[str, Tensor], name: str) -> Packed:
    if missing := [f"{name}{part}" for part in _DTYPES if part not in group]:
        raise InputError(f"{missing[0]}: is missing; copy or download the file again")
    for part, dtype in _DTYPES.items():
        if group[part].dtype != dtype:
            raise InputError(f"{name}{part}: is {group[part].dtype}; it must be {np.dtype(dtype)}")
    shape = group["metadata"].shape
    if shape != (4,):
        raise InputError(f"{name}metadata: has shape {shape}; it must be (4,)")
    metadata = group["metadata"].read().tolist()
    if min(metadata) < 1 or metadata[1] % nvfp4.BLOCK:
        raise InputError(
            f"{name}metadata: {metadata} must be out, in, and both padded, of a weight with a "
            f"multiple of {nvfp4.BLOCK} inputs"
        )
    shape = tuple(metadata[:2])
    for part, (wanted, _) in _entries(shape).items():
        found = group[part].shape
        if found != wanted and not (part == "amax" and found == ()):
            raise InputError(
                f"{name}{part}: has shape {found}; for a weight of {shape} it must be {wanted}"
            )
    if tuple(metadata[2:]) != _padded(shape):
        raise InputError(
            f"{name}metadata: says {shape} is padded to {tuple(metadata[2:])}; it must be "
            f"{_padded(shape)}"
        )
    return Packed(name, shape, group)


def holds(own: Recipe | None) -> bool:
    """Whether such files can hold weights quantised by the recipe."""
    return own is not None and isinstance(own.weight, NVFP4)


def recipe(saved: Any, wanted: str | None, file: str) -> Recipe:
    """The recipe by which the file was quantised: `wanted`, or the one for inference.

    Args:
      saved: the file's content, which names the scale rule.

    Raises:
      InputError: the recipe has another scale rule or none; the file does not name its own.
    """
    name = _DEFAULT if wanted is None else wanted
    chosen, rule = recipe_lib.get(name), _rule(saved)
    if chosen is None or not isinstance(chosen.weight, NVFP4):
        raise InputError(
            f"--recipe={name}: {file} holds weights in NVFP4 already; leave --recipe out, or "
            f"{_OTHERWISE}"
        )
    if rule is None and wanted is None:
        raise InputError(
            f"{file}: does not say by which scale rule it was quantised (quantization."
            f"weight_scale_rule); if you know it, name a recipe that has it, such as "
            f"--recipe={_DEFAULT} for {chosen.weight.rule!r}"
        )
    if rule not in (None, chosen.weight.rule):
        fitting = [
            r.name
            for r in recipe_lib.RECIPES.values()
            if r and isinstance(r.weight, NVFP4) and r.weight.rule == rule
        ]
        way_out = (
            f"if it was trained in {' or '.join(fitting)}, give that as --recipe; else {_OTHERWISE}"
            if fitting
            else f"no recipe has that one: {_OTHERWISE}"
        )
        raise InputError(
            f"{file}: was quantised by scale rule {rule!r}, and recipe {name!r} decodes by "
            f"{chosen.weight.rule!r}, which is off by a factor of up to 1.75; {way_out}"
        )
    return chosen


def _rule(saved: Any) -> str | None:
    settings = saved.get("quantization") if isinstance(saved, Mapping) else None
    if isinstance(settings, str):  # a safetensors header holds strings only
        try:
            settings = versioned.parse(settings)
        except ValueError:
            return None
    if not isinstance(settings, Mapping):
        return None
    rule = settings.get("weight_scale_rule") or settings.get("scale_rule")
    return rule[:80] if isinstance(rule, str) else None


def fields(
    weight: layout.Weight, tensors: Mapping[str, Packed], own: Recipe
) -> Iterator[tuple[str, np.ndarray]]:
    """One layer's arrays of a quantised weight, [part, ...], as `checkpoints.quantized` has them.

    Args:
      weight: our array of the weight without quantisation.
      own: the recipe.

    Raises:
      InputError: as `Packed.read`; or the recipe has square blocks, and the weight has not.
    """
    assert isinstance(own.weight, NVFP4)  # as `holds` says
    packed = [tensors[key] for key in weight.keys]
    parts = [p.read() for p in packed]
    for p, part in zip(packed, parts):
        scales, rows = part["scales"], own.weight.block[0]
        if (scales.reshape(-1, rows, scales.shape[-1]) != scales[::rows, None]).any():
            raise InputError(
                f"{p.name}scale_factors: are of single rows, recipe {own.name!r} has blocks of "
                f"{rows} x {rows}; give --recipe={_DEFAULT}, if that has the file's scale rule, or "
                f"{_OTHERWISE}"
            )
    for name in parts[0]:
        yield name, np.stack([part[name] for part in parts])


# ---------------------------------------------------------------------------------------------
# Back.


def header(own: Recipe) -> dict[str, str]:
    """The metadata of the original's files, for a safetensors header."""
    assert isinstance(own.weight, NVFP4) and isinstance(own.activation, NVFP4)  # as `holds` says
    quantization = {
        "format": "nvfp4",
        "backend": "fouroversix",
        "materialized": True,
        "dtype": "bfloat16",
        "scale_rule": own.weight.rule,
        "weight_scale_rule": own.weight.rule,
        "activation_scale_rule": own.activation.rule,
    }
    return {
        "checkpoint_format": FORMAT,
        "checkpoint_version": "1",
        "quantization": json.dumps(quantization),
    }


def entries(w: layout.Weight) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes, by key, of the original's tensors that one array on disk becomes.

    Args:
      w: values, scales or amax of one layer's weight, [part, ...], as `checkpoints.quantized` has
        them.
    """
    field = w.path[-1]
    # The tensor of an amax does not depend on the weight's shape.
    rows, columns = w.shape[1:] or (1, 1)
    buffers = _entries((rows, columns * (2 if field == "values" else nvfp4.BLOCK)))
    weight = layout.Weight(w.path[:-1], w.layer, w.shape)
    return {
        key.removesuffix("weight") + _BUFFER + part: buffers[part]
        for key in weight.keys
        for part in _PARTS[field]
    }


def arrays(w: layout.Weight, array: np.ndarray) -> list[np.ndarray]:
    """The original's tensors, in the order of `entries`."""
    return [made for part in array for made in _MAKE[w.path[-1]](part)]


def _values(values):
    shape = values.shape[0], 2 * values.shape[1]
    rows, columns = _padded(shape)
    pad = ((0, rows - shape[0]), (0, (columns - shape[1]) // 2))
    return np.pad(values, pad), np.array([*shape, rows, columns], np.int32)


_PARTS = {"values": ("values", "metadata"), "scales": ("scale_factors",), "amax": ("amax",)}
_MAKE = {
    "values": _values,
    "scales": lambda scales: (np.asarray(to_hardware_order(scales)),),
    "amax": lambda amax: (amax.reshape(1),),
}


def _padded(shape: tuple[int, int]) -> tuple[int, ...]:
    return tuple(-(-n // tile) * tile for n, tile in zip(shape, _TILE))


def _entries(shape):
    rows, columns = _padded(shape)
    shapes = {
        "values": (rows, columns // 2),
        "scale_factors": (rows * columns // nvfp4.BLOCK,),
        "amax": (1,),
        "metadata": (4,),
    }
    return {part: (shapes[part], np.dtype(dtype)) for part, dtype in _DTYPES.items()}
