"""Bytes of the arrays that a training step is given, on one device and on disk."""

import math

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.scaling import traffic
from longlive_jax.training import batch as batch_lib

_FLOAT = 4  # bytes of what is kept of parameters


def arguments(cfg: config_lib.Config) -> dict[str, int]:
    """Bytes of a step's arguments on one device, by what they are; a few counters left out.

    "parameters", "optimiser", "moving average", "error recycling", "batch". Without padding: a TPU
    rounds the last axes of arrays up to whole tiles.
    """
    one = _parameters(cfg, math.prod(getattr(cfg.mesh, a) for a in mesh_lib.RULES["embed"]))
    return {
        "parameters": one,
        "optimiser": (copies(cfg) - 2) * one,
        "moving average": one,
        "error recycling": _rings(cfg) // cfg.mesh.size,
        "batch": _batch(cfg),
    }


def copies(cfg: config_lib.Config) -> int:
    """Arrays that are kept of each parameter: itself, its moving average, and Adam's moments."""
    return 3 if cfg.train.beta1 == 0 else 4


def gradient(cfg: config_lib.Config, shards: int) -> int:
    """Bytes of all gradients on one of so many devices that share them."""
    return _parameters(cfg, shards)


def saved(cfg: config_lib.Config) -> int:
    """Bytes of a state on disk: what is kept of a step's arguments, once for all devices."""
    return copies(cfg) * _parameters(cfg, 1) + _rings(cfg)


def restored(cfg: config_lib.Config, devices: int) -> int:
    """Bytes of a state that a host of so many devices reads: what lies on them, each array once.

    Hosts hold devices next to each other in the mesh, so parameters are whole on a host of
    fsdp x seq devices.
    """
    shards = cfg.mesh.fsdp * cfg.mesh.seq
    parameters = copies(cfg) * _parameters(cfg, max(1, shards // devices))
    return parameters + _rings(cfg) * devices // cfg.mesh.size


def sample(cfg: config_lib.Config) -> tuple[int, int]:
    """Bytes of a training sample as `launch.encode_dataset` writes it: least and most.

    Latents in the compute dtype, and embeddings of its prompts: one, or one a chunk.
    """
    size, m = cfg.compute_dtype.itemsize, cfg.model
    chunks = batch_lib.chunks(cfg)
    latents = chunks * math.prod(batch_lib.chunk_shape(cfg)) * size
    prompt = m.text_len * m.text_dim * size
    return latents + prompt, latents + chunks * prompt


def _parameters(cfg, shards) -> int:
    return sum(
        _FLOAT * layers * math.prod(spec.shape) // (shards if "embed" in spec.axes else 1)
        for _, layers, spec in traffic.leaves(cfg)
    )


def _rings(cfg) -> int:
    """Of all devices; those whose number does not divide a chunk hold more (`error_recycling`)."""
    recycling = cfg.train.error_recycling
    if not recycling.enabled:
        return 0
    cells = recycling.buckets * (batch_lib.chunks(cfg) if recycling.positions else 1)
    return 2 * cells * recycling.slots * math.prod(batch_lib.chunk_shape(cfg)) * 2  # bfloat16


def _batch(cfg) -> int:
    """Latents, embeddings of each chunk's prompt and the mask of one device's chunks."""
    train, mesh, m = cfg.train, cfg.mesh, cfg.model
    videos = train.accumulation * train.batch_size // (mesh.data * mesh.fsdp)
    chunks = batch_lib.chunks(cfg) // mesh.seq
    numbers = math.prod(batch_lib.chunk_shape(cfg)) + m.text_len * m.text_dim
    return videos * chunks * (numbers * cfg.compute_dtype.itemsize + 1)
