"""The linear layer. The only place that looks at how a weight is stored."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp


def linear(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """x [..., in] @ weight [in, out] + bias [out], in x's dtype with float32 accumulation."""
    y = jnp.matmul(x, params["weight"].astype(x.dtype))
    bias = params["bias"].astype(x.dtype)
    return y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
