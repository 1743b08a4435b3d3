"""GELU by tanh (Hendrycks and Gimpel, arXiv 1606.08415, section 2)."""

import jax
import jax.numpy as jnp

from longlive_jax.kernels import chip

_C = (2 / jnp.pi) ** 0.5
_CUBE = 0.044715


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float32, rounded once to x's dtype.

    Its gradient keeps x alone and is computed in float32: autodiff would keep the inner products,
    each as large as the widest array of the model.
    """
    return _by_tanh(x.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def gelu_of_product(x: jax.Array) -> jax.Array:
    """`gelu` of the result of `ops.linear`.

    On a GPU bfloat16 without a gradient is computed in bfloat16: XLA then recognises GELU, and
    cuBLASLt applies it to the product's float32 sums. A program in which other kernels multiply,
    too (`xla_gpu_enable_triton_gemm`), rounds more often: on an H200 the error is 0.27 % instead
    of 0.17 %.
    """
    known = chip.platform(x) == "gpu" and x.dtype == jnp.bfloat16
    return _by_tanh(x) if known else gelu(x)


def _by_tanh(x):
    return x * (0.5 * (1 + jnp.tanh(_C * (x + _CUBE * (x * x * x)))))


def _forward(x):
    return gelu(x), x


def _backward(x, g):
    # Behind a barrier: XLA would share the tanh with a forward that is recomputed next to it, and
    # keep it in memory in float32.
    y = jax.lax.optimization_barrier(x).astype(jnp.float32)
    t = jnp.tanh(_C * (y + _CUBE * y**3))
    slope = 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * _C * (1 + 3 * _CUBE * y * y)
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_forward, _backward)
gelu_of_product.defvjp(_forward, _backward)
