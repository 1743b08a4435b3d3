"""Conditioning of the layers: timesteps, positions, text, and inputs of inserted branches."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.ops import rope
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.linear import linear


class Conditioning(struct.PyTreeNode):
    """The conditioning of a layer; all layers share it, except for the text.

    Leading axes are [batch, chunk, (copy,)], of size 1 where all share a value.

    time: compute dtype [.., frame, 6, dim], the rows of `BlockModulation` before a layer's own.
    angle: float32 [.., frame, patch, head_dim / 2], of the rotary embedding.
    text: the layer's keys and values, each [batch, chunk, text_len, head, head_dim].
    inserted: conditioning of inserted branches by name, each of its own structure.
    """

    time: jax.Array
    angle: jax.Array
    text: tuple[jax.Array, jax.Array] | None = None
    inserted: Mapping[str, Any] | None = None


@struct.dataclass
class Modulation:
    """Of x + gate * branch(norm(x) * (1 + scale) + shift): each float32 [.., frame, 1, dim]."""

    shift: jax.Array
    scale: jax.Array
    gate: jax.Array | None = None  # None: the head has no residual

    def affine(self) -> tuple[jax.Array, jax.Array]:
        """1 + scale and shift, as a norm takes them."""
        return 1 + self.scale, self.shift


@struct.dataclass
class BlockModulation:
    """Modulation of the two branches of a block that depend on the timestep."""

    attention: Modulation
    ffn: Modulation

    ROWS = 6  # of the learned table: shift, scale and gate of each


def block_modulation(learned: jax.Array, time: jax.Array) -> BlockModulation:
    """A layer's learned [6, dim] plus time vectors [.., frame, 6, dim]."""
    rows = _modulation_rows(learned, time)
    return BlockModulation(attention=Modulation(*rows[:3]), ffn=Modulation(*rows[3:]))


def head_modulation(learned: jax.Array, e: jax.Array) -> Modulation:
    """The head's learned [2, dim] plus time vectors [.., frame, 1, dim]."""
    return Modulation(*_modulation_rows(learned, e))


def _modulation_rows(learned, time):
    """Each row [.., frame, 1, dim] of the sum, in float32."""
    learned = learned.astype(jnp.float32)
    table = learned.reshape((1,) * (time.ndim - 2) + learned.shape) + time.astype(jnp.float32)
    return [table[..., i : i + 1, :] for i in range(table.shape[-2])]


def time_vectors(
    params: params_lib.Tree, cfg: config_lib.Model, timesteps: jax.Array, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """For timesteps float32 [.., frame]: the head's [.., frame, 1, dim], `Conditioning.time`."""
    wave = sinusoid(timesteps, cfg.freq_dim).astype(dtype)
    p = params["time_embedding"]
    e = linear(p["2"], jax.nn.silu(linear(p["0"], wave)))
    time = linear(params["time_projection"]["1"], jax.nn.silu(e))
    return e[..., None, :], time.reshape(*e.shape[:-1], BlockModulation.ROWS, cfg.dim)


def sinusoid(timesteps: jax.Array, freq_dim: int) -> jax.Array:
    """Cosines, then sines of timesteps (arXiv 1706.03762, section 3.5): float32 [.., freq_dim]."""
    half = freq_dim // 2
    whole = jnp.floor(timesteps)
    frequency = rope.BASE ** (-np.arange(half) / half)
    angle = rope.exact_angle(whole.astype(jnp.int32), frequency, timesteps - whole)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def embed_text(params: params_lib.Tree, text: jax.Array) -> jax.Array:
    """[.., text_len, text_dim] -> [.., text_len, dim]. Padded rows are keys like any other."""
    p = params["text_embedding"]
    return linear(p["2"], gelu(linear(p["0"], text)))
