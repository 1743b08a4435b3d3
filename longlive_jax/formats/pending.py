"""A matrix product of scaled numbers that waits for its scales and its bias.

To multiply the sums and add the bias takes a pass over the widest arrays of a model. The next
operation reads them anyway, and can do both on the way.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class PendingMatmul:
    """An array, x times weight plus bias: sums * row * column + bias, in float32.

    sums: [..., n], the product of the codes, in the array's dtype.
    row: float32 [..., 1], the scale of each row of x.
    column: float32 [n], the scale of each column of the weight.
    bias: [n], in sums' dtype.
    """

    sums: jax.Array
    row: jax.Array
    column: jax.Array
    bias: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sums.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.sums.dtype

    def astype(self, dtype) -> jax.Array:
        """The array itself, computed in float32 and rounded once."""
        column, bias = (
            y.astype(jnp.float32).reshape((1,) * (len(self.shape) - 1) + y.shape)
            for y in (self.column, self.bias)
        )
        return (self.sums.astype(jnp.float32) * self.row * column + bias).astype(dtype)

    def __radd__(self, x: jax.Array) -> jax.Array:
        """x + the array, computed in float32 and rounded to x's dtype once."""
        return (x.astype(jnp.float32) + self.astype(jnp.float32)).astype(x.dtype)
