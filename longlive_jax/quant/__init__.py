"""The quantised linear layer, trees of quantised weights, formats of the KV cache.

A format (`formats`) has every operation that is used here, in plain JAX. Where a kernel or a
library has it, too, `functools.singledispatch` finds that by the type of the format or of the
tensor: `fp8` and `nvfp4` register them. No other code asks for a tensor's format.
"""

from longlive_jax.quant import fp8, nvfp4  # noqa: F401  (they register)
