"""What a stream's chunks are made from: the seed's noise, or latents given in its place."""

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.sampling import stream
from longlive_jax.sampling.engine import Start


def past(cfg: config_lib.Config, start: Start, index: int) -> np.ndarray | None:
    """Chunk `index` of the video that the stream goes on from; None behind its end."""
    return _piece(cfg, start.past, index)


def noise(cfg: config_lib.Config, start: Start, index: int) -> jax.Array:
    """float32 [row, frame, h, w, channel], of chunk `index`.

    Raises:
      InputError: the noise given in place of the seed's is at its end.
    """
    if start.noise is None:
        key, samples, chunks, shape = _draw(cfg, start, index)
        return stream.noise(key, chunks, samples, shape)
    before = 0 if start.past is None else start.past.shape[1] // cfg.model.chunk_frames
    given = _piece(cfg, start.noise, index - before)
    if given is None:
        raise InputError(f"session: the noise given is for {index - before} chunks only")
    return jnp.asarray(given, jnp.float32)


def renoise(cfg: config_lib.Config, start: Start, index: int, steps: int) -> jax.Array | None:
    """New noise of each step, if the solver takes any; the seed's, whatever noise is given."""
    if cfg.sample.solver == "unipc":
        return None
    key, samples, chunks, shape = _draw(cfg, start, index)
    return stream.renoise(key, chunks, samples, shape, steps)


def _draw(cfg, start, index):
    """What the noise of a chunk is a function of: key, samples, chunks and shape."""
    shape = (cfg.model.chunk_frames, start.height, start.width, cfg.model.in_dim)
    chunks = np.full(len(start.samples), index, np.int32)
    return jax.random.key(start.seed), np.asarray(start.samples, np.int32), chunks, shape


def _piece(cfg, latents, chunk):
    """Those of a chunk, or None if there are no more."""
    frames = cfg.model.chunk_frames
    if latents is None or latents.shape[1] <= chunk * frames:
        return None
    return latents[:, chunk * frames : (chunk + 1) * frames]
