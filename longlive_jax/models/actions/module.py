"""Matrix-Game 2's action module (arXiv 2508.13009): mouse path, then keyboard path.

    x = x + O_mouse attention(q, k, v),   q, k, v of MLP(x, the latent's last mouse vectors)
    x = x + O_keys  attention(Q x, k, v), k, v of the latent's last keyboard vectors alone

Each position of a picture attends over time, to a few latents. Neither path has a norm before it, a
gate or the timestep. The MLP's first layer is split over its two inputs, so that they are never
joined; the keyboard's keys and values are one a latent, for all positions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models.actions import inputs
from longlive_jax.models.actions.inputs import KEYBOARD, MOUSE, vectors_of
from longlive_jax.models.branch import Attention, Branch, Hidden, Layer
from longlive_jax.ops import latent_attention, rope
from longlive_jax.ops.gelu import gelu
from longlive_jax.ops.linear import linear
from longlive_jax.ops.norm import layer_norm, rms_norm
from longlive_jax.params import ParamSpec
from longlive_jax.quant import kv

PARAMS = "action_model"  # in a block
_NORM_EPS = 1e-5  # of the MLP's layer norm


def branches(cfg: config_lib.Actions) -> tuple[Branch, ...]:
    """The mouse path, if there is a mouse, and the keyboard path."""
    attention = Attention(
        teacher_forcing=functools.partial(_over_chunks, cfg.window),
        block_causal=functools.partial(_over_noisy_chunks, cfg.window),
        windowed=functools.partial(_over_chunks, cfg.window),
        over_past=functools.partial(_over_past, cfg.window),
        streaming=_over_frames,
    )
    mouse = Branch(MOUSE, _no_spec, _mouse, cfg.layers, attention)
    keyboard = Branch(KEYBOARD, _spec, _keyboard, cfg.layers, attention)
    return (mouse, keyboard) if cfg.mouse_dim else (keyboard,)


def _mouse(p: params_lib.Tree, x: Hidden, layer: Layer) -> Hidden:
    given = inputs.given(layer, MOUSE)
    if given is None:
        return x
    p, h = p[PARAMS], x.array()
    of_tokens, of_moves = jnp.split(p["mouse_mlp"]["0"]["weight"], [h.shape[-1]])
    moves = given.vectors.reshape(*given.vectors.shape[:-2], -1).astype(h.dtype)
    moves = linear({"weight": of_moves, "bias": p["mouse_mlp"]["0"]["bias"]}, moves)
    y = gelu(_product(of_tokens, h) + moves[..., None, :])
    norm = (_last(p["mouse_mlp"]["3"][name], h) for name in ("weight", "bias"))
    y = layer_norm(linear(p["mouse_mlp"]["2"], y), *norm, _NORM_EPS)
    qkv = checkpoint_name(_product(p["t_qkv"]["weight"], y), "qkv")
    q, k, v = (_heads(y, layer) for y in jnp.split(qkv, 3, axis=-1))
    q, k = (rope.rotate(_normed(y), given.angle) for y in (q, k))
    y = layer.attend(MOUSE, q, k, v)  # pyright: ignore[reportOptionalCall]
    return _add(p["proj_mouse"], h, y)


def _keyboard(p: params_lib.Tree, x: Hidden, layer: Layer) -> Hidden:
    given = inputs.given(layer, KEYBOARD)
    assert given is not None
    p, h = p[PARAMS], x.array()
    keys = linear(p["keyboard_embed"]["0"], given.vectors.astype(h.dtype))
    keys = linear(p["keyboard_embed"]["2"], jax.nn.silu(keys))
    kv_weight = p["keyboard_attn_kv"]["weight"]
    k, v = jnp.split(_product(kv_weight, keys.reshape(*keys.shape[:-2], -1)), 2, axis=-1)
    q = checkpoint_name(_product(p["mouse_attn_q"]["weight"], h), "qkv")
    q, k, v = (_heads(y, layer) for y in (q, k, v))
    q, k = rope.rotate(_normed(q), given.angle), rope.rotate(_normed(k), given.angle[..., 0, :])
    # Both copies of a chunk have the same actions, and yet each its own gradient.
    shape = (*h.shape[:-2], *k.shape[-2:])
    k, v = jnp.broadcast_to(k, shape), jnp.broadcast_to(v, shape)
    y = layer.attend(KEYBOARD, q, k, v)  # pyright: ignore[reportOptionalCall]
    return _add(p["proj_keyboard"], h, y)


def _add(p, h, y):
    """h + the projected heads, which wait for the next norm."""
    y = _product(p["weight"], y.reshape(*h.shape[:-1], -1))
    return Hidden(h, checkpoint_name(y, "output"))


def _product(weight, x):
    """`ops.linear` without bias."""
    return jnp.matmul(x, weight.astype(x.dtype))


def _normed(x):
    """x / rms(x) over a head. The original has a weight, which it neither multiplies nor trains."""
    return rms_norm(x, jnp.ones(x.shape[-1:], jnp.float32))


def _heads(x, layer):
    return x.reshape(*x.shape[:-1], -1, layer.cfg.actions.head_dim)


def _last(vector, x):
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


# ---------------------------------------------------------------------------------------------
# Attention. q: [batch, chunk, (copy,) frame, patch, head, head_dim]; k, v: so, or without patch.


def _over_chunks(window, q, k, v, sharding, visible=None):
    """Both copies of a chunk see the clean latents before it, and their own."""
    window = _window(window, k.shape[3], visible)
    q, k, v = (kv.load(sharding.to_heads(y), y.dtype) for y in (q, k, v))
    return sharding.to_tokens(latent_attention.of_chunks(q, k, v, window))


def _over_noisy_chunks(window, q, k, v, sharding):
    """A chunk sees the latents before it as they are: the only copy."""
    return _over_past(window, q, k, v, sharding, None, None)[0]


def _over_past(window, q, k, v, sharding, past, visible):
    """One copy sees the clean latents `past`, None for its own; and what a later copy is given."""
    window = _window(window, k.shape[2], visible)
    q, k, v = (kv.load(sharding.to_heads(y), y.dtype) for y in (q, k, v))
    past = (k, v) if past is None else past
    q, k, v = (y[:, :, None] for y in (q, k, v))
    return sharding.to_tokens(latent_attention.of_chunks(q, k, v, window, past)[:, :, 0]), past


def _window(window, frames, visible):
    """Latents that are visible. 0 are all of a stream's window, which `visible` tells the size of.

    visible: chunks that self-attention sees, with which it is counted alone: these are the newest.
    """
    return window or (0 if visible is None else (visible.shape[-1] + 1) * frames)


def _over_frames(q, k, v, sharding, past):
    """`past` on all of a chunk's latents, from frames sharded over seq."""
    sent = (y[:, 0].reshape(len(y), -1, *y.shape[-2:]) for y in (q, k, v))
    sent = (kv.load(sharding.to_heads(y), q.dtype) for y in sent)
    return sharding.to_tokens(past(*sent))[:, None]


# ---------------------------------------------------------------------------------------------
# Parameters, by the original's names.


def _spec(cfg: config_lib.Model) -> params_lib.Tree:
    d, width, number = cfg.dim, cfg.actions.width, vectors_of(cfg.actions)
    embed, mouse = cfg.actions.keyboard_embed, number * cfg.actions.mouse_dim
    tree = {
        "keyboard_embed": {
            "0": params_lib.linear(cfg.actions.keyboard_dim, embed, (None, None)),
            "2": params_lib.linear(embed, embed, (None, None)),
        },
        "keyboard_attn_kv": _weight(number * embed, 2 * width, (None, "embed")),
        "mouse_attn_q": _weight(d, width, ("embed", None)),
        "proj_keyboard": _weight(width, d, (None, "embed"), params_lib.zeros),
    }
    if mouse:
        tree |= {
            "mouse_mlp": {
                "0": params_lib.linear(d + mouse, width, (None, "embed")),
                "2": params_lib.linear(width, width, (None, "embed")),
                "3": {
                    "weight": ParamSpec((width,), (None,), params_lib.ones),
                    "bias": ParamSpec((width,), (None,)),
                },
            },
            "t_qkv": _weight(width, 3 * width, ("embed", None)),
            "proj_mouse": _weight(width, d, (None, "embed"), params_lib.zeros),
        }
    return {PARAMS: tree}


def _no_spec(cfg: config_lib.Model) -> params_lib.Tree:
    """The mouse path's parameters lie beside the keyboard path's, as in the original."""
    del cfg
    return {}


def _weight(inputs, outputs, axes, init=None):
    return {
        "weight": ParamSpec((inputs, outputs), axes, init or params_lib.xavier(inputs, outputs))
    }
