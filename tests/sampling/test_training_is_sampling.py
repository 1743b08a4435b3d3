"""What a trainer computes in one forward is what a sampler computes chunk by chunk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.models import dit
from tests.sampling.test_stream import (
    MODEL,
    SIZE,
    close,
    denoise,
    ingest,
    make_config,
    make_inputs,
    off_mesh,
    random_params,
    sampler_of,
    text_keys_values,
)  # fmt: skip

CHUNKS = 4


@pytest.mark.parametrize("given", [False, True], ids=["text", "image"])
def test_teacher_forcing_is_the_cached_rollout(given):
    """Velocities of all chunks at once, and from a cache of clean chunks, within 1e-5 (float32)."""
    cfg = make_config(
        window_frames=8 * CHUNKS, sink_frames=0, multi_shot_sink=False, rope_offset=0.0
    )
    sampler, placed = sampler_of(cfg)
    params, inputs = random_params(), make_inputs(cfg, CHUNKS)
    clean = jnp.stack([i.noise[0] for i in make_inputs(cfg, CHUNKS, seed=1)])
    noisy = jnp.stack([i.noise[0] for i in inputs])
    timesteps = np.repeat(np.float32([999, 833.25, 500, 4.98])[:, None], 8, axis=1)
    if given:  # the first frame is an image: clean, at timestep 0, in both copies
        timesteps[0, 0] = 0
        noisy = noisy.at[0, 0].set(clean[0, 0])
    positions = np.arange(8 * CHUNKS, dtype=np.int32).reshape(CHUNKS, 8)
    text = jnp.stack([i.text[0] for i in inputs])
    together = jax.jit(dit.teacher_forcing, static_argnums=1)(
        params, MODEL, clean[None], noisy[None], timesteps[None], positions[None], text=text[None]
    )[0]
    state = sampler.init_state(1, *SIZE)
    for c in range(CHUNKS):
        text = text_keys_values(params, MODEL, inputs[c].text)
        alone = denoise(
            params, MODEL, noisy[c][None], timesteps[None, c], positions[None, c],
            text=text, cache=off_mesh(state.past),
        )  # fmt: skip
        close(together[c], alone[0])
        state = ingest(sampler, placed, state, inputs[c].replace(noise=clean[c][None]))
