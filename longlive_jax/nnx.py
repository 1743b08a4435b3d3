"""The transformer as a Flax NNX module, for Flax users. Same parameters, same numbers.

    model = nnx.Transformer(cfg, params.init(dit.spec(cfg), key))
    velocity = model(clean, noisy, timesteps, positions, text)

The rest of the package uses the pure functions of `models.dit`; this keeps their tree in
`flax.nnx.Param`s, so that `nnx.split`, `nnx.Optimizer`, LoRA filters and the like work on it.
"""

import jax
from flax import nnx

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit


class Transformer(nnx.Module):
    """`models.dit` with its parameter tree, under the same paths, as state."""

    def __init__(self, cfg: config_lib.Model, params: params_lib.Tree):
        """params: of `params.init(dit.spec(cfg), key)` or `checkpoints.store.load`."""
        self.cfg, self.params = cfg, nnx.data(jax.tree.map(nnx.Param, dict(params)))

    def tree(self) -> params_lib.Tree:
        """The parameters as the plain tree that the rest of the package takes."""
        return jax.tree.map(lambda p: p[...], self.params, is_leaf=_is_param)

    def __call__(self, clean, noisy, timesteps, positions, text) -> jax.Array:
        """Teacher forcing: shapes and dtypes as `models.dit.teacher_forcing`."""
        return dit.teacher_forcing(
            self.tree(), self.cfg, clean, noisy, timesteps, positions, text=text
        )

    def block_causal(self, latents, timesteps, positions, text) -> jax.Array:
        """Shapes and dtypes as `models.dit.block_causal`."""
        return dit.block_causal(self.tree(), self.cfg, latents, timesteps, positions, text=text)


def _is_param(x) -> bool:
    return isinstance(x, nnx.Param)
