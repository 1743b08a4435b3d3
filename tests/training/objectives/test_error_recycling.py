"""Error recycling against lists of arrays on the host, on every mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization, traverse_util

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.config import ErrorRecycling
from longlive_jax.training.objectives import error_recycling
from longlive_jax.training.objectives.error_recycling import Chunks

BATCH, CHUNKS = 2, 4
SHAPE = (2, 2, 2, 2)  # 16 elements: every mesh below divides them
MESHES = {
    "1": config_lib.Mesh(),
    "seq=4": config_lib.Mesh(seq=4),
    "data=2 x seq=2": config_lib.Mesh(data=2, seq=2),
    "fsdp=2 x seq=4": config_lib.Mesh(fsdp=2, seq=4),
}
CFG = ErrorRecycling(
    enabled=True,
    buckets=3,
    slots=4,
    noise_probability=0.6,
    clean_probability=0.3,
    clean_update_probability=0.4,
)


# ---------------------------------------------------------------------------------------------
# The oracle: section by section what the method says, with Python lists.


class Oracle:
    def __init__(self, cfg, chunks=CHUNKS):
        self.cfg = cfg
        cells = [(p, b) for p in range(chunks if cfg.positions else 1) for b in range(cfg.buckets)]
        self.latent = {cell: [] for cell in cells}
        self.noise = {cell: [] for cell in cells}
        self.added = {"latent": dict.fromkeys(cells, 0), "noise": dict.fromkeys(cells, 0)}

    def cell(self, chunk, timestep_index):
        width = 1000 / self.cfg.buckets
        return (chunk if self.cfg.positions else 0), min(
            int(timestep_index / width), self.cfg.buckets - 1
        )

    def inject(self, key, step, rows, timestep_index, clean, noise, past):
        cfg, (noise, clean, past) = self.cfg, (x.copy() for x in (noise, clean, past))
        ready = step >= cfg.start_step
        gates = uniform(key, (5,), rows[0], 2**31 - 1, 16)
        alone = ready and gates[0] < cfg.clean_probability
        counts = dict.fromkeys(("noise", "latent", "context"), 0)

        def add(x, kind, number, buffer, probability, entries_of):
            if not ready or alone or not gates[2 + number] < probability:
                return
            for b, row in enumerate(rows):
                for c in range(timestep_index.shape[1]):
                    entries = entries_of(buffer, c, timestep_index[b, c])
                    if not entries:
                        continue
                    which, scale = uniform(key, (3, 2), row, c, 17)[number]
                    scale = 1 - cfg.modulation + 2 * cfg.modulation * scale
                    error = entries[int(which * len(entries))].astype(np.float32)
                    x[b, c] += np.float32(scale) * error
                    counts[kind] += 1

        def own(buffer, chunk, timestep_index):
            return buffer[self.cell(chunk, timestep_index)]

        def anywhere(buffer, chunk, timestep_index):
            if cfg.skip_first_chunk and chunk == 0:
                return []
            position = self.cell(chunk, timestep_index)[0]
            return [e for b in range(cfg.buckets) for e in buffer[position, b]]

        add(noise, "noise", 0, self.noise, cfg.noise_probability, own)
        add(clean, "latent", 1, self.latent, cfg.latent_probability, own)
        add(past, "context", 2, self.latent, cfg.context_probability, anywhere)
        kept = not alone or gates[1] < cfg.clean_update_probability
        return noise, clean, past, kept, counts

    def store(self, key, rows, timestep_index, kept, latent_error, noise_error):
        for b, row in enumerate(rows):
            for c in range(timestep_index.shape[1]):
                if kept:
                    cell = self.cell(c, timestep_index[b, c])
                    draws = uniform(key, (2,), row, c, 18)
                    self.put("latent", cell, latent_error[b, c], draws[0])
                    self.put("noise", cell, noise_error[b, c], draws[1])

    def put(self, kind, cell, error, draw):
        entries, error = getattr(self, kind)[cell], error.astype(ml_dtypes.bfloat16)
        count = self.added[kind][cell]
        self.added[kind][cell] += 1
        if count < self.cfg.slots:
            entries.append(error)
            return
        victim = {
            "random": lambda: int(draw * self.cfg.slots),
            "oldest": lambda: count % self.cfg.slots,
            "nearest": lambda: int(np.argmin([distance(e, error) for e in entries])),
        }[self.cfg.replacement]()
        entries[victim] = error


@functools.partial(jax.jit, static_argnums=1)
def _uniform(key, shape, numbers):
    for i in range(3):
        key = jax.random.fold_in(key, numbers[i])
    return jax.random.uniform(key, shape)


def uniform(key, shape, row, chunk, use):
    return np.asarray(_uniform(key, shape, np.array([row, chunk, use], np.int32)), np.float64)


def distance(a, b):
    return np.sum((a.astype(np.float32) - b.astype(np.float32)) ** 2)


# ---------------------------------------------------------------------------------------------
# Runs of several batches.


def batches(count, seed=0, entries=1000):
    """Host arrays of `count` batches; the "errors" of a forward pass are just noise of their own."""
    rng = np.random.default_rng(seed)
    for step in range(count):
        normal = lambda: rng.normal(size=(BATCH, CHUNKS, *SHAPE)).astype(np.float32)  # noqa: E731
        yield {
            "key": jax.random.fold_in(jax.random.key(seed), step),
            "step": step,
            "rows": np.arange(BATCH, dtype=np.int32) + 4,
            "timestep_index": rng.integers(0, entries, (BATCH, CHUNKS)).astype(np.int32),
            "videos": tuple(normal() for _ in range(5)),
        }


def place(batch, mesh):
    """The arrays of a batch as a trainer has them: sharded."""

    def put(x, *axes):
        return jax.device_put(x, mesh_lib.sharding(mesh, axes))

    video = ("batch", "chunk", None, None, None, None)
    return batch | {
        "step": put(np.int32(batch["step"])),
        "rows": put(batch["rows"], "batch"),
        "timestep_index": put(batch["timestep_index"], "batch", "chunk"),
        "videos": tuple(put(x, *video) for x in batch["videos"]),
    }


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train(cfg, errors, key, step, rows, timestep_index, videos):
    clean, noise, past, latent_error, noise_error = videos
    chunks = Chunks(key, rows, timestep_index)
    injected = error_recycling.inject(
        cfg, errors, chunks, step, clean=clean, noise=noise, past=past
    )
    errors = error_recycling.store(
        cfg, errors, chunks, injected.kept, latent_error=latent_error, noise_error=noise_error
    )
    return errors, injected, error_recycling.metrics(errors) | injected.counts


def named(**counts):
    """Counts by the names that the log has for them."""
    return {f"recycling_{name}_errors_injected": count for name, count in counts.items()}


NOISE, LATENT, CONTEXT = named(noise=0, latent=0, context=0)


def empty(cfg, chunks, shape, mesh):
    """Rings without errors, which `Objective.init_carried` makes in a run."""
    like = error_recycling.abstract(cfg, chunks, shape, mesh)
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)


def run(cfg, mesh, data):
    """The state after all batches, and what each of them was turned into."""
    errors, seen = empty(cfg, CHUNKS, SHAPE, mesh), []
    for batch in data:
        errors, injected, metrics = train(cfg, errors, *place(batch, mesh).values())
        seen.append(jax.device_get((injected, metrics)))
    return errors, seen


def one_device():
    return mesh_lib.make_mesh(config_lib.Mesh())


def assert_ring(ring, oracle, kind):
    entries, added = jax.device_get((ring.entries, ring.added))
    for cell, expected in getattr(oracle, kind).items():
        assert added[cell] == oracle.added[kind][cell]
        for slot in range(entries.shape[2]):
            held = (
                expected[slot].reshape(-1) if slot < len(expected) else np.zeros(entries.shape[3])
            )
            np.testing.assert_array_equal(entries[cell][slot].astype(np.float32), held)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"positions": True, "slots": 2},
        {"replacement": "oldest", "start_step": 3, "buckets": 7},
        {"replacement": "nearest", "skip_first_chunk": True},
    ],
    ids=str,
)
def test_equals_lists_on_the_host(changes):
    cfg = dataclasses.replace(CFG, **changes)
    oracle, data = Oracle(cfg), list(batches(8))
    errors, seen = run(cfg, one_device(), data)
    for batch, (injected, metrics) in zip(data, seen, strict=True):
        clean, noise, past, latent_error, noise_error = batch["videos"]
        fixed = [batch[name] for name in ("key", "rows", "timestep_index")]
        expected = oracle.inject(fixed[0], batch["step"], *fixed[1:], clean, noise, past)
        for ours, theirs in zip((injected.noise, injected.clean, injected.past), expected):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
        assert injected.kept == expected[3]
        assert injected.counts == named(**expected[4])
        oracle.store(*fixed, expected[3], latent_error, noise_error)
        assert metrics["recycling_latent_errors_added"] == sum(oracle.added["latent"].values())
        assert metrics["recycling_noise_errors_held"] == sum(map(len, oracle.noise.values()))
    assert any(injected.counts[CONTEXT] for injected, _ in seen)
    assert max(oracle.added["latent"].values()) > cfg.slots  # full rings were seen
    assert_ring(errors.latent, oracle, "latent")
    assert_ring(errors.noise, oracle, "noise")


@pytest.mark.parametrize(
    "name, changes",
    [
        ("seq=4", {}),
        ("data=2 x seq=2", {"positions": True, "slots": 2}),
        ("fsdp=2 x seq=4", {}),
        ("fsdp=2 x seq=4", {"replacement": "nearest", "skip_first_chunk": True}),
    ],
)
def test_is_the_same_on_every_mesh(name, changes):
    assert_same_on(MESHES[name], dataclasses.replace(CFG, **changes), list(batches(5)))


def assert_same_on(mesh_config, cfg, data):
    expected = run(cfg, one_device(), data)
    mesh = mesh_lib.make_mesh(mesh_config)
    found = run(cfg, mesh, data)
    for a, b in zip(jax.tree.leaves(expected[1]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)
    for a, b in zip(jax.tree.leaves(expected[0]), jax.tree.leaves(found[0]), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    return found[0]


def test_errors_that_the_mesh_does_not_divide(monkeypatch):
    """6 elements: `seq`, of size 4, does not divide them and holds copies; `data` does."""
    monkeypatch.setitem(globals(), "SHAPE", (3, 1, 1, 2))
    errors = assert_same_on(config_lib.Mesh(data=2, seq=4), CFG, list(batches(3)))
    assert {shard.data.shape[3] for shard in errors.latent.entries.addressable_shards} == {3}


def test_inside_a_scan_over_batches():
    """Donated, as the carry of a scan over a step's batches, with an unchanged sharding."""
    mesh = mesh_lib.make_mesh(MESHES["fsdp=2 x seq=4"])
    data = [place(batch, mesh) for batch in batches(3)]
    expected, _ = run(CFG, mesh, list(batches(3)))

    def step(errors, keys, steps, rows, timestep_index, videos):
        def body(errors, x):
            errors, injected, _ = train.__wrapped__(CFG, errors, *x)
            return errors, injected.counts

        errors, counts = jax.lax.scan(body, errors, (keys, steps, rows, timestep_index, videos))
        return errors, jax.tree.map(jnp.sum, counts)

    stacked = {
        name: jax.tree.map(lambda *x: jnp.stack(x), *(batch[name] for batch in data))
        for name in data[0]
    }
    errors = empty(CFG, CHUNKS, SHAPE, mesh)
    before = errors.latent.entries.sharding
    found, counts = jax.jit(step, donate_argnums=0)(errors, *stacked.values())
    assert errors.latent.entries.is_deleted()
    assert found.latent.entries.sharding == before
    assert counts[LATENT] > 0
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


# ---------------------------------------------------------------------------------------------
# Rules one by one.

ALWAYS = dataclasses.replace(
    CFG,
    noise_probability=1.0,
    latent_probability=1.0,
    context_probability=1.0,
    clean_probability=0.0,
)


def test_empty_buckets_give_nothing_and_count_nothing():
    """Entry 0 fills bucket 0 alone; then entries of bucket 2 find errors for the past only."""
    first, second = batches(2, entries=1)
    second["timestep_index"] = np.full((BATCH, CHUNKS), 999, np.int32)
    second["timestep_index"][0, 0] = 0
    _, ((before, _), (after, metrics)) = run(ALWAYS, one_device(), [first, second])
    clean, noise, past, *_ = first["videos"]
    for ours, given in zip((before.clean, before.noise, before.past), (clean, noise, past)):
        np.testing.assert_array_equal(ours, given)
    assert before.counts == named(noise=0, latent=0, context=0)
    assert after.counts == named(noise=1, latent=1, context=8)
    changed = np.any(after.clean != second["videos"][0], axis=(2, 3, 4, 5))
    np.testing.assert_array_equal(changed, second["timestep_index"] == 0)
    assert (
        metrics["recycling_latent_errors_injected"] == 1
        and metrics["recycling_context_errors_injected"] == 8
    )


def test_padding_and_errors_that_are_not_finite_are_left_out():
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=2))
    (batch,) = batches(1)
    batch["videos"][3][0, 1, 0, 0, 0, 0] = np.nan
    batch["videos"][4][0, 2, 1, 1, 1, 1] = 3.4e38  # infinite in bfloat16
    batch = place(batch, mesh)
    valid = np.arange(CHUNKS)[None] < [[4], [1]]
    valid = jax.device_put(valid, mesh_lib.sharding(mesh, ("batch", "chunk")))
    latent_error, noise_error = batch["videos"][3:]
    errors = jax.jit(error_recycling.store, static_argnums=0)(
        CFG,
        empty(CFG, CHUNKS, SHAPE, mesh),
        Chunks(*(batch[name] for name in ("key", "rows", "timestep_index"))),
        jnp.bool_(True) & valid,
        latent_error=latent_error,
        noise_error=noise_error,
    )
    assert errors.latent.added.sum() == errors.noise.added.sum() == 3
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(errors))


def test_gates_open_as_often_as_they_should():
    """4000 batches of one chunk with full rings, the first 500 of them before `start_step`."""
    early, count = 500, 4000
    cfg = dataclasses.replace(CFG, buckets=1, slots=1, start_step=5)
    full = empty(cfg, 1, (1, 1, 1, 1), one_device())
    full = jax.tree.map(lambda x: jnp.ones_like(x), full)
    video, zeros = jnp.zeros((1, 1, 1, 1, 1, 1)), jnp.zeros((1, 1), jnp.int32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def gates(full, number):
        step = jnp.where(number < early, 4, 5)
        key = jax.random.fold_in(jax.random.key(1), number)
        x = error_recycling.inject(
            cfg, full, Chunks(key, zeros[0], zeros), step, clean=video, noise=video, past=video
        )
        return x.counts, x.kept, x.clean.ravel()[0]

    counts, kept, clean = jax.device_get(gates(full, jnp.arange(count)))
    assert kept[:early].all() and not np.any(counts[LATENT][:early] + counts[CONTEXT][:early])
    counts, kept, clean = jax.tree.map(lambda x: x[early:], (counts, kept, clean))
    live = 1 - cfg.clean_probability
    for opened, share in [
        (counts[NOISE], live * cfg.noise_probability),
        (counts[LATENT], live * cfg.latent_probability),
        (counts[CONTEXT], live * cfg.context_probability),
        (kept, live + cfg.clean_probability * cfg.clean_update_probability),
    ]:
        assert abs(opened.mean() - share) < 4 * 0.5 / np.sqrt(count - early)
    assert not np.any(~kept & (sum(counts.values()) > 0))
    scales = clean[counts[LATENT] > 0]
    assert 0.7 <= scales.min() < 0.71 and 1.29 < scales.max() <= 1.3
    assert abs(scales.mean() - 1) < 0.02


def test_the_noise_table_falls_into_buckets_of_equal_width():
    for buckets in (1, 3, 40, 50, 1000):
        cfg = dataclasses.replace(CFG, buckets=buckets)
        timestep_index = jnp.arange(1000, dtype=jnp.int32)[None]
        position, bucket = error_recycling._cells(cfg, timestep_index)
        np.testing.assert_array_equal(bucket[0], [i * buckets // 1000 for i in range(1000)])
        assert not position.any()


def test_any_entry_is_drawn_as_often_as_another():
    held = np.array([0, 3, 0, 1, 4], np.int32)
    draws = jax.random.uniform(jax.random.key(0), (1, 8000))
    everywhere = jnp.broadcast_to(held[None, None], (1, 8000, 5))
    pick = jax.jit(error_recycling._pick)
    bucket, slot, found = pick(everywhere, draws)
    pairs, times = np.unique(np.stack([bucket[0], slot[0]], 1), axis=0, return_counts=True)
    expected = [(1, 0), (1, 1), (1, 2), (3, 0), (4, 0), (4, 1), (4, 2), (4, 3)]
    assert [tuple(pair) for pair in pairs] == expected
    assert found.all() and np.all(abs(times - 1000) < 150)
    last = np.nextafter(np.float32(1), np.float32(0))
    bucket, slot, _ = pick(everywhere, jnp.full_like(draws, last))
    assert (bucket[0, 0], slot[0, 0]) == (4, 3)
    assert not pick(jnp.zeros_like(everywhere), draws)[2].any()


# ---------------------------------------------------------------------------------------------
# Memory and files.


def test_a_checkpoint_moves_to_another_mesh():
    """A flat dict of arrays and back, from 8 devices to 4."""
    errors, _ = run(CFG, mesh_lib.make_mesh(MESHES["fsdp=2 x seq=4"]), batches(2))
    flat = traverse_util.flatten_dict(serialization.to_state_dict(errors), sep="/")
    assert set(flat) == {f"{a}/{b}" for a in ("latent", "noise") for b in ("entries", "added")}
    files = {name: np.asarray(x) for name, x in flat.items()}
    like = error_recycling.abstract(CFG, CHUNKS, SHAPE, mesh_lib.make_mesh(MESHES["seq=4"]))
    tree = serialization.from_state_dict(like, traverse_util.unflatten_dict(files, sep="/"))
    back = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), tree, like)
    for a, b, s in zip(jax.tree.leaves(errors), jax.tree.leaves(back), jax.tree.leaves(like)):
        np.testing.assert_array_equal(a, b)
        assert (b.shape, b.dtype, b.sharding) == (s.shape, s.dtype, s.sharding)


def test_full_size_on_four_devices():
    """Nothing is allocated: 2 rings of 50 buckets x 16 errors, a quarter of each on each device."""
    cfg = ErrorRecycling(enabled=True)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(seq=4))
    shape, chunks = (8, 44, 80, 48), 12
    errors = error_recycling.abstract(cfg, chunks, shape, mesh)
    ring = 50 * 16 * 8 * 44 * 80 * 48 * 2
    (shard,) = {errors.latent.entries.sharding.shard_shape(errors.latent.entries.shape)}
    assert 2 * np.prod(shard) == ring // 4 == 540_672_000

    def struct(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=mesh_lib.sharding(mesh, axes))

    def step(errors, key, step, rows, timestep_index, clean, noise):
        chunks = Chunks(key, rows, timestep_index)
        x = error_recycling.inject(cfg, errors, chunks, step, clean=clean, noise=noise, past=clean)
        # As in training, what is stored depends on what was injected, so the rings need no copy.
        errors = error_recycling.store(
            cfg, errors, chunks, x.kept, latent_error=x.clean - x.past, noise_error=x.noise - noise
        )
        return errors, x.counts

    video = struct((1, chunks, *shape), jnp.float32, "batch", "chunk", None, None, None, None)
    arguments = (
        jax.eval_shape(lambda: jax.random.key(0)),
        struct((), jnp.int32),
        struct((1,), jnp.int32, "batch"),
        struct((1, chunks), jnp.int32, "batch", "chunk"),
    )
    lowered = jax.jit(step, donate_argnums=0).lower(errors, *arguments, video, video)
    memory = lowered.compile().memory_analysis()
    rings, videos = 2 * (ring // 4 + 4 * cfg.buckets), chunks // 4 * 8 * 44 * 80 * 48 * 4
    assert memory.alias_size_in_bytes == rings
    assert rings + 2 * videos <= memory.argument_size_in_bytes < rings + 2 * videos + 10_000
    assert memory.temp_size_in_bytes < 6 * videos < ring // 4  # no copy of a ring
