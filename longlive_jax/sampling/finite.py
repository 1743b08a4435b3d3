"""Numbers that are not finite: found on the device beside a chunk's frames, never shown as frames.

NaN becomes black when it is rounded to uint8, so that no later stage can tell it from a picture.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib

# Latents are normalised to unit variance and those of films stay below 10: past ten times that
# there is nothing that the decoder was trained on.
MOST_LATENT = 100.0
# Guidance adds so many times the difference that a prompt makes, which is about one: with more
# than this the latents are past MOST_LATENT whatever the prompt is.
MOST_GUIDANCE = 100.0


@jax.jit
def measure(latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether all latents are finite, bool [], and the largest magnitude, float32 []."""
    return jnp.isfinite(latents).all(), jnp.abs(latents).max()


def all_of(flags: Sequence[jax.Array], mesh: jax.sharding.Mesh) -> jax.Array:
    """Whether all flags are set, bool [] on `mesh`; the first may come from another mesh."""
    first, *rest = flags
    if rest and first.sharding.device_set != rest[0].sharding.device_set:
        first = jax.device_put(first, jax.NamedSharding(mesh, jax.P()))
    return _all((first, *rest))


_all = jax.jit(lambda flags: jnp.stack(flags).all())


def cause(
    weights: Mapping[str, params_lib.Tree], arrays: Mapping[str, np.ndarray | None], otherwise: str
) -> str:
    """The likely cause, after looking at what the numbers were made of.

    Args:
      weights: parameters by what they are.
      arrays: on the host, by what they are.
      otherwise: the cause where all of these are finite.
    """
    for name, array in arrays.items():
        if array is not None and not np.isfinite(array).all():
            return f"{name} is not finite"
    for name, tree in weights.items():
        if bad := params_lib.not_finite(tree):
            more = f", and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
            return f"weights of {name} are not finite: {bad[0]}{more}; convert or export them again"
    return otherwise


def warn_of_latents(where: str, largest: Any) -> None:
    """Warns, once a run, of latents that are finite and can be no video."""
    if float(largest) > MOST_LATENT:
        logging.log_first_n(
            logging.WARNING,
            "%s: latents up to %.3g, where a video's stay below %g: it will hardly look right; "
            "look at sample.guidance_scale, the noise and the weights",
            1,
            where,
            float(largest),
            MOST_LATENT,
        )


def warn_of_guidance(cfg: config_lib.Config) -> None:
    """Warns of a guidance that is finite and senseless."""
    if abs(scale := cfg.sample.guidance_scale) > MOST_GUIDANCE:
        logging.warning(
            "sample.guidance_scale=%g: past %g no latents are those of a video; usual are 1 to 10",
            scale,
            MOST_GUIDANCE,
        )
