"""The student's gradient against that of the rollout itself, unrolled chunk by chunk.

The oracle is a Python loop in float32: it keeps keys and values of every chunk in a list, attends
by one softmax, knows which chunks are visible by the rules of the paper, and differentiates the
exit steps as they were run. No scan, no teacher forcing, no table of slots.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from longlive_jax.diffusion import schedule, unipc
from longlive_jax.models import dit, lora
from longlive_jax.training.objectives.dmd import CRITIC, DIT, LORA, STUDENT
from tests.training import dmd_parts, tiny_distill
from tests.training.dmd_parts import error

LONG = dict(latent_frames=24)  # two chunks more than the window
CUTS = np.array([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], bool)


class Seen(struct.PyTreeNode):
    """Keys and values of all chunks: k, v [layer, batch, chunk, token, head, head_dim], and which
    of them are visible, bool [batch, chunk]. The last chunk's place is for the one at hand.
    """

    k: jax.Array
    v: jax.Array
    visible: jax.Array

    def attend(self, layer, q, k, v):
        def keys(past, own):
            past = past.reshape(past.shape[0], -1, *past.shape[3:])
            return jnp.concatenate([past, own], axis=1)

        seen = jnp.repeat(self.visible, k.shape[1], axis=1)
        seen = jnp.concatenate([seen, jnp.ones(k.shape[:2], bool)], axis=1)
        k, v = keys(self.k[layer], k), keys(self.v[layer], v)
        logits = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(jnp.float32(q.shape[-1]))
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhts,bshd->bthd", weights, v)

    def write(self, layer, slot, k, v, axis=None):
        del axis
        at = (layer, jnp.arange(slot.shape[0]), slot)
        return self.replace(k=self.k.at[at].set(k), v=self.v.at[at].set(v))


def visible_chunks(cfg, cuts):
    """bool [batch, chunk, chunk]: what chunk i of a video sees, and where a chunk begins."""
    size, chunks = cfg.sample.window(cfg.model), cuts.shape[1]
    see, positions = np.zeros((*cuts.shape, chunks), bool), np.zeros(cuts.shape, np.int32)
    for row, cut in enumerate(cuts):
        table, shot = [], None
        for i in range(chunks):
            shot = i if cut[i] and i else shot
            skipped = sum(cut[1 : i + 1]) * int(cfg.sample.rope_offset)
            positions[row, i] = i * cfg.model.chunk_frames + skipped
            see[row, i, table] = True
            if len(table) == size.slots:
                keep = set(range(size.sinks)) | ({shot} if size.shots else set())
                table.remove(next(c for c in table if c not in keep))
            table.append(i)
    return see, positions


class Oracle:
    """The loss of a rollout from the given draws, by the student's trained parameters."""

    def __init__(self, own, scripts, draws, g):
        self.goal, self.cfg = own.goal, own.goal.cfg
        self.given = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (scripts, draws, g))
        self.base = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), own.frozen.get("base"))
        self.see, self.positions = visible_chunks(self.cfg, np.asarray(scripts.cut))
        m = self.cfg.model
        self.velocity = jax.jit(functools.partial(dit.denoise, cfg=m))
        self.commit = jax.jit(functools.partial(dit.commit, cfg=m))
        self.text = jax.jit(functools.partial(dit.text_keys_values, cfg=m))
        self.layers = jax.jit(dit.layers)

    def loss(self, params):
        if self.base is not None:
            params = lora.attach(self.base["bf16"], params[LORA], self.cfg.distill.lora.scale)
        else:
            params = params[DIT]
        params, frozen = self.layers(params), jax.lax.stop_gradient(self.layers(params))
        scripts, draws, g = self.given
        batch, chunks, frames = draws.noise.shape[:3]
        tokens = frames * draws.noise[0, 0, 0, :, :, 0].size // dit.PATCH**2
        m, d = self.cfg.model, self.cfg.distill
        shape = (m.num_layers, batch, chunks, tokens, m.num_heads, m.head_dim)
        seen = Seen(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros((batch, chunks), bool))
        total, left = 0.0, []
        for i in range(chunks):
            positions = jnp.asarray(self.positions[:, i, None] + np.arange(frames, dtype=np.int32))
            seen = seen.replace(visible=jnp.asarray(self.see[:, i]))
            own_text = self.text(params, text=scripts.text[:, i])
            text = jax.lax.stop_gradient(own_text)
            x, x0, final = self.chunk(params, frozen, draws, i, positions, own_text, text, seen)
            total += 0.5 * jnp.sum((x0 - jax.lax.stop_gradient(x0 - g[:, i])) ** 2)
            left.append(jax.lax.stop_gradient((x, x0)))
            # The clean pass: its input is data; its keys and values have a gradient or none.
            own, of = (params, own_text) if d.gradient == "through" else (frozen, text)
            slot = jnp.full(batch, i, jnp.int32)
            seen = self.commit(
                own, latents=jax.lax.stop_gradient(final), positions=positions, text=of,
                cache=seen, slot=slot,
            )  # fmt: skip
        return total / g.size, tuple(jnp.stack(x, axis=1) for x in zip(*left))

    def chunk(self, params, frozen, draws, i, positions, own_text, text, seen):
        """Input and x0 of the exit step, which alone has a gradient; and the clean latents."""
        sample = self.cfg.sample
        sigmas, timesteps = schedule.sampling_schedule(sample.steps, self.cfg.video.shift)
        exits = schedule.sigma_at(timesteps, self.cfg.video.shift)
        table = unipc.weights(sigmas)
        x, history = draws.noise[:, i], unipc.History.start(draws.noise[:, i])
        left, past = int(draws.exit_step[i]), jax.lax.stop_gradient(seen)

        def velocity(params, x, step, text, seen):
            at = jnp.full(positions.shape, timesteps[step])
            return self.velocity(
                params, latents=x, timesteps=at, positions=positions, text=text, cache=seen
            )

        result = None
        for step in range(sample.steps):
            if step == left:
                x0 = x - exits[step] * velocity(params, x, step, own_text, seen)
                result = x, x0, x0
                if self.cfg.distill.context == "exit":
                    return result
            v = velocity(frozen, x, step, text, past)
            if sample.solver == "unipc":
                x, history = unipc.step(jnp.asarray(table[step]), x, v, history)
            elif step + 1 < sample.steps:
                following = exits[step + 1]
                fresh = draws.renoise[step][:, i]
                x = (1 - following) * (x - exits[step] * v) + following * fresh
            else:
                x = x - exits[step] * v
        assert result is not None
        return *result[:2], x


def drawn(own, exit_step, seed=0, length=None):
    cfg = own.goal.cfg
    chunks, m = cfg.distill.latent_frames // cfg.model.chunk_frames, cfg.model
    shape = (2, chunks, m.chunk_frames, 4, 4, m.in_dim)
    draw = np.random.default_rng(seed)
    noise, eps, g = (draw.standard_normal(shape).astype(np.float32) for _ in range(3))
    renoise = None
    if cfg.sample.solver == "x0_renoise":
        renoise = draw.standard_normal((cfg.sample.steps, *shape)).astype(np.float32)
    draws = dmd_parts.draws(
        cfg, own.goal.mesh, noise, eps, [[3], [700]], exit_step, length, renoise
    )
    text = draw.standard_normal((2, chunks, m.text_len, m.text_dim)).astype(np.float32)
    return dmd_parts.scripts(own.goal, text, CUTS[:, :chunks]), draws, jnp.asarray(g)


def shorter(x, chunks):
    """Of a rollout's arrays [batch, chunk, ...], its first chunks."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a)[:, :chunks]), x)


def check(cfg, exits, length=None):
    own = dmd_parts.Parts(*tiny_distill.begin(cfg))
    for seed, exit_step in enumerate(exits):
        scripts, draws, g = drawn(own, exit_step, seed, length)
        inputs = own.roll(scripts, draws)
        like = inputs.clip.x.sharding
        gradient, loss, values = own.gradient(STUDENT, inputs.replace(g=jax.device_put(g, like)))
        clip = inputs.clip
        if length is not None:  # the rest is not there, for the oracle
            scripts, clip, g = (shorter(x, length) for x in (scripts, clip, g))
            own_noise = draws.replace(noise=shorter(draws.noise, length))
            draws = own_noise.replace(exit_step=draws.exit_step[:length])
        oracle = Oracle(own, scripts, draws, g)
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), own.params[STUDENT])
        (value, (x, x0)), expected = jax.value_and_grad(oracle.loss, has_aux=True)(params)
        assert error(clip.x, x) <= 1e-5
        assert error(clip.x0, x0) <= 1e-5
        assert values["rollout_difference"] <= 1e-5 * float(jnp.abs(x0).max())
        np.testing.assert_allclose(loss, value, rtol=1e-5)
        np.testing.assert_array_equal(clip.position, oracle.positions)
        pairs = list(zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True))
        assert max(error(a, b) for a, b in pairs) <= 1e-5
    return own


@pytest.mark.slow  # test_dmd_run.py has such a rollout, test_dmd_golden.py such a gradient
def test_longer_than_the_window_with_sinks_cut_and_offset():
    """Whole networks, gradient stopped at the cache, an exit for all chunks and one for each."""
    cfg = tiny_distill.config(lora=tiny_distill.WHOLE, **LONG)
    size = cfg.sample.window(cfg.model)
    assert (size.chunks, size.sinks, size.shots) == (4, 1, 1)
    check(cfg, [1, [0, 1, 1, 0, 1, 0]])


@pytest.mark.slow
def test_gradient_through_the_cache_full_context_and_renoising():
    cfg = tiny_distill.config(
        gradient="through", context="final", exit="chunk", latent_frames=12,
        sample=dict(solver="x0_renoise", steps=3),
    )  # fmt: skip
    check(cfg, [[1, 0, 2]])


@pytest.mark.slow
def test_a_shorter_rollout_is_one_of_fewer_chunks():
    """Its loss is a mean over its own latents; what is behind it has no gradient."""
    check(tiny_distill.config(least_frames=4, **LONG), [1], length=5)
    check(tiny_distill.config(least_frames=4), [1], length=2)


@pytest.mark.slow
@pytest.mark.parametrize("length", [LONG, {}], ids=["long", "short"])
@pytest.mark.parametrize("context", ["exit", "final"])
@pytest.mark.parametrize("gradient", ["stop", "through"])
@pytest.mark.parametrize("solver", ["unipc", "x0_renoise"])
def test_every_combination(solver, gradient, context, length):
    lora_ = tiny_distill.ADAPTERS if context == "exit" else tiny_distill.WHOLE
    cfg = tiny_distill.config(
        gradient=gradient, context=context, lora=lora_, sample=dict(solver=solver, steps=3),
        **length,
    )  # fmt: skip
    chunks = cfg.distill.latent_frames // cfg.model.chunk_frames
    check(cfg, [2, [1, 0, 2, 2, 0, 1][:chunks]])


@pytest.mark.slow
def test_in_bfloat16_sampler_and_trainer_are_the_same_model():
    own = dmd_parts.Parts(*tiny_distill.begin(tiny_distill.config(dtype="bfloat16", **LONG)))
    scripts, draws, g = drawn(own, 1)
    inputs = own.roll(scripts, draws)
    *_, values = own.gradient(STUDENT, inputs.replace(g=jax.device_put(g, inputs.clip.x.sharding)))
    limit = 2e-2 * float(np.abs(inputs.clip.x0).max())
    assert 0 < values["rollout_difference"] <= limit
    assert CRITIC in own.params
