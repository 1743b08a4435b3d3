"""Videos from scripts: feeds the sampler, hands its latents to the decoder, keeps both busy."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.sampling import stream
from longlive_jax.sampling.decode import Decoder
from longlive_jax.sampling.script import Script


@dataclasses.dataclass(frozen=True)
class Batch:
    """Videos of equal length that are denoised together.

    index: of the first of them among all videos; noise depends on it, not on the batching.
    noise: [batch, frame, h, w, channel], or None: drawn from the seed.
    negative: [text_len, text_dim] with classifier-free guidance, else None.
    first_frame: [batch, 1, h, w, channel] for image-to-video, else None.
    prefix: [batch, frame, h, w, channel], latents of a video to continue, or None.
    """

    scripts: Sequence[Script]
    height: int  # of the latents
    width: int
    index: int = 0
    noise: np.ndarray | None = None
    negative: np.ndarray | None = None
    first_frame: np.ndarray | None = None
    prefix: np.ndarray | None = None

    @property
    def chunks(self) -> int:
        return self.scripts[0].chunks


def render(
    sampler: stream.Sampler, params, batch: Batch, seed: int, decoder: Decoder | None
) -> Iterator[tuple[jax.Array, Iterator[jax.Array]]]:
    """Yields each chunk's latents [batch, frame, h, w, channel] and its frames in pieces.

    Frames are `decoder`'s, uint8 [batch, frame, height, width, 3]; none without a decoder. Nothing
    is waited for: a consumer that takes one chunk at a time lets the device run ahead by one. A
    continued video starts with the chunks that it continues.
    """
    cfg = sampler.cfg
    state = sampler.init_state(len(batch.scripts), batch.height, batch.width)
    for chunk in range(_prefix_chunks(batch, cfg.model)):
        inputs = sampler.place(_inputs(cfg, batch, 0, _frames(batch.prefix, chunk, cfg.model)))
        state = sampler.ingest(params, state, inputs)
        yield inputs.noise, decoder(inputs.noise) if decoder else iter(())
    for chunk in range(batch.chunks):
        inputs = sampler.place(_inputs(cfg, batch, chunk, _noise(cfg, batch, chunk, seed)))
        if cfg.sample.recache and any(script.turn[chunk] for script in batch.scripts):
            state = sampler.recache(params, state, inputs)
        state, latents = sampler.step(params, state, inputs)
        yield latents, decoder(latents) if decoder else iter(())


def check(cfg: config_lib.Config, batch: Batch) -> None:
    """Refuses a batch that does not fit the mesh or the config, before anything is computed."""
    replicas = cfg.mesh.data * cfg.mesh.fsdp
    if len(batch.scripts) % replicas:
        raise InputError(
            f"{len(batch.scripts)} video(s) a batch must be a multiple of mesh data x fsdp = "
            f"{replicas}; change --batch or the mesh"
        )
    for name, array in (("noise", batch.noise), ("continued video", batch.prefix)):
        if array is not None and array.shape[1] % cfg.model.chunk_frames:
            raise InputError(
                f"{name}: {array.shape[1]} latent frames must be a multiple of "
                f"model.chunk_frames={cfg.model.chunk_frames}; cut or extend it"
            )


def _prefix_chunks(batch, model):
    return 0 if batch.prefix is None else batch.prefix.shape[1] // model.chunk_frames


def _frames(latents, chunk, model):
    return latents[:, chunk * model.chunk_frames : (chunk + 1) * model.chunk_frames]


def _noise(cfg, batch, chunk, seed):
    if batch.noise is not None:
        return _frames(batch.noise, chunk, cfg.model)
    samples = jnp.arange(batch.index, batch.index + len(batch.scripts))
    shape = (cfg.model.chunk_frames, batch.height, batch.width, cfg.model.in_dim)
    chunk += _prefix_chunks(batch, cfg.model)
    return stream.noise(jax.random.key(seed), chunk, samples, shape)


def _inputs(cfg, batch, chunk, noise) -> stream.ChunkInput:
    contexts = np.stack([script.contexts[script.which[chunk]] for script in batch.scripts])
    negative = None
    if stream.guided(cfg):
        negative = np.broadcast_to(batch.negative, contexts.shape).astype(cfg.compute_dtype)
    return stream.ChunkInput(
        noise=jnp.asarray(noise, jnp.float32),
        context=contexts.astype(cfg.compute_dtype),
        cut=np.asarray([script.cut[chunk] for script in batch.scripts]),
        negative=negative,
        first_frame=None
        if batch.first_frame is None
        else jnp.asarray(batch.first_frame, jnp.float32),
    )
