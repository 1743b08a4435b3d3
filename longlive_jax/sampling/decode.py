"""The VAE beside the sampler: latents in, frames out, a chunk at a time.

JAX dispatches asynchronously, so a decoder that is fed chunk k right before the sampler is asked
for chunk k + 1 works while the host writes chunk k - 1: ahead of the denoising on the same device,
beside it on another.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import vae, vae_fp8, vae_spec
from longlive_jax.params import Tree


class Pictures(NamedTuple):
    """Frames, uint8 [batch, frame, height, width, 3], and whether all were finite, bool []."""

    frames: jax.Array
    finite: jax.Array


def pictures(frames: jax.Array) -> Pictures:
    """Frames as they are shown. Rounding makes black of NaN, so it is looked for here."""
    return Pictures(vae.to_uint8(frames), jnp.isfinite(frames).all())


class Decoder:
    """The VAE's decoder on a mesh, for any number of streams: the state is the caller's.

    mesh: the sampler's mesh or, for devices of its own, another.

    Attributes:
      params: the decoder's, on each device of `mesh`.
    """

    def __init__(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh):
        self._cfg, self.mesh = cfg, mesh
        params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
        self.params = prepare(cfg, params)

    def __call__(
        self,
        state: vae.DecodeState | None,
        latents: jax.Array,
        finish: Callable[[jax.Array], Any] | None = pictures,
    ) -> Iterator[tuple[vae.DecodeState, Any]]:
        """Dispatches the decoding of the next latents of a video, piece by piece.

        Args:
          state: of the piece before, which is donated; None: the video begins.
          latents: normalised [batch, latent, h, w, channel].
          finish: what becomes of frames before clamping, in compute dtype; None: nothing.

        Yields:
          The state, and Pictures or what `finish` makes, not waited for: a piece for the
          first latent, then one for every `sample.vae_latents_per_call`. A video's first latent
          gives one frame, every other one four.
        """
        latents = jax.device_put(latents, mesh_lib.sharding(self.mesh, vae_spec.SHARDED))
        latents = latents.astype(self._cfg.compute_dtype)
        first = state is None
        now = self.init_state(latents.shape[0], *latents.shape[2:4]) if state is None else state
        for piece in vae.pieces(latents.shape[1], self._cfg.sample.vae_latents_per_call):
            call = decode_program(self._cfg.vae, self.mesh, first, finish)
            now, frames = call(self.params, now, latents[:, piece])
            yield now, frames
            first = False

    def pieces(self, latents: jax.Array) -> int:
        """How many pieces a call for these latents yields."""
        return len(list(vae.pieces(latents.shape[1], self._cfg.sample.vae_latents_per_call)))

    def init_state(self, batch: int, height: int, width: int) -> vae.DecodeState:
        """The state before a video's first latents. `height`, `width`: of the latents."""
        cfg = self._cfg
        return vae.init_decode_state(cfg.vae, batch, height, width, cfg.compute_dtype, self.mesh)


def prepare(cfg: config_lib.Config, params: Tree) -> Tree:
    """The decoder's parameters as `decode_program` takes them: in FP8 by `quant.vae`."""
    return params if cfg.quant.vae == "bf16" else _quantize(params)


_quantize = jax.jit(vae_fp8.quantize)


@functools.cache
def decode_program(
    cfg: config_lib.VAE, mesh: jax.sharding.Mesh, first: bool, finish: Callable | None
):
    """(params, state, latents) -> (state, finish(frames)), compiled; the state is donated."""
    decode = vae.decode_on_mesh(mesh, cfg, first)

    def call(params, state, latents):
        state, frames = decode(params, state, latents)
        return state, frames if finish is None else finish(frames)

    return jax.jit(call, donate_argnums=1, keep_unused=True)
