"""What all quantised arrays have in common."""

from typing import Self

import jax
import numpy as np


class Quantized:
    """An array by its codes, `values`, and what they are multiplied with. `dtype`: it stands for.

    Indexing, scanning and mapping over leading axes work.
    """

    values: jax.Array
    dtype: np.dtype

    __iter__ = None  # Python would index on for ever: JAX clamps an index that is too large

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    def __getitem__(self, index) -> Self:
        """One tensor of a stack: `index` selects along axes that all arrays have."""
        return jax.tree.map(lambda leaf: leaf[index], self)
