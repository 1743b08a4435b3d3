"""The transformer under the prompts of one chunk, and the video's given first frame."""

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit
from longlive_jax.sampling.kv_cache import KVCache, Past

if TYPE_CHECKING:
    from longlive_jax.sampling.stream import ChunkInput, StreamState


@dataclasses.dataclass(frozen=True)
class ChunkTransformer:
    """The transformer under the prompts of one chunk, with and without guidance.

    text: `dit.text_keys_values` of branch * batch rows.
    """

    params: params_lib.Tree
    text: dit.Text
    branches: int
    cfg: config_lib.Config
    sharding: dit.Sharding
    precision: dit.Precision

    @classmethod
    def of(
        cls, params: params_lib.Tree, state: "StreamState", inputs: "ChunkInput",
        cfg: config_lib.Config, sharding: dit.Sharding, precision: dit.Precision,
    ) -> "ChunkTransformer":  # fmt: skip
        """With keys and values of the chunk's text; `params` as `dit.denoise` takes them."""
        text = inputs.text
        if inputs.negative is not None:
            text = jnp.concatenate([text, inputs.negative])
        text = dit.text_keys_values(
            params, cfg.model, text.astype(cfg.compute_dtype),
            sharding=sharding, precision=precision,
        )  # fmt: skip
        return cls(params, text, state.cache.k.shape[1], cfg, sharding, precision)

    def velocity(
        self, sample: jax.Array, timesteps: jax.Array, positions: jax.Array, past: Past
    ) -> jax.Array:
        """float32 [batch, frame, h, w, channel], of `sample` at `timesteps` [batch, frame]."""
        x, timesteps, positions = map(self._branches, (sample, timesteps, positions))
        velocity = dit.denoise(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), timesteps, positions,
            text=self.text, cache=past, sharding=self.sharding, precision=self.precision,
        ).astype(jnp.float32)  # fmt: skip
        if self.branches == 1:
            return velocity
        prompt, negative = jnp.split(velocity, 2)
        return negative + self.cfg.sample.guidance_scale * (prompt - negative)

    def commit(
        self, latents: jax.Array, positions: jax.Array, past: Past, slot: jax.Array
    ) -> KVCache:
        """The cache, with keys and values of clean `latents` in `slot` int32 [batch]."""
        x, positions = self._branches(latents), self._branches(positions)
        after = dit.commit(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), positions,
            text=self.text, cache=past, slot=slot, sharding=self.sharding, precision=self.precision,
        )  # fmt: skip
        assert isinstance(after, Past)
        return after.cache

    def _branches(self, x):
        return x if self.branches == 1 else jnp.concatenate([x] * self.branches)


def positions_of(first: jax.Array, frames: int, sharding: dit.Sharding) -> jax.Array:
    """Temporal positions of this device's frames of a chunk that begins at `first` [batch]."""
    return first[:, None] + local_frames(frames, sharding)[None, :]


def local_frames(frames: int, sharding: dit.Sharding) -> jax.Array:
    """Indices, within the chunk, of the frames that this device has."""
    rank = 0 if sharding.seq is None else jax.lax.axis_index(sharding.seq)
    return rank * frames + jnp.arange(frames, dtype=jnp.int32)


class GivenFrame:
    """Image-to-video: keeps a video's first frame at the given latent, at timestep 0."""

    def __init__(self, state: "StreamState", inputs: "ChunkInput", sharding: dit.Sharding):
        self.latent = inputs.first_frame
        if self.latent is not None:
            first = local_frames(inputs.noise.shape[1], sharding) == 0
            self.mask = first[None, :] & (state.window.next_chunk == 0)[:, None]

    def __call__(self, sample: jax.Array) -> jax.Array:
        """`sample` [batch, frame, h, w, channel] with the given frame in its place."""
        if self.latent is None:
            return sample
        return jnp.where(self.mask[..., None, None, None], self.latent, sample)

    def timesteps(self, timesteps: jax.Array) -> jax.Array:
        """`timesteps` [batch, frame], 0 where the frame is given."""
        return timesteps if self.latent is None else jnp.where(self.mask, 0.0, timesteps)
