"""The causal video transformer of LongLive-2.0 (Wan2.2-TI2V-5B, chunk by chunk), as pure functions.

Hidden states are [batch, chunk, (copy,) frame, patch, dim]: a chunk's tokens, with its frames kept
apart so that what varies by frame (timestep, temporal position) broadcasts. Four uses:

  teacher_forcing   training: a clean and a noisy copy of every chunk side by side (copy axis)
  block_causal      training without clean context
  denoise           sampling: velocity of one chunk; reads the KV cache
  commit            sampling: the clean pass; writes the chunk's keys and values into the cache

Sampling functions run inside a fully manual `jax.shard_map` when `Parallel.seq` names a mesh axis;
then `frame` (sampling) or `chunk` (training) is this device's share, and heads of the cache too.
Dtypes: activations in the compute dtype, norms, softmax, rotations and gates in float32.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models.parallel import Parallel
from longlive_jax.ops import residual, rope, ulysses
from longlive_jax.ops import teacher_forcing as tf
from longlive_jax.ops.attention import attention
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.linear import linear
from longlive_jax.ops.norm import layer_norm, rms_norm, rms_norm_of
from longlive_jax.ops.rotated import norm_rotate
from longlive_jax.params import ParamSpec
from longlive_jax.quant import weights as quantized_weights
from longlive_jax.quant.operands import AMAX
from longlive_jax.recipes import Recipe

PATCH = config_lib.PATCH
TIME_SLOTS = 6  # shift, scale, gate of self-attention, then of the FFN
# What each of config.REMAT after the first keeps of a training block, besides its input.
KEPT = ((tf.OUT, tf.LSE, AMAX), ("output",), ("ffn",), ("qkv",))


def spec(cfg: config_lib.Model) -> params_lib.Tree:
    """Parameter specs; paths follow the original's, with q, k, v (self) and k, v (cross) fused."""
    d = cfg.dim
    patch = cfg.in_dim * PATCH * PATCH

    def dense(inputs, outputs, axes, init=None):
        init = init or params_lib.xavier(inputs, outputs)
        return {
            "weight": ParamSpec((inputs, outputs), axes, init),
            "bias": ParamSpec((outputs,), (None,)),
        }

    small = params_lib.normal(0.02)
    modulation = params_lib.normal(d**-0.5)
    norm = {"weight": ParamSpec((d,), (None,), params_lib.ones)}
    square = functools.partial(dense, d, d, ("embed", None))
    fused = params_lib.xavier(d, d)  # each of the fused matrices is square
    block = {
        "modulation": ParamSpec((TIME_SLOTS, d), (None, None), modulation),
        "self_attn": {
            "qkv": dense(d, 3 * d, ("embed", None), fused),
            "o": square(),
            "norm_q": norm,
            "norm_k": norm,
        },
        "norm3": norm | {"bias": ParamSpec((d,), (None,))},
        "cross_attn": {
            "q": square(),
            "kv": dense(d, 2 * d, ("embed", None), fused),
            "o": square(),
            "norm_q": norm,
            "norm_k": norm,
        },
        "ffn": {
            "0": dense(d, cfg.ffn_dim, ("embed", None)),
            "2": dense(cfg.ffn_dim, d, (None, "embed")),
        },
    }
    return {
        "patch_embedding": dense(patch, d, (None, None)),
        "text_embedding": {"0": dense(cfg.text_dim, d, (None, "embed"), small), "2": square(small)},
        "time_embedding": {"0": dense(cfg.freq_dim, d, (None, "embed"), small), "2": square(small)},
        "time_projection": {"1": dense(d, TIME_SLOTS * d, ("embed", None))},
        "blocks": params_lib.stack(block, cfg.num_layers),
        "head": {
            "modulation": ParamSpec((2, d), (None, None), modulation),
            "head": dense(d, cfg.out_dim * PATCH * PATCH, (None, None), params_lib.zeros),
        },
    }


def sampling_spec(
    cfg: config_lib.Model, recipe: Recipe | None, dtype: jnp.dtype | None
) -> params_lib.Tree:
    """`spec` of what `denoise` and `commit` take: layers apart, with a recipe quantised."""
    specs = quantized_weights.quantize_specs(spec(cfg), recipe, dtype)
    return specs | {"blocks": (params_lib.layer_of(specs["blocks"]),) * cfg.num_layers}


def layers(params: params_lib.Tree) -> params_lib.Tree:
    """Parameters of `spec`, quantised or not, with a tuple of layers for the stacked "blocks".

    A GPU's library multiplies by arrays that lie alone: of a stack, each pass would copy them all.
    """
    number = len(jax.tree.leaves(params["blocks"])[0])

    def layer(i):
        return jax.tree.map(lambda w: jax.lax.index_in_dim(w, i, keepdims=False), params["blocks"])

    return params | {"blocks": tuple(layer(i) for i in range(number))}


# ---------------------------------------------------------------------------------------------
# The four uses.


def denoise(params, cfg, latents, timesteps, frames, text, cache, parallel=Parallel()):
    """Velocity of one chunk, given the cached past. Reads the cache, writes nothing.

    Args:
      latents: [batch, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, frame], in [0, 1000].
      frames: int32 [batch, frame], temporal positions.
      text: `text_keys_values` of the chunk's prompt.
      cache: a sampling.kv_cache.KVCache; `attend(layer, q, k, v)` is attention over the chunk's
        keys and values and the visible past's.

    Returns:
      [batch, frame, h, w, channel] in latents' dtype: noise minus data (flow matching).
    """
    params = _gather_globals(params, cfg, parallel)
    states, e = _denoising(params, cfg, latents, timesteps, frames, text, cache, parallel)
    return _head(params["head"], cfg, states[-1], e, latents.shape[2:4])[:, 0]


def hidden_states(params, cfg, latents, timesteps, frames, text, cache, parallel=Parallel()):
    """What each layer of `denoise` leaves: [layer, batch, 1, frame, patch, dim]. Args: the same."""
    params = _gather_globals(params, cfg, parallel)
    states, _ = _denoising(params, cfg, latents, timesteps, frames, text, cache, parallel)
    return jnp.stack(states)


def _denoising(params, cfg, latents, timesteps, frames, text, cache, parallel):
    """Tokens after each layer, and time vectors."""
    x, e, modulation, angle = _embed(
        params, cfg, latents[:, None], timesteps[:, None], frames[:, None]
    )
    states = []
    for i in range(cfg.num_layers):
        x = _denoising_layer(
            params["blocks"][i], x, modulation, angle, text[i], cache, np.int32(i), cfg, parallel
        )
        states.append(x)
    return states, e


def commit(params, cfg, latents, frames, text, cache, slot, parallel=Parallel()):
    """The clean pass (t = 0): stores the chunk's keys and values, and computes nothing else.

    Args: as `denoise`; `cache.write(layer, slot, k, v)` returns the cache with that layer's fresh
      k, v [batch, token, head, head_dim] stored.

    Returns:
      The cache.
    """
    params = _gather_globals(params, cfg, parallel)
    zero = jnp.zeros(frames.shape, jnp.float32)
    x, _, modulation, angle = _embed(params, cfg, latents[:, None], zero[:, None], frames[:, None])

    last = cfg.num_layers - 1
    for i in range(last):
        x, cache = _committing_layer(
            params["blocks"][i], x, modulation, angle, text[i], cache, np.int32(i), slot, cfg,
            parallel,
        )  # fmt: skip
    # Nothing reads the last layer's output: its keys and values are all that is left to compute.
    block = _gather_block(params["blocks"][last], cfg, parallel)
    _, k, v = _self_qkv(block, cfg, x, _modulation(block, modulation), angle, parallel)
    k, v = (parallel.to_heads(_tokens(y)[:, 0]) for y in (k, v))
    return cache.write(last, slot, k, v, parallel.seq_axis)


def block_causal(
    params, cfg, latents, timesteps, frames, context, parallel=Parallel(), remat="qkv", key=None
):
    """Velocity of every chunk; a chunk sees the chunks up to itself, all of them noisy.

    Args:
      latents: [batch, chunk, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, chunk, frame].
      frames: int32 [batch, chunk, frame], temporal positions.
      context: [batch, chunk, text_len, text_dim], one prompt embedding a chunk.
      remat: of `config.REMAT`, what each block keeps for its gradient.
      key: keys [batch, chunk], if parallel.recipe rounds gradients stochastically.

    Returns:
      [batch, chunk, frame, h, w, channel] in latents' dtype.
    """
    params = _gather_globals(params, cfg, parallel)
    x, e, modulation, angle = _embed(params, cfg, latents, timesteps, frames)
    attend = _training_attend(tf.block_causal, parallel)
    x = _train_blocks(params, cfg, x, modulation, angle, attend, context, parallel, remat, key)
    return _head(params["head"], cfg, x, e, latents.shape[3:5])


def teacher_forcing(
    params, cfg, clean, noisy, timesteps, frames, context, clean_timesteps=None,
    parallel=Parallel(), remat="qkv", key=None,
):  # fmt: skip
    """Velocity of every noisy chunk, which sees the clean chunks before it (paper section 3).

    Args:
      clean, noisy: [batch, chunk, frame, h, w, channel], compute dtype.
      timesteps: float32 [batch, chunk, frame], of the noisy copy.
      frames, context, remat, key: as `block_causal`; both copies share them.
      clean_timesteps: float32 [batch, chunk, frame]; None: t = 0, exactly clean.

    Returns:
      [batch, chunk, frame, h, w, channel] in noisy's dtype.
    """
    params = _gather_globals(params, cfg, parallel)
    if clean_timesteps is None:
        clean_timesteps = jnp.zeros_like(timesteps)
    latents = jnp.stack([clean, noisy], axis=2)
    timesteps = jnp.stack([clean_timesteps, timesteps], axis=2)
    x, e, modulation, angle = _embed(params, cfg, latents, timesteps, frames[:, :, None])
    attend = _training_attend(tf.teacher_forcing, parallel)
    x = _train_blocks(params, cfg, x, modulation, angle, attend, context, parallel, remat, key)
    return _head(params["head"], cfg, x[:, :, 1], e[:, :, 1], noisy.shape[3:5])


# ---------------------------------------------------------------------------------------------
# Layers of the sampler: traced and lowered once, called for each.


@functools.partial(jax.jit, static_argnames=("cfg", "parallel"))
def _denoising_layer(block, x, modulation, angle, text, cache, i, cfg, parallel):
    attend = _streaming_attend(functools.partial(cache.attend, i), parallel)
    block = _gather_block(block, cfg, parallel)
    return _block(block, cfg, x, modulation, angle, attend, text, parallel)


@functools.partial(jax.jit, static_argnames=("cfg", "parallel"))
def _committing_layer(block, x, modulation, angle, text, cache, i, slot, cfg, parallel):
    def attend(q, k, v):
        nonlocal cache
        out = cache.attend(i, q, k, v)
        # Read before written, or XLA keeps a copy of the cache to read from.
        out, k, v = jax.lax.optimization_barrier((out, k, v))
        cache = cache.write(i, slot, k, v, parallel.seq_axis)
        return out

    attend = _streaming_attend(attend, parallel)
    block = _gather_block(block, cfg, parallel)
    return _block(block, cfg, x, modulation, angle, attend, text, parallel), cache


# ---------------------------------------------------------------------------------------------
# Text.


def embed_text(params, context):
    """[.., text_len, text_dim] -> [.., text_len, dim]. Padded rows are keys like any other."""
    p = params["text_embedding"]
    return linear(p["2"], gelu(linear(p["0"], context)))


def text_keys_values(params, cfg, context, parallel=Parallel()):
    """Cross-attention keys and values of every layer: once a prompt, not once a step.

    Args:
      context: [batch, text_len, text_dim], compute dtype.

    Returns:
      For each layer k, v: [batch, 1, text_len, head, head_dim].
    """
    params = _gather_globals(params, cfg, parallel)
    text = embed_text(params, context[:, None])
    return tuple(_text_layer(block, text, cfg, parallel) for block in params["blocks"])


@functools.partial(jax.jit, static_argnames=("cfg", "parallel"))
def _text_layer(block, text, cfg, parallel):
    block = _gather_block({"cross_attn": block["cross_attn"]}, cfg, parallel)
    return _text_kv(block, cfg, text, parallel)


def _text_kv(p, cfg, text, parallel, key=None):
    k, v = jnp.split(parallel.linear(p, "cross_attn.kv", text, key), 2, axis=-1)
    return _heads(rms_norm(k, p["cross_attn"]["norm_k"]["weight"]), cfg), _heads(v, cfg)


# ---------------------------------------------------------------------------------------------
# Pieces.


def _embed(params, cfg, latents, timesteps, frames):
    """Patch tokens, time vectors, per-frame modulation, rotary angles.

    Leading axes are [batch, chunk, (copy,)]; returns x [.., frame, patch, dim], e [.., frame, 1,
    dim], modulation [.., frame, 6, dim] and angles [.., frame, patch, head_dim / 2].
    """
    x = linear(params["patch_embedding"], _patchify(latents))
    wave = _sinusoid(timesteps, cfg.freq_dim).astype(x.dtype)
    p = params["time_embedding"]
    e = linear(p["2"], jax.nn.silu(linear(p["0"], wave)))
    e6 = linear(params["time_projection"]["1"], jax.nn.silu(e))
    modulation = e6.reshape(*e.shape[:-1], TIME_SLOTS, cfg.dim)
    height, width = latents.shape[-3] // PATCH, latents.shape[-2] // PATCH
    angle = rope.angles(frames, height, width, cfg.head_dim)
    return x, e[..., None, :], modulation, angle


def _patchify(latents):
    """[.., frame, h, w, c] -> [.., frame, patch, c * 4], ordered (channel, row, column)."""
    *lead, h, w, c = latents.shape
    x = latents.reshape(*lead, h // PATCH, PATCH, w // PATCH, PATCH, c)
    n = len(lead)
    x = x.transpose(*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return x.reshape(*lead, (h // PATCH) * (w // PATCH), c * PATCH * PATCH)


def _sinusoid(timesteps, freq_dim):
    """Cosines, then sines of timesteps (arXiv 1706.03762, section 3.5): float32 [.., freq_dim]."""
    half = freq_dim // 2
    whole = jnp.floor(timesteps)
    frequency = rope.BASE ** (-np.arange(half) / half)
    angle = rope.exact_angle(whole.astype(jnp.int32), frequency, timesteps - whole)
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def _block(p, cfg, x, modulation, angle, attend, text_kv, parallel, key=None):
    """One transformer block. x: [batch, chunk, (copy,) frame, patch, dim]."""
    m = _modulation(p, modulation)
    product = functools.partial(parallel.product, p, key=key)
    with jax.named_scope("self_attention"):
        q, k, v = _self_qkv(p, cfg, x, m, angle, parallel, key)
        y = attend(*(_tokens(z) for z in (q, k, v)))
        y = checkpoint_name(product("self_attn.o", y.reshape(x.shape)), "output")
    with jax.named_scope("cross_attention"):
        affine = (p["norm3"][n].reshape((1,) * (x.ndim - 1) + (-1,)) for n in ("weight", "bias"))
        x, h = parallel.add_layer_norm("cross_attn.q", x, y, m[..., 2:3, :], *affine)
        y = _cross_attention(p, cfg, h, text_kv, parallel, key)
        y = checkpoint_name(product("cross_attn.o", y.reshape(x.shape)), "output")
    with jax.named_scope("ffn"):
        affine = 1 + m[..., 4:5, :], m[..., 3:4, :]
        x, h = parallel.add_layer_norm("ffn.0", x, y, None, *affine)
        h = parallel.gelu("ffn.2", checkpoint_name(product("ffn.0", h), "ffn"))
        y = checkpoint_name(parallel.linear(p, "ffn.2", h, key), "output")
        return parallel.made_once(residual.add(x, y, m[..., 5:6, :]))


def _modulation(p, time):
    """Learned offsets [slot, dim] plus time vectors [.., slot or 1, dim], in float32."""
    learned = p["modulation"].astype(jnp.float32)
    return learned.reshape((1,) * (time.ndim - 2) + learned.shape) + time.astype(jnp.float32)


def _self_qkv(p, cfg, x, m, angle, parallel, key=None):
    """Rotated q and k, and v, each [.., frame, patch, head, head_dim]."""
    h = parallel.layer_norm("self_attn.qkv", x, 1 + m[..., 1:2, :], m[..., 0:1, :])
    qkv = checkpoint_name(parallel.product(p, "self_attn.qkv", h, key), "qkv")
    p = p["self_attn"]
    return norm_rotate(qkv, p["norm_q"]["weight"], p["norm_k"]["weight"], angle)


def _cross_attention(p, cfg, h, text_kv, parallel, key=None):
    """A chunk's tokens see its own prompt; k, v [batch, chunk, text_len, head, head_dim]."""
    q = parallel.product(p, "cross_attn.q", h, key)
    q = _heads(rms_norm_of(q, p["cross_attn"]["norm_q"]["weight"]), cfg)
    rows = q.shape[0] * q.shape[1]
    k, v = (y.reshape(rows, *y.shape[2:]) for y in text_kv)
    return attention(q.reshape(rows, -1, *q.shape[-2:]), k, v)


def _head(p, cfg, x, e, grid):
    """[batch, chunk, frame, patch, dim] -> velocity [batch, chunk, frame, h, w, channel]."""
    m = _modulation(p, e)
    y = linear(p["head"], layer_norm(x, 1 + m[..., 1:2, :], m[..., 0:1, :]))
    lead, (h, w) = y.shape[:-2], grid
    y = y.reshape(*lead, h // PATCH, w // PATCH, PATCH, PATCH, cfg.out_dim)
    n = len(lead)
    y = y.transpose(*range(n), n, n + 2, n + 1, n + 3, n + 4)
    return y.reshape(*lead, h, w, cfg.out_dim)


def _heads(x, cfg):
    return x.reshape(*x.shape[:-1], -1, cfg.head_dim)


def _tokens(x):
    """[.., frame, patch, head, head_dim] -> [.., token, head, head_dim]."""
    return x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:])


# ---------------------------------------------------------------------------------------------
# Attention under sequence parallelism, and parameters of a layer.


def _streaming_attend(attend: Callable, parallel: Parallel) -> Callable:
    """`attend` on all tokens [batch, token, head / n, head_dim], from frames sharded over seq."""

    def around(q, k, v):  # [batch, 1, token / n, head, head_dim]
        sent = (parallel.to_heads(y[:, 0]) for y in (q, k, v))
        return parallel.to_tokens(attend(*sent))[:, None]

    return around


def _training_attend(attend: Callable, parallel: Parallel) -> Callable:
    """`attend` on all chunks of some heads, from chunks sharded over seq."""

    def around(q, k, v):  # [batch, chunk / n, (copy,) token, head, head_dim]
        q, k, v = (ulysses.to_heads(y, parallel.seq_axis, token_axis=1) for y in (q, k, v))
        return ulysses.to_tokens(attend(q, k, v), parallel.seq_axis, token_axis=1)

    return around


def _train_blocks(params, cfg, x, modulation, angle, attend, context, parallel, remat, key=None):
    text = embed_text(params, context)
    specs = spec(cfg)["blocks"]
    names = [name for kept in KEPT[: config_lib.REMAT.index(remat)] for name in kept]

    # Gathered inside: a layer's whole weights are not kept either. A scan is barrier enough against
    # the compiler's undoing it.
    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(*names),
        prevent_cse=False,
    )
    def layer(x, numbered):
        number, block = numbered
        block = parallel.gather(block, specs)
        own = None if key is None else _fold_in(key, number)
        text_kv = _text_kv(block, cfg, text, parallel, own)
        return _block(block, cfg, x, modulation, angle, attend, text_kv, parallel, own), None

    return jax.lax.scan(layer, x, (jnp.arange(cfg.num_layers), params["blocks"]))[0]


def _fold_in(keys, number):
    """`jax.random.fold_in` of keys [batch, chunk]."""
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
    return fold(keys, number)


def _gather_block(block, cfg, parallel):
    """A layer's parameters, or some of them, whole on this device."""
    specs = sampling_spec(cfg, parallel.recipe, parallel.dtype)["blocks"][0]
    return parallel.gather(block, {name: specs[name] for name in block})


def _gather_globals(params, cfg, parallel):
    """Everything outside the blocks, whole on this device."""
    rest = {k: v for k, v in params.items() if k != "blocks"}
    specs = {k: v for k, v in spec(cfg).items() if k != "blocks"}
    return parallel.gather(rest, specs) | {"blocks": params["blocks"]}
