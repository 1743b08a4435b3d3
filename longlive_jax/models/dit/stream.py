"""The transformer in sampling: one chunk a call, which sees the past through a cache.

Under sequence parallelism these run inside a fully manual `jax.shard_map`; `frame` is then this
device's share of the chunk's frames, and the cache holds this device's heads.
"""

import functools
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models.dit import block as block_lib
from longlive_jax.models.dit import patches
from longlive_jax.models.dit.conditioning import embed_text
from longlive_jax.models.dit.spec import Branches, Network, branches_of
from longlive_jax.models.precision import Precision
from longlive_jax.models.sharding import Sharding

_SELF = block_lib.SELF_ATTENTION.name
Text = tuple[tuple[jax.Array, jax.Array], ...]  # keys and values of each layer


class Cache(Protocol):
    """Keys and values of the visible past, a pytree; `sampling.kv_cache.Past` is one."""

    def attend(self, layer, q, k, v) -> jax.Array:
        """Attention of one layer's q over its fresh k, v and the visible past's."""
        ...

    def write(self, layer, slot, k, v, axis: str | None = None) -> "Cache":
        """The cache with one layer's k, v in this slot. axis: mesh axis that shards heads."""
        ...


# The cache of self-attention; by branch name if inserted branches have caches too.
Caches = Cache | Mapping[str, Cache]


def denoise(
    params: params_lib.Tree, cfg: config_lib.Model, latents: jax.Array, timesteps: jax.Array,
    positions: jax.Array, *, text: Text, cache: Caches, inserted: Mapping[str, Any] | None = None,
    branches: Branches | None = None, sharding: Sharding = Sharding(),
    precision: Precision = Precision(),
) -> jax.Array:  # fmt: skip
    """Velocity of one chunk, given the cached past. Reads the cache, writes nothing.

    Args:
      latents: [batch, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, frame], in [0, 1000].
      positions: int32 [batch, frame], temporal indices.
      text: `text_keys_values` of the chunk's prompt.
      cache: the visible past.
      inserted: conditioning of inserted branches, by name.
      branches: of a block; None: the config's.

    Returns:
      [batch, frame, h, w, channel] in latents' dtype: noise minus data (flow matching).
    """
    net = Network(cfg, sharding, precision, branches or branches_of(cfg))
    params = net.gather_globals(params)
    x, e, given = _embed(params, cfg, latents, timesteps, positions, inserted)
    *_, x = _each_layer(net, params, x, given, text, cache)
    return patches.head(params["head"], cfg, x, e, patches.grid(latents))[:, 0]


def hidden_states(
    params: params_lib.Tree, cfg: config_lib.Model, latents: jax.Array, timesteps: jax.Array,
    positions: jax.Array, *, text: Text, cache: Caches, sharding: Sharding, precision: Precision,
) -> jax.Array:  # fmt: skip
    """Tokens after each layer of `denoise`, same args: [layer, batch, 1, frame, patch, dim]."""
    net = Network(cfg, sharding, precision, branches_of(cfg))
    params = net.gather_globals(params)
    x, _, given = _embed(params, cfg, latents, timesteps, positions, None)
    return jnp.stack(list(_each_layer(net, params, x, given, text, cache)))


def commit(
    params: params_lib.Tree, cfg: config_lib.Model, latents: jax.Array, positions: jax.Array, *,
    text: Text, cache: Caches, slot: jax.Array, inserted: Mapping[str, Any] | None = None,
    branches: Branches | None = None, sharding: Sharding = Sharding(),
    precision: Precision = Precision(),
) -> Caches:  # fmt: skip
    """The clean pass (t = 0): stores the chunk's keys and values, and computes nothing else.

    Args: as `denoise`.
      slot: int32 [batch], the slot of the cache to store the chunk in.

    Returns:
      The cache.
    """
    net = Network(cfg, sharding, precision, branches or branches_of(cfg))
    params = net.gather_globals(params)
    zero = jnp.zeros(positions.shape, jnp.float32)
    x, _, given = _embed(params, cfg, latents, zero, positions, inserted)
    caches, last = _by_branch(cache), cfg.num_layers - 1
    # Nothing reads the last layer's output: unless a later branch has a cache too, only the keys
    # and values of self-attention are left to compute there.
    whole = last + any(b.attention and b.name != _SELF for b in net.branches_at(last))
    for i in range(whole):
        p, given = params["blocks"][i], given.replace(text=text[i])
        x, caches = _committing_layer(
            p, x, given, caches, np.int32(i), slot, net=net, branches=net.branches_at(i)
        )
    if whole == last:
        p = net.gather_block(params["blocks"][last])
        k, v = block_lib.keys_values(p, x, net.layer(given))
        k, v = (sharding.to_heads(y[:, 0]) for y in (k, v))
        written = caches[_SELF].write(last, slot, k, v, sharding.seq_axis)
        caches = {**caches, _SELF: written}
    return caches if isinstance(cache, Mapping) else caches[_SELF]


def text_keys_values(
    params: params_lib.Tree, cfg: config_lib.Model, text: jax.Array, *,
    sharding: Sharding = Sharding(), precision: Precision = Precision(),
) -> Text:  # fmt: skip
    """Cross-attention keys and values of every layer: once a prompt, not once a step.

    Args:
      text: [batch, text_len, text_dim], compute dtype.

    Returns:
      For each layer k, v: [batch, 1, text_len, head, head_dim].
    """
    net = Network(cfg, sharding, precision, branches_of(cfg))
    params = net.gather_globals(params)
    text = embed_text(params, text[:, None])
    return tuple(_text_layer(p, text, net) for p in params["blocks"])


def _embed(params, cfg, latents, timesteps, positions, inserted):
    """`patches.embed` of one chunk, with a chunk axis of size 1."""
    latents, timesteps, positions = (x[:, None] for x in (latents, timesteps, positions))
    return patches.embed(params, cfg, latents, timesteps, positions, inserted)


def _each_layer(net, params, x, given, text, cache):
    """Tokens after each layer of the denoising forward."""
    caches = _by_branch(cache)
    for i in range(net.cfg.num_layers):
        p, given = params["blocks"][i], given.replace(text=text[i])
        branches = net.branches_at(i)
        x = _denoising_layer(p, x, given, caches, np.int32(i), net=net, branches=branches)
        yield x


def _by_branch(cache):
    return cache if isinstance(cache, Mapping) else {_SELF: cache}


# ---------------------------------------------------------------------------------------------
# Layers. Layers of equal structure are traced and lowered once.


@functools.partial(jax.jit, static_argnames=("net", "branches"))
def _denoising_layer(p, x, given, caches, i, *, net, branches):
    def past(name, q, k, v):
        return caches[name].attend(i, q, k, v)

    return _layer(net, branches, p, x, given, past)


@functools.partial(jax.jit, static_argnames=("net", "branches"))
def _committing_layer(p, x, given, caches, i, slot, *, net, branches):
    caches = dict(caches)

    def past(name, q, k, v):
        out = caches[name].attend(i, q, k, v)
        # Read before written, or XLA keeps a copy of the cache to read from.
        out, k, v = jax.lax.optimization_barrier((out, k, v))
        caches[name] = caches[name].write(i, slot, k, v, net.sharding.seq_axis)
        return out

    return _layer(net, branches, p, x, given, past), caches


def _layer(net, branches, p, x, given, past):
    def attend(name, q, k, v):
        read = functools.partial(past, name)
        return net.branch(name).attention.streaming(q, k, v, net.sharding, read)

    return block_lib.block(net.gather_block(p), x, net.layer(given, attend), branches)


@functools.partial(jax.jit, static_argnames="net")
def _text_layer(p, text, net):
    p = net.gather_block({"cross_attn": p["cross_attn"]})
    return block_lib.text_keys_values(p, text, net.layer())
