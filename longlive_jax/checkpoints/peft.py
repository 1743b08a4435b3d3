"""Adapters of `models.lora` under PEFT's names, in files and in the folders of training runs.

    base_model.model.blocks.0.self_attn.q.lora_A.weight  (rank, in)
    base_model.model.blocks.0.self_attn.q.lora_B.weight  (out, rank)

Read are safetensors and torch files in every form of names that `lora` merges, and the original's
{generator_lora, critic_lora, step}. Files that are written say in their header which network the
adapters are of, and their alpha.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import (
    layout,
    lora,
    lora_scale,
    names,
    safetensors,
    sources,
    workdir,
)
from longlive_jax.checkpoints.tensor import ArrayTensor, check_finite
from longlive_jax.errors import InputError
from longlive_jax.params import ParamSpec

PREFIX = "base_model.model."
PART = "lora"  # the part of a run's network whose parameters are adapters
_ALPHA = f"{config_lib.LoRA.NAME}.alpha"  # among a run's settings
_SIDES = {"a": "A", "b": "B"}


def to_peft(adapters: params_lib.Tree) -> dict[str, np.ndarray]:
    """The adapters of `models.lora.specs`, on the host, by PEFT's names; views where possible."""
    host = {path: np.asarray(leaf) for path, leaf in params_lib.flatten(adapters).items()}
    result = {}
    for place in _places(adapters):
        for side, path in place.paths.items():
            array = host[path][place.layer]
            own = array[:, place.part] if side == "a" else array[place.part]
            result[place.key(side)] = own.T
    return result


def from_peft(
    state: Mapping[str, Any], specs: params_lib.Tree, file: str = "the adapters"
) -> params_lib.Tree:
    """The inverse of `to_peft`: float32 arrays on the host, by the paths of `models.lora.specs`.

    Args:
      state: arrays or `Tensor`s by name: all adapters of `specs`, and nothing else.
      file: for messages.

    Raises:
      InputError: an adapter is missing, not expected, not finite, or has another rank or sides of
        another size than `specs` say; naming the key, what it is and what is expected.
    """
    places = {place.module: place for place in _places(specs)}
    found = _found(state, specs, file)
    for module, adapter in found.items():
        if module not in places or adapter.differences or adapter.bias is not None:
            what = "no adapter" if module not in places else "no differences and no biases"
            raise InputError(
                f"{file}: adapts {adapter.module[:120]!r}; the network has {what} there. Its "
                f"adapters are of {', '.join(_targets(specs))}: is it for this network?"
            )
    leaves = params_lib.flatten(specs)
    result = {path: np.empty(spec.shape, np.float32) for path, spec in leaves.items()}
    for module, place in places.items():
        factors = found[module].factors if module in found else {}
        for side, path in place.paths.items():
            key, tensor = place.key(side), factors.get(_SIDES[side])
            shape = leaves[path].shape
            wanted = (shape[3], shape[1]) if side == "a" else (shape[3], shape[2])
            if tensor is None:
                raise InputError(
                    f"{file}: has no {key}, expected {wanted}; the network has {len(places)} "
                    f"adapters, the file {len(found)}"
                )
            if tensor.shape != wanted:
                raise InputError(_misfit(file, key, side, tensor.shape, wanted))
            array = tensor.read().astype(np.float32)
            check_finite(array, f"{file}: {key}")
            if side == "a":
                result[path][place.layer, :, place.part] = array.T
            else:
                result[path][place.layer, place.part] = array.T
    return params_lib.unflatten(result)


def _misfit(file, key, side, shape, wanted):
    rank = 0 if side == "a" else 1
    if len(shape) == 2 and shape[1 - rank] == wanted[1 - rank]:
        return (
            f"{file}: {key} has rank {shape[rank]}, expected {wanted[rank]}; set "
            f"--config.{config_lib.LoRA.NAME}.rank={shape[rank]}"
        )
    return f"{file}: {key} is {shape}, expected {wanted}; is it for this network?"


def save(
    file: str | os.PathLike,
    adapters: params_lib.Tree,
    settings: config_lib.LoRA,
    network: str = names.GENERATOR,
) -> None:
    """Writes adapters as a safetensors file that PEFT and `launch.convert --lora` read.

    Args:
      adapters: of `models.lora.specs`, whole on this process.
      network: `names.GENERATOR` or `names.CRITIC`.
    """
    tensors = to_peft(adapters)
    header = {"format": "pt", "lora_alpha": f"{settings.alpha:g}", names.NETWORK: network}
    entries = {key: (t.shape, t.dtype) for key, t in tensors.items()}
    safetensors.write(file, entries, tensors.items(), header)


def from_file(
    source: str,
    specs: params_lib.Tree,
    settings: config_lib.LoRA,
    network: str = names.GENERATOR,
) -> params_lib.Tree:
    """A network's adapters from a file, a folder or hf://, as `from_peft` gives them.

    Raises:
      InputError: as `from_peft`; nothing is there, it is damaged, another network's, or its alpha
        is another than the settings'.
    """
    file = sources.locate(source, "lora")
    saved = sources.read(file)
    tensors = names.lora_state_dict(saved, file, network)
    adapters = from_peft(tensors, specs, file)
    words = lora_scale.read(saved, file)
    for module, adapter in _found(tensors, specs, file).items():
        if adapter.alpha is None and words.alpha is None and not words.patterns:
            continue  # it says nothing, as the original's
        spellings = (module, names.lora_module(adapter.module))
        own = settings.rank * words.of(spellings, settings.rank, own=adapter.alpha)
        if not math.isclose(own, settings.alpha, rel_tol=1e-6):
            raise InputError(
                f"{file}: the alpha of {module} is {own:g}, {_ALPHA} is {settings.alpha:g}; set "
                f"--config.{_ALPHA}={own:g}"
            )
    return adapters


def _found(state, specs, file) -> dict[str, lora.Adapter]:
    keys = {f"{place.module}.weight": None for place in _places(specs)}
    return lora.adapters(keys, _tensors(state), file)


def of_run(
    source: str, specs: params_lib.Tree, settings: config_lib.LoRA, network: str
) -> params_lib.Tree:
    """The moving average, or else the weights, of a network's adapters in a run's newest state.

    Raises:
      InputError: there are none, or they do not fit `specs` or `settings`.
    """
    state, alpha = _run(source, network)
    if alpha != settings.alpha:
        raise InputError(
            f"{source}: its adapters' alpha is {alpha}, {_ALPHA} is {settings.alpha:g}; set "
            f"--config.{_ALPHA}={alpha}"
        )
    weights = "average" if state.averaged else "latest"
    return from_peft(to_peft(_adapters(state, weights)), specs, source)


def read(
    source: str, weights: str = "average", alpha: float | None = None
) -> tuple[Any, sources.Located]:
    """The content of a LoRA file, as `lora.merge` takes it, and the file's name.

    Args:
      source: a file, a folder, hf://, or the folder of a run that trains adapters.
      weights: of a run, a key of `workdir.WEIGHTS`.
      alpha: outweighs a run's own.

    Raises:
      InputError: nothing is there, it is damaged, or its run trains no adapters.
    """
    if not workdir.is_run(source):
        file = sources.locate(source, "lora")
        return sources.read(file), file
    state, own = _run(source)
    alpha = own if alpha is None else alpha
    if not isinstance(alpha, float | int):
        raise InputError(f"--lora={source}: its run.json has no {_ALPHA}; give --lora_alpha")
    tree = _adapters(state, weights)
    tensors = _tensors(to_peft(tree)) | {"lora_alpha": float(alpha)}
    return tensors, sources.Located(os.path.normpath(source))


def _run(source, network=None):
    """The newest state of a run that trains adapters, and their alpha."""
    state = workdir.State(source, network)
    if PART not in state.trained:
        raise InputError(
            f"--lora={source}: its run trains {', '.join(state.trained)} and no adapters; give "
            "its folder as --checkpoint of launch.export instead"
        )
    return state, workdir.read(source).settings.get(_ALPHA)


def _adapters(state, weights):
    shapes = state.shapes(PART)
    specs = params_lib.unflatten({p: ParamSpec(s, (None,) * len(s)) for p, s in shapes.items()})
    mesh = mesh_lib.make_mesh(config_lib.Mesh(), jax.local_devices()[:1])
    return state.load(PART, specs, mesh, np.float32, {}, weights)


class _Place:
    """One of the original's matrices: its layer, its part of a fused weight, and our arrays."""

    def __init__(self, where: params_lib.Path, layer: int, part: int, key: str):
        self.layer, self.part, self.module = layer, part, key.removesuffix(".weight")
        self.paths = {side: (*where, side) for side in _SIDES}

    def key(self, side: str) -> str:
        return f"{PREFIX}{self.module}.lora_{_SIDES[side]}.weight"


def _places(adapters: params_lib.Tree) -> Iterator[_Place]:
    """Of arrays or specs, layer by layer, in the order of the original's blocks."""
    layers = {p[:-1]: x.shape[0] for p, x in params_lib.flatten(adapters).items()}
    for layer in range(max(layers.values(), default=0)):
        for where in (where for where, number in layers.items() if layer < number):
            weight = layout.Weight((*where, "weight"), layer, (1, 1))
            for part, key in enumerate(weight.keys):
                yield _Place(where, layer, part, key)


def _targets(specs: params_lib.Tree) -> list[str]:
    return list(dict.fromkeys(place.module.split(".", 2)[2] for place in _places(specs)))


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v if hasattr(v, "read") else ArrayTensor(np.asarray(v)) for k, v in state.items()}
