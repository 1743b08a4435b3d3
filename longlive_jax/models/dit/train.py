"""The transformer in training: all chunks of a video in one forward.

Under sequence parallelism these run inside a fully manual `jax.shard_map`; `chunk` is then this
device's share of the chunks.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models.dit import patches
from longlive_jax.models.dit.block import block, text_keys_values
from longlive_jax.models.dit.conditioning import embed_text
from longlive_jax.models.dit.spec import Network, branches_of, rows
from longlive_jax.models.precision import Precision
from longlive_jax.models.sharding import Sharding
from longlive_jax.ops.teacher_forcing import LSE, OUT
from longlive_jax.quant.operands import AMAX

# The arrays of a block that each of config.REMAT after the first keeps, besides the input.
KEPT = ((OUT, LSE, AMAX), ("output",), ("ffn",), ("qkv",))


def teacher_forcing(
    params: params_lib.Tree, cfg: config_lib.Model, clean: jax.Array, noisy: jax.Array,
    timesteps: jax.Array, positions: jax.Array, *, text: jax.Array,
    clean_timesteps: jax.Array | None = None, past: "PastView | None" = None, **settings,
) -> jax.Array:  # fmt: skip
    """Velocity of every noisy chunk, which sees the clean chunks before it (paper section 3).

    Args:
      clean, noisy: [batch, chunk, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, chunk, frame], of the noisy copy.
      positions, text, settings: as `block_causal`; both copies share them.
      clean_timesteps: float32 [batch, chunk, frame]; None: t = 0, exactly clean.
      past: None: all earlier chunks are visible, with gradient.

    Returns:
      [batch, chunk, frame, h, w, channel] in noisy's dtype.
    """
    if clean_timesteps is None:
        clean_timesteps = jnp.zeros_like(timesteps)
    latents = jnp.stack([clean, noisy], axis=2)
    timesteps = jnp.stack([clean_timesteps, timesteps], axis=2)
    positions = positions[:, :, None]
    x, e, p = _forward(
        params, cfg, latents, timesteps, positions, text, mode="teacher_forcing", past=past,
        **settings,
    )  # fmt: skip
    x = x[:, :, 1] if isinstance(x, jax.Array) else x[1]
    return patches.head(p, cfg, x, e[:, :, 1], patches.grid(noisy))


class PastView(NamedTuple):
    """How noisy chunks see the clean past in teacher forcing.

    visible: int32 [batch, chunk, slot], as `ops.windowed` takes it, of all the video's chunks;
      None: all earlier chunks.
    detached: no gradient flows through clean keys and values, as through a sampler's cache.
    """

    visible: jax.Array | None = None
    detached: bool = False


def _detach_clean(x):
    """Keys or values [batch, chunk, (clean, noisy), ...] with no gradient to the clean ones."""
    return jnp.concatenate([jax.lax.stop_gradient(x[:, :, :1]), x[:, :, 1:]], axis=2)


def block_causal(
    params: params_lib.Tree, cfg: config_lib.Model, latents: jax.Array, timesteps: jax.Array,
    positions: jax.Array, *, text: jax.Array, **settings,
) -> jax.Array:  # fmt: skip
    """Velocity of every chunk; a chunk sees the chunks up to itself, all of them noisy.

    Args:
      latents: [batch, chunk, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, chunk, frame].
      positions: int32 [batch, chunk, frame], temporal indices.
      text: [batch, chunk, text_len, text_dim], one prompt embedding a chunk.
      settings:
        sharding, precision: by default one device, and nothing quantised.
        remat: of `config.REMAT`, what each block keeps for its gradient; by default "qkv".
        key: keys [batch, chunk], if the recipe rounds gradients stochastically.
        inserted: conditioning of inserted branches, by name.
        branches: of a block; by default the config's.

    Returns:
      [batch, chunk, frame, h, w, channel] in latents' dtype.
    """
    x, e, p = _forward(
        params, cfg, latents, timesteps, positions, text, mode="block_causal", **settings
    )
    assert isinstance(x, jax.Array)
    return patches.head(p, cfg, x, e, patches.grid(latents))


def _forward(
    params, cfg, latents, timesteps, positions, text, *, mode, past=None, inserted=None,
    branches=None, sharding=Sharding(), precision=Precision(), remat="qkv", key=None,
):  # fmt: skip
    """Tokens after the last block, of all copies or a pair of (clean, noisy); time vectors of all
    copies; the head's parameters.
    """
    net = Network(cfg, sharding, precision, branches or branches_of(cfg))
    params = net.gather_globals(params)
    x, e, given = patches.embed(params, cfg, latents, timesteps, positions, inserted)
    text = embed_text(params, text)
    names = [name for kept in KEPT[: config_lib.REMAT.index(remat)] for name in kept]

    def attend(name, q, k, v):
        attention = net.branch(name).attention
        assert attention is not None
        if past is not None and past.detached:
            k, v = _detach_clean(k), _detach_clean(v)
        if past is not None and past.visible is not None:
            return attention.windowed(q, k, v, net.sharding, past.visible)
        return getattr(attention, mode)(q, k, v, net.sharding)

    def layer(branches, x, numbered):
        number, p = numbered
        p = net.gather_block(p)
        own = net.layer(given, attend, None if key is None else _fold_in(key, number))
        with_text = given.replace(text=text_keys_values(p, text, own))
        own = dataclasses.replace(own, given=with_text)
        if apart:
            return _clean_then_noisy(net, p, x, own, branches, visible), None
        return block(p, x, own, branches), None

    # Without gradient to the past the clean copy is a forward alone: half the backward, and none
    # of its activations is kept but the blocks' inputs.
    apart = past is not None and past.detached
    apart = apart and all(b.attention is None or b.attention.over_past for b in net.branches)
    visible = None if past is None else past.visible
    if apart:
        x = tuple(x[:, :, i] for i in (0, 1))

    # Parameters are gathered inside, so that a layer's whole weights are not kept either. The scan
    # stops the compiler from undoing this.
    checkpoint = functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(*names),
        prevent_cse=False,
    )
    for start, stop in net.groups():
        each = checkpoint(functools.partial(layer, net.branches_at(start)))
        numbered = jnp.arange(start, stop), rows(params["blocks"], start, stop)
        x, _ = jax.lax.scan(each, x, numbered)
    return x, e, params["head"]


def _clean_then_noisy(net, p, copies, layer, branches, visible):
    """One block of both copies (clean, noisy), with no gradient through the clean one."""
    past = {}

    def attend_clean(name, q, k, v):
        attention = net.branch(name).attention
        out, past[name] = attention.over_past(q, k, v, net.sharding, None, visible)
        return out

    def attend_noisy(name, q, k, v):
        attention = net.branch(name).attention
        return attention.over_past(q, k, v, net.sharding, past[name], visible)[0]

    frozen, clean, given = jax.lax.stop_gradient((p, copies[0], _copy(layer.given, 0)))
    own = dataclasses.replace(layer, given=given, attend=attend_clean)
    clean = block(frozen, clean, own, branches)
    own = dataclasses.replace(layer, given=_copy(layer.given, 1), attend=attend_noisy)
    return jax.lax.stop_gradient(clean), block(p, copies[1], own, branches)


def _copy(given, number):
    """The conditioning of one copy: its own time, and what both share, without a copy axis."""

    def one(x):
        return x[:, :, min(number, x.shape[2] - 1)]

    inserted = None if given.inserted is None else jax.tree.map(one, dict(given.inserted))
    return given.replace(time=one(given.time), angle=one(given.angle), inserted=inserted)


def _fold_in(keys, number):
    """`jax.random.fold_in` of keys [batch, chunk]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return fold(keys, number)
