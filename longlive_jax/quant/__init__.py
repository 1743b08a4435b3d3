"""The linear layer that recipes are for, trees of quantised weights, the cache's formats.

A format (`formats`) can do by itself, in plain JAX, whatever is asked of it here. Where a kernel or
a library can do it, too, `functools.singledispatch` finds it by the type of the format or of the
tensor: `fp8` and `nvfp4` register what those have. No other code asks which format it holds.
"""

from longlive_jax.quant import fp8, nvfp4  # noqa: F401  (they register)
