"""What all number formats have in common: `Format`, how arrays are quantised, and `Quantized`."""

import functools
import math
from collections.abc import Callable
from typing import ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.errors import InputError


class Format:
    """How arrays are quantised, as data: each format is a frozen dataclass."""

    title: ClassVar[str]  # in messages
    tensor: ClassVar[type["Quantized"]]  # what `quantize` makes
    native: ClassVar[float] = math.inf  # least compute capability of GPUs that multiply its codes
    otherwise: ClassVar[str] = "as bfloat16, which holds them exactly"  # how others multiply them
    multiple: ClassVar[int] = 1  # the length of a row must be a multiple of it
    tokens: ClassVar[int] = 1  # a KV cache fills a chunk's tokens up to a multiple of it
    stochastic: bool = False  # whether rounding takes a key
    per_tensor: bool = False  # whether a tensor has one scale
    fused: bool = False  # whether `ops.quantized` makes it, in one pass with what computes x

    def quantize(
        self,
        x: jax.Array,
        lead: int = 0,
        agree: Callable[[jax.Array], jax.Array] = lambda amax: amax,
        keys: jax.Array | None = None,
    ) -> "Quantized":
        """x [.., n], bfloat16 or float32, with scales along the last axis.

        Args:
          lead: how many first axes of x count tensors.
          agree: tensors' largest magnitudes [..] -> the largest of all devices that share them.
          keys: [.., group], for tensors and for groups that x's next axes count, if `stochastic`;
            None: to nearest.
        """
        raise NotImplementedError


class Quantized:
    """An array as codes, `values`, and their scales. `dtype`: of the array that was quantised.

    The array is `operand()` * `factor()`. Indexing, scanning and mapping over leading axes work.
    """

    values: jax.Array
    dtype: np.dtype
    __dataclass_fields__: ClassVar[dict]  # each is a `flax.struct.dataclass`

    # Whether a product's sums may be rounded to its dtype before they are scaled: codes of 8 bits
    # are wrong by more than bfloat16's rounding, which halves the memory traffic there.
    rounds_sums: ClassVar[bool] = False
    is_packed: ClassVar[bool] = False  # whether `pack` changes `values`

    __iter__ = None  # Python would index without end: JAX clamps an index that is too large

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def __getitem__(self, index) -> Self:
        """One tensor of a stack: `index` selects along axes that all arrays have."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    @functools.partial(jax.jit, static_argnames="dtype")
    def dequantize(self, dtype: jnp.dtype | None = None) -> jax.Array:
        """The numbers, in `dtype` (default: the tensor's own), computed in float32."""
        y = self.operand().astype(jnp.float32) * self.factor()
        return y.astype(self.dtype if dtype is None else dtype)

    def operand(self) -> jax.Array:
        """The operand of a product: the numbers without `factor`, in a dtype that holds them."""
        return self.values

    def factor(self) -> jax.Array:
        """The factor of each row of `operand`: float32 [..., 1], of `values`' rank."""
        raise NotImplementedError

    def pack(self) -> Self:
        """The tensor as files and messages store it, which have no type of less than a byte."""
        return self

    def unpack(self) -> Self:
        """The inverse of `pack`."""
        return self

    @jax.jit
    def is_finite(self) -> jax.Array:
        """bool []: whether all numbers are finite."""
        # Codes, too: XLA's CPU backend (jaxlib 0.12.0) may lose a NaN in a row's maximum.
        finite = [jnp.isfinite(leaf.astype(jnp.float32)).all() for leaf in jax.tree.leaves(self)]
        return jnp.stack(finite).all()

    def transposed(self) -> Self:
        """The same numbers with the last two axes exchanged.

        Raises:
          InputError: scales are of single rows.
        """
        raise InputError(
            "quant: a weight quantised by rows has no gradient of its input; quantise it by a "
            "recipe for training, whose blocks are square"
        )

    def merged(self) -> Self:
        """[.., group, n, row] -> [.., n, group * row], of groups in whole blocks."""

        def one(leaf):
            if leaf.ndim < self.ndim:  # a scale for all
                return leaf
            leaf = jnp.moveaxis(leaf, -3, -2)
            return leaf.reshape(*leaf.shape[:-2], -1)

        return jax.tree.map(one, self)


def trailing(scale: jax.Array, ndim: int) -> jax.Array:
    """`scale` with axes of size 1 at its end, for a rank of `ndim`."""
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))
