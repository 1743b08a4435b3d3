"""The action path: a live keyboard and mouse, as branches of the transformer's blocks.

  module   a mouse path and a keyboard path that attend over time (Matrix-Game 2, arXiv 2508.13009)
  token    one residual before the first block

`windows` cuts a video's actions into what each latent depends on, `of_chunk` and `advance` those of
a stream; `conditioning` makes of these what the branches read. Both kinds begin with projections of
zeros, and change nothing then.
"""

from longlive_jax.models.actions.branches import branches, join, split
from longlive_jax.models.actions.cost import flops
from longlive_jax.models.actions.inputs import (
    KEYBOARD,
    MOUSE,
    Given,
    advance,
    conditioning,
    dims,
    needed,
    newest,
    of_chunk,
    shapes,
    start,
    vectors_of,
    windows,
)

__all__ = [
    "KEYBOARD", "MOUSE", "Given", "advance", "branches", "conditioning", "dims", "flops",
    "join", "needed", "newest", "of_chunk", "shapes", "split", "start", "vectors_of", "windows",
]  # fmt: skip
