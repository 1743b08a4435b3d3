"""Videos from scripts: feeds the sampler, hands its latents to the decoder, keeps both busy."""

from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from longlive_jax.sampling import stream
from longlive_jax.sampling.batches import Batch
from longlive_jax.sampling.decode import Decoder
from longlive_jax.sampling.script import Text


def render(
    sampler: stream.Sampler,
    params,
    batch: Batch,
    text: Text,
    seed: int = 0,
    decoder: Decoder | None = None,
) -> Iterator[tuple[jax.Array, list[jax.Array]]]:
    """Yields each chunk's latents [batch, frame, h, w, channel] and its frames in pieces.

    Frames are `decoder`'s, uint8 [batch, frame, height, width, 3]; none without a decoder. Nothing
    yielded has been waited for; and a chunk is yielded when the work of the next one is already
    given to the device, so that a consumer who waits for a chunk never leaves the device idle. A
    continued video starts with the chunks that it continues.
    """
    return ahead(_chunks(sampler, params, batch, text, seed, decoder))


def ahead[T](results: Iterable[T]) -> Iterator[T]:
    """`results`, each when the work of the next one has been given to the device."""
    results = iter(results)
    for last in results:
        for result in results:
            yield last
            last = result
        yield last


def _chunks(sampler, params, batch, text, seed, decoder):
    cfg = sampler.cfg
    state = sampler.init_state(len(batch.scripts), batch.height, batch.width)
    known = 0 if batch.prefix is None else batch.prefix.shape[1] // cfg.model.chunk_frames
    for chunk in range(known):
        latents = _frames(batch.prefix, chunk, cfg.model)
        uncut = np.zeros(len(batch.scripts), bool)
        inputs = sampler.place(_inputs(cfg, batch, text, 0, latents).replace(cut=uncut))
        state = sampler.ingest(params, state, inputs)
        yield inputs.noise, list(decoder(inputs.noise)) if decoder else []
    for chunk in range(batch.chunks):
        noise = _noise(cfg, batch, chunk, seed, known)
        inputs = sampler.place(_inputs(cfg, batch, text, chunk, noise))
        if cfg.sample.recache and batch.scripts[0].turn[chunk]:  # the same for all of a batch
            state = sampler.recache(params, state, inputs)
        state, latents = sampler.step(params, state, inputs)
        yield latents, list(decoder(latents)) if decoder else []


def _frames(latents, chunk, model):
    return latents[:, chunk * model.chunk_frames : (chunk + 1) * model.chunk_frames]


def _noise(cfg, batch, chunk, seed, known):
    if batch.noise is not None:
        return _frames(batch.noise, chunk, cfg.model)
    samples = jnp.arange(batch.index, batch.index + len(batch.scripts))
    shape = (cfg.model.chunk_frames, batch.height, batch.width, cfg.model.in_dim)
    return stream.noise(jax.random.key(seed), known + chunk, samples, shape)


def _inputs(cfg, batch, text, chunk, noise) -> stream.ChunkInput:
    context = text.rows[[script.which[chunk] for script in batch.scripts]]
    negative, first = None, batch.first_frame
    if stream.guided(cfg):
        negative = np.broadcast_to(text.negative, context.shape).astype(cfg.compute_dtype)
    return stream.ChunkInput(
        noise=jnp.asarray(noise, jnp.float32),
        context=context.astype(cfg.compute_dtype),
        cut=np.asarray([script.cut[chunk] for script in batch.scripts]),
        negative=negative,
        first_frame=None if first is None else jnp.asarray(first, jnp.float32),
    )
