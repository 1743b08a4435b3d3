"""An entry of `launch.bench kernels`: a kernel at one size."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from longlive_jax import config as config_lib
from longlive_jax import formats
from longlive_jax.kernels.attention import HEAD_DIM, TILE
from longlive_jax.kernels.rows import SLICE

# Quantisers are compared at this size.
SQUARE = (8192, 8192)


def differing_bytes(result, expected) -> float:
    """The share of bytes that differ, over all arrays."""
    pairs = zip(map(_bytes, jax.tree.leaves(result)), map(_bytes, jax.tree.leaves(expected)))
    counts = [(np.count_nonzero(a != b), a.size) for a, b in pairs]
    return sum(n for n, _ in counts) / sum(n for _, n in counts)


def _bytes(x):
    return np.atleast_1d(np.asarray(x)).view(np.uint8)


def relative_error(result, expected) -> float:
    a, b = (np.asarray(x, np.float32) for x in (result, expected))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A kernel at one size. All calls are compiled with `arguments` as their arguments.

    name: the kernel and the size.
    call: the operation as users call it.
    baseline: the same by XLA, which is timed.
    oracle: the right result of `call`; None: `baseline`.
    error, limit: (result, expected) -> a number, and the largest right one.
    details: more calls to time, by name: parts of `call`, other tilings.
    bytes, flops: the least that `call` moves between chip and memory, and multiplies and adds.
    fp8: whether the flops are of FP8 products, of which a chip does twice as many.
    """

    name: str
    arguments: tuple
    call: Callable
    baseline: Callable
    bytes: int
    flops: int = 0
    fp8: bool = False
    oracle: Callable | None = None
    error: Callable = differing_bytes
    limit: float = 0.0
    details: dict[str, Callable] = dataclasses.field(default_factory=dict)


def on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def by_interpreter(kernel: Callable, **how) -> Callable:
    """A kernel with these options, interpreted where there is no GPU."""
    interpret = plgpu.InterpretGPUParams() if on_cpu() else None
    return functools.partial(kernel, interpret=interpret, **how)


def tokens(cfg: config_lib.Config) -> int:
    """Tokens of a chunk."""
    return cfg.model.chunk_frames * _patches(cfg)


def _patches(cfg):
    return (cfg.video.height // 32) * (cfg.video.width // 32)


def chunk(cfg: config_lib.Config) -> tuple[int, int]:
    """Frames of a chunk, and patches of each; few on a CPU."""
    return (2, 3) if on_cpu() else (cfg.model.chunk_frames, _patches(cfg))


def width(columns: int, slices: int = 1) -> int:
    """Columns of rows; on a CPU `slices` slices of kernels on rows."""
    return slices * SLICE if on_cpu() else columns


def product(*shape: int) -> formats.PendingMatmul:
    keys = jax.random.split(jax.random.key(0), 4)
    n = shape[-1:]
    return formats.PendingMatmul(
        sums=128 * jax.random.normal(keys[0], shape, jnp.bfloat16),
        row=jnp.exp(jax.random.normal(keys[1], (*shape[:-1], 1)) / 4) / 128,
        column=jnp.exp(jax.random.normal(keys[2], n) / 4),
        bias=jax.random.normal(keys[3], n, jnp.bfloat16),
    )


def window(cfg: config_lib.Config):
    """A chunk's q, k, v [1, token, head, head_dim], and the cache's slots."""
    if on_cpu():
        length, slots, heads = TILE, 1, 1
    else:
        length, heads = tokens(cfg), cfg.model.num_heads
        slots = cfg.sample.window(cfg.model).slots
    shape = (1, length, heads, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    return *(jax.random.normal(key, shape, jnp.bfloat16) for key in keys), slots


def nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))
