"""The VAE beside the sampler: latents in, frames out, a chunk at a time; and clips into latents.

JAX dispatches asynchronously, so a decoder that is fed chunk k right before the sampler is asked
for chunk k + 1 works while the host writes chunk k - 1: ahead of the denoising on the same device,
beside it on another.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import vae

_PLACED = mesh_lib.spec(("batch", None, None, "width", None))
_WHOLE = jax.P()


class Decoder:
    """Decodes the chunks of one batch of videos, in order, with the VAE's state in between.

    mesh: where the VAE lives: the sampler's mesh or, for devices of its own, another.
    """

    def __init__(self, cfg: config_lib.Config, params, mesh: jax.sharding.Mesh):
        self._cfg, self._mesh = cfg, mesh
        self._params = jax.device_put(params, jax.NamedSharding(mesh, _WHOLE))
        self._state = None

    def __call__(self, latents: jax.Array) -> Iterator[jax.Array]:
        """Dispatches the decoding of normalised latents [batch, latent, h, w, channel].

        Yields:
          uint8 [batch, frame, height, width, 3], not waited for: a piece for the first latent, then
          one for every `sample.vae_latents_per_call`. A video's first latent gives one frame, every
          other one four.
        """
        return self._decode(latents, vae.to_uint8)

    def unclamped(self, latents: jax.Array) -> Iterator[jax.Array]:
        """As `__call__`, but frames before clamping, in compute dtype."""
        return self._decode(latents, None)

    def _decode(self, latents, finish):
        latents = jax.device_put(latents, jax.NamedSharding(self._mesh, _PLACED))
        latents = latents.astype(self._cfg.compute_dtype)
        if first := self._state is None:
            self._state = vae.init_decode_state(
                self._cfg.vae, latents.shape[0], *latents.shape[2:4], latents.dtype, self._mesh
            )
        for piece in _pieces(latents.shape[1], self._cfg.sample.vae_latents_per_call):
            call = decode_program(self._cfg.vae, self._mesh, first, finish)
            self._state, frames = call(self._params, self._state, latents[:, piece])
            yield frames
            first = False


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


def encode(
    cfg: config_lib.Config,
    params,
    mesh: jax.sharding.Mesh,
    read: Callable[[int, int], np.ndarray],
    count: int,
) -> np.ndarray:
    """Encodes a clip of 1 + 4 k frames, a few at a time.

    Args:
      read: read(start, stop) gives frames [batch, frame, height, width, 3] in [-1, 1].
      count: how many frames there are.

    Returns:
      Normalised latents, float32 [batch, 1 + k, height / 16, width / 16, channel].
    """
    params = jax.device_put(params, jax.NamedSharding(mesh, _WHOLE))
    state, latents = None, []
    for piece in _pieces(1 + (count - 1) // vae.FRAMES, cfg.sample.vae_latents_per_call):
        first = piece.start == 0
        start = 0 if first else vae.FRAMES * piece.start - 3
        frames = read(start, vae.FRAMES * piece.stop - 3)
        frames = jax.device_put(frames.astype(cfg.compute_dtype), jax.NamedSharding(mesh, _PLACED))
        if first:
            size = (frames.shape[2] // vae.PIXELS, frames.shape[3] // vae.PIXELS)
            state = vae.init_encode_state(cfg.vae, frames.shape[0], *size, frames.dtype, mesh)
        state, out = _encode_program(cfg.vae, mesh, first)(params, state, frames)
        latents.append(np.asarray(out, np.float32))
    return np.concatenate(latents, axis=1)


_encode_program = functools.cache(lambda cfg, mesh, first: vae.encode_on_mesh(mesh, cfg, first))


def _pieces(count: int, size: int) -> Iterator[slice]:
    """The first latent on its own, then groups of `size`, then what is left.

    A video's first latent must be alone; a chunk's is, so that its frames are there sooner.
    """
    yield slice(0, 1)
    for start in range(1, count, size):
        yield slice(start, min(start + size, count))
