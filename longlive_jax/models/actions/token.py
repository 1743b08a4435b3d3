"""One residual before the first block: the same vector for all tokens of a latent.

After minWM for this backbone: weighted sums of learned vectors of the keys and of the mouse's
directions, an MLP, two causal convolutions over latents, and a projection. A latent's vector
depends on its own actions and those of four latents before, which it is given, so that training and
streaming are the same computation without a cache.
"""

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.config import TEMPORAL_COMPRESSION
from longlive_jax.models.actions import inputs
from longlive_jax.models.actions.inputs import KEYBOARD, MOUSE
from longlive_jax.models.branch import Branch, Hidden, Layer
from longlive_jax.ops.linear import linear
from longlive_jax.ops.norm import layer_norm
from longlive_jax.params import ParamSpec

NAME = "action_token"
_TABLE = 256  # width of the vectors of a key and of a direction
_WIDTH = 2 * _TABLE
_KERNEL = 3


def branch(cfg: config_lib.Actions) -> Branch:
    """The residual; before self-attention of the first layer it is before all blocks."""
    del cfg
    return Branch(NAME, _spec, _apply, layers=1)


def _apply(p: params_lib.Tree, x: Hidden, layer: Layer) -> Hidden:
    p, h = p[NAME], x.array()
    keyboard, mouse = (inputs.given(layer, name) for name in (KEYBOARD, MOUSE))
    assert keyboard is not None
    keys = _latents(keyboard.vectors)
    parts = [_sum(p["keys"], keys)]
    if "moves" in p:
        # Each direction of a mouse's axis has a vector of its own; one is a full move.
        size = p["moves"].shape[0] // 2
        moves = jnp.zeros((*keys.shape[:-1], size)) if mouse is None else _latents(mouse.vectors)
        moves = jnp.concatenate([jax.nn.relu(moves), jax.nn.relu(-moves)], axis=-1)
        parts.append(_sum(p["moves"], moves))
    else:
        parts.append(jnp.zeros_like(parts[0]))
    y = jnp.concatenate(parts, axis=-1).astype(h.dtype)
    y = y + linear(p["mlp"]["2"], jax.nn.silu(linear(p["mlp"]["0"], y)))
    for name in ("conv1", "conv2"):
        y = jax.nn.silu(_normed(_convolved(p[name], y)))
    y = linear(p["o"], y[..., 0, :])[..., None, :]
    return Hidden(h, jnp.broadcast_to(y, h.shape))


def _latents(vectors):
    """Each latent's mean action: [.., action, dim] -> float32 [.., latent, dim]."""
    shape = (*vectors.shape[:-2], -1, TEMPORAL_COMPRESSION, vectors.shape[-1])
    return jnp.mean(vectors.reshape(shape).astype(jnp.float32), axis=-2)


def _sum(table, weights):
    """Weighted sum over sqrt(sum of weights); the table's last row is for what nothing holds."""
    total = jnp.sum(weights, axis=-1, keepdims=True)
    idle = jax.nn.relu(1 - total)
    weights = jnp.concatenate([weights, idle], axis=-1)
    return jnp.matmul(weights, table.astype(jnp.float32)) / jnp.sqrt(jnp.maximum(total, 1))


def _convolved(p, y):
    """Causal convolution over latents [.., latent, width], of which the first two are used up."""
    taps = [y[..., i : y.shape[-2] - _KERNEL + 1 + i, :] for i in range(_KERNEL)]
    return linear(p, jnp.concatenate(taps, axis=-1))


def _normed(y):
    shape = (1,) * (y.ndim - 1) + y.shape[-1:]
    return layer_norm(y, jnp.ones(shape), jnp.zeros(shape))


def _spec(cfg: config_lib.Model) -> params_lib.Tree:
    actions = cfg.actions

    def table(rows):
        return ParamSpec((rows + 1, _TABLE), (None, None), params_lib.normal(1.0))

    tree = {
        "keys": table(actions.keyboard_dim),
        "mlp": {str(i): params_lib.linear(_WIDTH, _WIDTH, (None, None)) for i in (0, 2)},
        "conv1": params_lib.linear(_KERNEL * _WIDTH, _WIDTH, (None, None)),
        "conv2": params_lib.linear(_KERNEL * _WIDTH, _WIDTH, (None, None)),
        "o": params_lib.linear(_WIDTH, cfg.dim, (None, "embed"), params_lib.zeros),
    }
    if actions.mouse_dim:
        tree["moves"] = table(2 * actions.mouse_dim)
    return {NAME: tree}
