"""A transformer block: branches in order, each a line of the paper.

    x = x + gate * self_attention(modulate(norm(x)))
    x = x + cross_attention(norm(x), text)
    x = branch(x)                                       for each inserted one, say, actions
    x = x + gate * ffn(modulate(norm(x)))

Fusion happens below these lines: hidden states carry a pending sum, which the next norm adds
(`Hidden`, `Layer.norm`), and products wait for their scales and bias (`PendingMatmul`).
Hidden states are [batch, chunk, (copy,) frame, patch, dim]; norms, softmax, rotations and gates are
float32, the rest is in the compute dtype.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax import params as params_lib
from longlive_jax.models.branch import Attention, Branch, Hidden, Layer
from longlive_jax.models.dit.conditioning import BlockModulation, block_modulation
from longlive_jax.ops import teacher_forcing, windowed
from longlive_jax.ops.attention import attention
from longlive_jax.ops.norm import rms_norm, rms_norm_of
from longlive_jax.ops.rotated import norm_rotate
from longlive_jax.params import ParamSpec


def block(p: params_lib.Tree, x: jax.Array, layer: Layer, branches: tuple[Branch, ...]):
    """One block. x and the result: [batch, chunk, (copy,) frame, patch, dim]."""
    layer, hidden = modulated(p, layer), Hidden(x)
    for branch in branches:
        with jax.named_scope(branch.name):
            hidden = branch.apply(p, hidden, layer)
    return layer.precision.materialize(hidden.array())


def modulated(p: params_lib.Tree, layer: Layer) -> Layer:
    """`layer` with the modulation of the block's parameters."""
    assert layer.given is not None
    modulation = block_modulation(p["modulation"], layer.given.time)
    return dataclasses.replace(layer, modulation=modulation)


def _self_attention(p, x, layer):
    m = layer.modulation.attention
    x, h = layer.norm("self_attn.qkv", x, *m.affine())
    q, k, v = (_tokens(y) for y in _qkv(p, h, layer))
    y = layer.attend("self_attention", q, k, v).reshape(x.shape)
    return x.add(checkpoint_name(layer.product(p, "self_attn.o", y), "output"), m.gate)


def _cross_attention(p, x, layer):
    """A chunk's tokens see its own prompt."""
    affine = (p["norm3"][n].reshape((1,) * (len(x.shape) - 1) + (-1,)) for n in ("weight", "bias"))
    x, h = layer.norm("cross_attn.q", x, *affine)
    q = layer.product(p, "cross_attn.q", h)
    q = _heads(rms_norm_of(q, p["cross_attn"]["norm_q"]["weight"]), layer.cfg)
    rows = q.shape[0] * q.shape[1]
    k, v = (y.reshape(rows, *y.shape[2:]) for y in layer.given.text)
    y = attention(q.reshape(rows, -1, *q.shape[-2:]), k, v).reshape(x.shape)
    return x.add(checkpoint_name(layer.product(p, "cross_attn.o", y), "output"))


def _ffn(p, x, layer):
    m = layer.modulation.ffn
    x, h = layer.norm("ffn.0", x, *m.affine())
    h = checkpoint_name(layer.product(p, "ffn.0", h), "ffn")
    h = layer.precision.gelu("ffn.2", h)
    return x.add(checkpoint_name(layer.linear(p, "ffn.2", h), "output"), m.gate)


def keys_values(p: params_lib.Tree, x: jax.Array, layer: Layer) -> tuple[jax.Array, jax.Array]:
    """Only the block's rotated keys and its values, each [.., token, head, head_dim]."""
    layer = modulated(p, layer)
    assert layer.modulation is not None
    _, h = layer.norm("self_attn.qkv", Hidden(x), *layer.modulation.attention.affine())
    _, k, v = _qkv(p, h, layer)
    return _tokens(k), _tokens(v)


def text_keys_values(
    p: params_lib.Tree, text: jax.Array, layer: Layer
) -> tuple[jax.Array, jax.Array]:
    """Keys, values [.., text_len, head, head_dim] of embedded text [.., text_len, dim]."""
    k, v = jnp.split(layer.linear(p, "cross_attn.kv", text), 2, axis=-1)
    k = _heads(rms_norm(k, p["cross_attn"]["norm_k"]["weight"]), layer.cfg)
    return k, _heads(v, layer.cfg)


def _qkv(p, h, layer):
    """Rotated q and k, and v, each [.., frame, patch, head, head_dim]."""
    qkv = checkpoint_name(layer.product(p, "self_attn.qkv", h), "qkv")
    p = p["self_attn"]
    return norm_rotate(qkv, p["norm_q"]["weight"], p["norm_k"]["weight"], layer.given.angle)


def _heads(x, cfg):
    return x.reshape(*x.shape[:-1], -1, cfg.head_dim)


def _tokens(x):
    """[.., frame, patch, head, head_dim] -> [.., token, head, head_dim]."""
    return x.reshape(*x.shape[:-4], x.shape[-4] * x.shape[-3], *x.shape[-2:])


# ---------------------------------------------------------------------------------------------
# Attention of all chunks, or all frames, of some heads.


def over_chunks(attend):
    """`attend` on all chunks of this device's heads, from chunks sharded over seq."""

    # q, k, v: [batch, chunk / n, (copy,) token, head, head_dim]; `more` is whole on each device.
    def around(q, k, v, sharding, *more):
        return sharding.to_tokens(attend(*(sharding.to_heads(y) for y in (q, k, v)), *more))

    return around


def _over_past(q, k, v, sharding, past, visible):
    """One copy's chunks, sharded over seq, over the clean copy's."""
    q, k, v = (sharding.to_heads(y) for y in (q, k, v))
    out = windowed.over_past(q, k, v, past or (k, v), visible)
    return sharding.to_tokens(out), (k, v)


def _over_frames(q, k, v, sharding, past):
    """`past` on all tokens [batch, token, head / n, head_dim], from frames sharded over seq."""
    sent = (sharding.to_heads(y[:, 0]) for y in (q, k, v))
    return sharding.to_tokens(past(*sent))[:, None]


# ---------------------------------------------------------------------------------------------
# Parameters. Paths follow the original's, with q, k, v (self) and k, v (cross) fused.


def _self_attention_spec(cfg):
    shape, init = (BlockModulation.ROWS, cfg.dim), params_lib.normal(cfg.dim**-0.5)
    return {
        "modulation": ParamSpec(shape, (None, None), init),
        "self_attn": {"qkv": _square(cfg, 3), "o": _square(cfg)} | _norms(cfg, "norm_q", "norm_k"),
    }


def _cross_attention_spec(cfg):
    products = {"q": _square(cfg), "kv": _square(cfg, 2), "o": _square(cfg)}
    norm = _norms(cfg, "norm3")["norm3"]
    return {
        "norm3": norm | {"bias": ParamSpec((cfg.dim,), (None,))},
        "cross_attn": products | _norms(cfg, "norm_q", "norm_k"),
    }


def _ffn_spec(cfg):
    wide = params_lib.linear(cfg.dim, cfg.ffn_dim, ("embed", None))
    return {"ffn": {"0": wide, "2": params_lib.linear(cfg.ffn_dim, cfg.dim, (None, "embed"))}}


def _square(cfg, fused=1):
    """`fused` square matrices side by side, each with its own bounds of initial values."""
    d = cfg.dim
    return params_lib.linear(d, fused * d, ("embed", None), params_lib.xavier(d, d))


def _norms(cfg, *names):
    return {name: {"weight": ParamSpec((cfg.dim,), (None,), params_lib.ones)} for name in names}


SELF_ATTENTION = Branch(
    "self_attention",
    _self_attention_spec,
    _self_attention,
    attention=Attention(
        teacher_forcing=over_chunks(teacher_forcing.teacher_forcing),
        block_causal=over_chunks(teacher_forcing.block_causal),
        windowed=over_chunks(windowed.windowed_teacher_forcing),
        over_past=_over_past,
        streaming=_over_frames,
    ),
)
CROSS_ATTENTION = Branch("cross_attention", _cross_attention_spec, _cross_attention)
FFN = Branch("ffn", _ffn_spec, _ffn)
BRANCHES = (SELF_ATTENTION, CROSS_ATTENTION, FFN)
