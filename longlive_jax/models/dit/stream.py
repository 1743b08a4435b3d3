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
from longlive_jax.models.dit.spec import Branches, Network, branches_of, names_at_layer
from longlive_jax.models.precision import Precision
from longlive_jax.models.sharding import Sharding

_SELF = block_lib.SELF_ATTENTION.name
# Keys and values of the layers: a pair for each, or one pair stacked as the parameters are.
Text = tuple[tuple[jax.Array, jax.Array], ...] | tuple[jax.Array, jax.Array]


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
      params: of `sampling_spec`; or of `spec`, whose stacked layers are then a loop.
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
    caches = _by_branch(cache)

    def layer(p, text, i, branches, x):
        own = given.replace(text=text)
        return _denoising_layer(p, x, own, caches, i, net=net, branches=branches)

    x = _through_layers(net, params["blocks"], text, layer, x, cfg.num_layers)
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
    if net.branches_at(last)[0].name != _SELF:  # what self-attention reads is not there yet
        whole = cfg.num_layers

    def layer(p, text, i, branches, carry):
        own = given.replace(text=text)
        return _committing_layer(p, carry[0], own, carry[1], i, slot, net=net, branches=branches)

    carry = (x, dict(caches))
    x, caches = _through_layers(net, params["blocks"], text, layer, carry, whole)
    if whole == last:
        p = net.gather_block(_layer_of(params["blocks"], np.int32(last)))
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
      For each layer k, v: [batch, 1, text_len, head, head_dim]; of stacked parameters one pair,
      stacked.
    """
    net = Network(cfg, sharding, precision, branches_of(cfg))
    params = net.gather_globals(params)
    text, blocks = embed_text(params, text[:, None]), params["blocks"]
    if isinstance(blocks, tuple):
        return tuple(_text_layer(p, text, net) for p in blocks)
    cross = {"cross_attn": blocks["cross_attn"]}
    return jax.lax.map(lambda i: _text_layer(_layer_of(cross, i), text, net), _all_layers(net))


def _embed(params, cfg, latents, timesteps, positions, inserted):
    """`patches.embed` of one chunk, with a chunk axis of size 1."""
    latents, timesteps, positions = (x[:, None] for x in (latents, timesteps, positions))
    return patches.embed(params, cfg, latents, timesteps, positions, inserted)


def _through_layers(net, blocks, text, layer, carry, stop):
    """`layer(p, text, i, branches, carry)` of layers 0 to `stop`, one after the other.

    Layers that are apart are unrolled: a GPU's library wants each weight as an array of its own,
    and of a stack every pass copies them. A rollout in training has the stack that it trains: there
    a loop, which copies one layer at a time, keeps a second copy of the weights out of memory.
    """
    if isinstance(blocks, tuple):
        for i in range(stop):
            carry = layer(blocks[i], text[i], np.int32(i), net.branches_at(i), carry)
        return carry
    for first, end in net.groups():
        own = {name: blocks[name] for name in names_at_layer(blocks, first)}
        each = functools.partial(_one_of_stack, layer, own, text, net.branches_at(first))
        carry = jax.lax.fori_loop(first, min(end, stop), each, carry)
    return carry


def _one_of_stack(layer, blocks, text, branches, i, carry):
    return layer(_layer_of(blocks, i), _layer_of(text, i), i, branches, carry)


def _layer_of(stacked, i):
    """Layer i of a stack; what is apart already is indexed."""
    if isinstance(stacked, tuple) and not isinstance(stacked[0], jax.Array):
        return stacked[int(i)]
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, i, keepdims=False), stacked)


def _all_layers(net):
    return jnp.arange(net.cfg.num_layers, dtype=jnp.int32)


def _each_layer(net, params, x, given, text, cache):
    """Tokens after each layer of the denoising forward, whose layers are apart."""
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
