"""cuDNN's flash attention, forward and backward, which gives and takes softmax statistics.

Why a private JAX API: `jax.nn.dot_product_attention(implementation="cudnn")` casts the log-sum-exp
to bfloat16 (an error of up to 3 % in a merge weight) and drops its cotangent, and it has no way to
run the backward with a log-sum-exp that spans more keys than the call. The primitives below it do
all three. Only this file uses them; it fits jax 0.11.1 to 0.12.
"""

import inspect

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused

from longlive_jax.kernels import chip

# jax 0.12 added `score_mod` to the parameters of both primitives.
_HAS_SCORE_MOD = "score_mod" in inspect.signature(fused._dot_product_attention_fwd_impl).parameters
_UNUSED = 7  # bias, sequence lengths, packed offsets and page tables, none of which we pass


def supports(q: jax.Array) -> bool:
    """Whether cuDNN runs queries of this dtype and head_dim, both ways, on its devices."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    return chip.platform(q) == "gpu" and half and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0


def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`dense_attention.forward` by cuDNN; same shapes, q, k, v of one half-precision dtype."""
    out, lse = fused._dot_product_attention_fwd_p_wrapper.bind(
        q, k, v, *_unused(q), is_training=True, **_parameters(q)
    )
    return out, lse


def backward(
    q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, lse: jax.Array, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`dense_attention.backward` by cuDNN; out and lse may be over more keys than k has."""
    dq, dk, dv = fused._dot_product_attention_bwd_p_wrapper.bind(
        q, k, v, *_unused(q), lse, out, dout, **_parameters(q)
    )
    return dq, dk, dv


def _unused(q):
    return [jnp.zeros(0, q.dtype)] * _UNUSED


def _parameters(q):
    parameters = {
        "scale": q.shape[-1] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of it
        "mask_type": fused.MaskType.NO_MASK,
        "layout": fused.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return parameters | ({"score_mod": None} if _HAS_SCORE_MOD else {})
