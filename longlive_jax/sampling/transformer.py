"""The transformer under the prompts of one chunk, and the video's given first frame."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.models import dit
from longlive_jax.sampling import actions

if TYPE_CHECKING:
    from longlive_jax.sampling.stream import ChunkInput, StreamState


@dataclasses.dataclass(frozen=True)
class ChunkTransformer:
    """The transformer under the prompts of one chunk, with and without guidance.

    text: `dit.text_keys_values` of branch * batch rows.
    actions: what the action path is given of the chunk; None without one.
    guidance: float32 [batch], the scale of each row; None: the config's.
    """

    params: params_lib.Tree
    text: dit.Text
    branches: int
    cfg: config_lib.Config
    sharding: dit.Sharding
    precision: dit.Precision
    actions: "ChunkActions | None" = None
    guidance: jax.Array | None = None

    @classmethod
    def of(
        cls, params: params_lib.Tree, state: "StreamState", inputs: "ChunkInput",
        cfg: config_lib.Config, sharding: dit.Sharding, precision: dit.Precision,
    ) -> "ChunkTransformer":  # fmt: skip
        """With keys and values of the chunk's text; `params` as `dit.denoise` takes them."""
        rows = [inputs.text]
        if inputs.negative is not None:
            rows.append(inputs.negative)
        if cfg.model.actions.guided:
            rows.append(inputs.text)
        text = dit.text_keys_values(
            params, cfg.model, jnp.concatenate(rows).astype(cfg.compute_dtype),
            sharding=sharding, precision=precision,
        )  # fmt: skip
        actions = ChunkActions.of(state, inputs, cfg, sharding)
        branches, guidance = state.cache.k.shape[1], inputs.guidance
        return cls(params, text, branches, cfg, sharding, precision, actions, guidance)

    def velocity(
        self, sample: jax.Array, timesteps: jax.Array, positions: jax.Array, past: dit.Caches
    ) -> jax.Array:
        """float32 [batch, frame, h, w, channel], of `sample` at `timesteps` [batch, frame]."""
        x, timesteps, positions = map(self._branches, (sample, timesteps, positions))
        velocity = dit.denoise(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), timesteps, positions,
            text=self.text, cache=past, inserted=self._inserted(), sharding=self.sharding,
            precision=self.precision,
        ).astype(jnp.float32)  # fmt: skip
        prompt, *others = jnp.split(velocity, self.branches)
        result = prompt
        if self.cfg.sample.guided:
            negative = others[0]
            scale: Any = self.cfg.sample.guidance_scale
            if self.guidance is not None:
                scale = self.guidance.reshape(-1, *(1,) * (prompt.ndim - 1))
            result = negative + scale * (prompt - negative)
        if self.cfg.model.actions.guided:
            result += (self.cfg.model.actions.guidance - 1) * (prompt - others[-1])
        return result

    def commit(
        self, latents: jax.Array, positions: jax.Array, past: dit.Caches, slot: jax.Array
    ) -> dict[str, Any]:
        """The caches by branch, with keys and values of clean `latents` in `slot` int32 [batch]."""
        x, positions = self._branches(latents), self._branches(positions)
        after = dit.commit(
            self.params, self.cfg.model, x.astype(self.cfg.compute_dtype), positions,
            text=self.text, cache=past, slot=slot, inserted=self._inserted(),
            sharding=self.sharding, precision=self.precision,
        )  # fmt: skip
        return dict(after) if isinstance(after, Mapping) else {dit.SELF_ATTENTION.name: after}

    def _inserted(self):
        """Conditioning of inserted branches, of branch * batch rows."""
        if self.actions is None:
            return None
        given = jax.tree.map(self._branches, dict(self.actions.inserted))
        if not self.cfg.model.actions.guided:
            return given
        return {name: one.replace(vectors=_last_still(one.vectors, self.branches))
                for name, one in given.items()}  # fmt: skip

    def _branches(self, x):
        return x if self.branches == 1 else jnp.concatenate([x] * self.branches)


def _last_still(vectors, branches):
    """The vectors of branch * batch rows, zero in the last branch."""
    rows = len(vectors)
    kept = jnp.arange(rows) < rows - rows // branches
    return vectors * kept.reshape(-1, *(1,) * (vectors.ndim - 1)).astype(vectors.dtype)


@dataclasses.dataclass(frozen=True)
class ChunkActions:
    """A chunk's actions.

    windows: by path [batch, frame, action, dim], of the whole chunk.
    inserted: the conditioning of the branches. before: what the next chunk takes as the last ones.
    """

    windows: Mapping[str, jax.Array]
    inserted: Mapping[str, Any]
    before: Mapping[str, jax.Array]

    @classmethod
    def of(
        cls, state: "StreamState", inputs: "ChunkInput", cfg: config_lib.Config,
        sharding: dit.Sharding,
    ) -> "ChunkActions | None":  # fmt: skip
        """Of the next chunk.

        Raises:
          InputError: actions that the model does not take.
        """
        settings, size = cfg.model.actions, cfg.model.chunk_frames
        actions.check(inputs.actions, settings, len(inputs.cut), size)
        if state.actions is None or inputs.actions is None:
            return None
        chunk = state.window.next_chunk
        windows, before = actions.enter(state.actions.before, inputs.actions, chunk == 0)
        frames = local_frames(inputs.noise.shape[1], sharding)
        return cls(windows, actions.inserted(settings, windows, chunk, frames, size), before)

    def past(
        self, cfg: config_lib.Config, windows: Mapping[str, jax.Array], chunk: jax.Array,
        frames: jax.Array,
    ) -> "ChunkActions":  # fmt: skip
        """Of an earlier chunk `chunk`, int32 [batch]."""
        settings, size = cfg.model.actions, cfg.model.chunk_frames
        inserted = actions.inserted(settings, windows, chunk, frames, size)
        return dataclasses.replace(self, windows=windows, inserted=inserted)


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
