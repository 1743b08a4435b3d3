"""The original's weight files to ours, one tensor at a time."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import (
    actions,
    four_over_six,
    layout,
    lora,
    names,
    peft,
    quantized,
    sources,
    taehv,
)
from longlive_jax.checkpoints import parts as parts_lib
from longlive_jax.checkpoints.tensor import Tensor, check_finite, promote
from longlive_jax.errors import InputError
from longlive_jax.recipes import Recipe

_ROWS_BYTES = 128 << 20  # tables larger than this are read in several pieces


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights of one part: validated by name and shape, not read yet."""

    part: parts_lib.Part
    spec: params_lib.Tree  # of the arrays in the file: a VAE file may be a decoder alone
    section: Any  # the part's section of the config
    tensors: Mapping[str, Any]  # by the original's keys: a Tensor or a four_over_six.Packed
    files: tuple[sources.Located, ...]
    recipe: Recipe | None  # by which linear layers' weights are quantised, here or in the file
    dtype: np.dtype  # of weights before they are quantised

    def pieces(self, progress: Callable[[int], None] = lambda n: None) -> Iterator[layout.Piece]:
        """Our arrays for `store.save` with `recipe`, each read when asked for.

        Args:
          progress: called with the number of the original's tensors read since the last call.

        Raises:
          InputError: values that are not finite, or a file that changed.
        """
        read = self._pieces(progress)
        return quantized.pieces(read, self.recipe, self.dtype, self.files[0])

    def _pieces(self, progress):
        dtypes = self._dtypes()
        for w in layout.weights(self.spec):
            if _packed(self.tensors[w.keys[0]]):
                assert self.recipe is not None and w.layer is not None  # of a block
                for field, array in four_over_six.fields(w, self.tensors, self.recipe):
                    yield layout.Piece((*w.path, field), w.layer, array[None])
                progress(len(w.keys))
                continue
            sources = [self.tensors[k] for k in w.keys]
            dtype = dtypes[w.path]
            if w.layer is None and w.rows_are_rows and w.shape[0] > 1:
                row = sources[0].dtype.itemsize * int(np.prod(w.shape[1:]))
                step = max(1, _ROWS_BYTES // max(1, row))
                for i in range(0, w.shape[0], step):
                    array = self._read(w.keys[0], i, min(i + step, w.shape[0]))
                    yield layout.Piece(w.path, i, array.astype(dtype, copy=False))
            else:
                arrays = [self._read(k).astype(dtype, copy=False) for k in w.keys]
                array = w.from_torch(arrays)
                del arrays
                piece = array if w.layer is None else array[None]
                yield layout.Piece(w.path, w.layer or 0, piece)
                del array, piece
            progress(len(w.keys))

    def _read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        array = self.tensors[key].read(start, stop)
        check_finite(array, f"{self.files[0]}: {key}")
        return array

    def _dtypes(self) -> dict[params_lib.Path, np.dtype]:
        """The dtype of each of our arrays: its tensors' own, or one that holds all their values."""
        found: dict[params_lib.Path, set[np.dtype]] = {}
        for w in layout.weights(self.spec):
            if _packed(self.tensors[w.keys[0]]):
                continue
            found.setdefault(w.path, set()).update(self.tensors[k].dtype for k in w.keys)
        return {path: promote(dtypes) for path, dtypes in found.items()}


def open_part(
    part: str,
    source: str,
    config: config_lib.Config,
    *,
    use_ema: bool = False,
    lora_source: str | None = None,
    lora_alpha: float | None = None,
    weights: str = "average",
    recipe: str | None = None,
) -> Source:
    """Opens and validates the weights of one part; reads no values but a LoRA's, and sizes.

    Args:
      part: "dit", "vae" or "umt5".
      source: file, folder or hf:// address; see `sources.locate`.
      use_ema: take the moving average of the weights from a training checkpoint.
      lora_source: a LoRA to merge; a file, folder or hf:// address too, or the folder of a run
        that trains one.
      lora_alpha: numerator of the LoRA's scale; default the file's, else its rank.
      weights: of such a run, a key of `workdir.WEIGHTS`.
      recipe: quantises the transformer's linear layers, from the config's dtype. If the file is
        already quantised, the recipe that did it; default the one for inference.

    Raises:
      InputError: no such file; a damaged, foreign or malicious one; weights missing, too many, of
        other shapes than `config` gives, or not floats; quantised ones by another rule than the
        recipe's, or with a LoRA.
    """
    network = parts_lib.PARTS[part]
    section = network.config(config)
    path = sources.locate(source, part)
    saved = sources.read(path)
    tensors: dict[str, Any] = names.state_dict(saved, part, use_ema, path)
    if part == "dit":
        tensors = actions.collect(four_over_six.collect(tensors, path), path)
    spec = network.spec(section)
    if part == "vae" and section.kind == "taehv":
        tensors = taehv.decoder(tensors, layout.torch_shapes(spec))
    elif part == "vae" and "encoder" not in (found := {k.partition(".")[0] for k in tensors}):
        # A decoder alone; conv1 belongs to the encoder, but some files keep it.
        spec = {k: v for k, v in spec.items() if k not in {"encoder", "conv1"} - found}
    _check(network, section, spec, tensors, path)
    own = None if recipe is None else recipe_lib.get(recipe)
    if _quantized(spec, tensors, path):
        if lora_source is not None:
            raise InputError(
                f"--lora={lora_source}: cannot be merged into quantised weights, {path}; merge it "
                "into the bfloat16 file of the same model, and add --recipe to quantise the sum"
            )
        own = four_over_six.recipe(saved, recipe, path)
    quantized.spec(spec, own)  # refuses sides that the blocks do not divide
    used = (path,)
    if lora_source is not None:
        adapters, lora_path = peft.read(lora_source, weights, lora_alpha)
        tensors = lora.merge(tensors, adapters, lora_alpha, lora_path)
        used += (lora_path,)
    return Source(network, spec, section, tensors, used, own, config.compute_dtype)


def _packed(tensor: Tensor | four_over_six.Packed) -> bool:
    return isinstance(tensor, four_over_six.Packed)


def _quantized(spec, tensors: Mapping[str, Tensor | four_over_six.Packed], path: str) -> bool:
    """Whether the file has quantised weights; then all that recipes quantise must be."""
    found = {key for key, t in tensors.items() if _packed(t)}
    linear = {k for w in layout.weights(spec) if quantized.is_linear(w.path) for k in w.keys}
    if found and found != linear:
        wrong = sorted(found ^ linear)
        raise InputError(
            f"{path}: quantises {len(found & linear)} of the {len(linear)} weights that recipes "
            f"do, and {len(found - linear)} others; the first that differs is {wrong[0]}: convert "
            "the bfloat16 file of the same model instead (model_bf16.pt, or model_te.pt)"
        )
    return bool(found)


def _check(network, section, spec, tensors: Mapping[str, Tensor], path: str) -> None:
    expected = layout.torch_shapes(spec)
    found = {k: t.shape for k, t in tensors.items()}
    problems = {
        "missing": [f"{k} {s}" for k, s in expected.items() if k not in found],
        "not expected": [f"{k} {s}" for k, s in found.items() if k not in expected],
        "of another shape": [
            f"{k}: expected {s}, found {found[k]}"
            for k, s in expected.items()
            if found.get(k, s) != s
        ],
    }
    texts = [
        f"{len(these)} {what} ({', '.join(these[:5])}{', ...' if these[5:] else ''})"
        for what, these in problems.items()
        if these
    ]
    if texts:
        raise InputError(
            f"{path}: does not hold the {network.name} that the config describes: of "
            f"{len(expected)} weights, {'; '.join(texts)}. "
            + _advice(network, section, spec, found)
        )
    for key, t in tensors.items():
        if not jnp.issubdtype(t.dtype, jnp.floating):
            raise InputError(f"{path}: {key} has dtype {t.dtype}; weights must be floats")


def _advice(network, section, spec, found: parts_lib.Shapes) -> str:
    settings = network.overrides(network.sizes(found), section)
    dim = settings.get("dim", getattr(section, "dim", 0))
    if network.name == "dit" and (own := actions.sizes(found, dim)):
        wrong = {k: v for k, v in own.items() if v != getattr(section.actions, k)}
        if wrong:
            flags = " ".join(f"--config.actions.{k}={v}" for k, v in wrong.items())
            return f"The file's action module is that of {flags}"
    if not settings:
        return f"Is it the right file for --{network.name}?"
    flags = " ".join(f"--config.{network.section}.{k}={v}" for k, v in settings.items())
    if settings.get("kind") == "taehv":
        found = {k: v for k, v in found.items() if k.startswith("decoder.")}
    with contextlib.suppress(InputError):  # no network has these sizes
        other = network.spec(dataclasses.replace(section, **settings))
        other = {k: v for k, v in other.items() if k in spec}
        if layout.torch_shapes(other) == found:
            return f"The file fits with {flags}"
    return f"Its sizes are those of {flags}, but it does not fit them either; is it damaged?"
