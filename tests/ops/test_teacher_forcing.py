"""Teacher-forcing attention against one masked softmax over the whole sequence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.ops import cudnn, dense_attention
from longlive_jax.ops import teacher_forcing as tf

TOKENS, HEADS, HEAD_DIM = 3, 2, 8
QUICK = {"xla_backend_optimization_level": 0}  # compiling is most of what these tests do
SIZES = (1, 2, 3, 5, 6, 7, 8, 12)


def allowed(chunks, copies, tokens):
    """bool [query, key]: the mask of the paper, tokens in [chunk, copy, token] order."""
    chunk, copy, _ = np.meshgrid(
        np.arange(chunks), np.arange(copies), np.arange(tokens), indexing="ij"
    )
    chunk, copy = chunk.ravel(), copy.ravel()
    earlier_clean = (chunk[None, :] < chunk[:, None]) & (copy[None, :] == 0)
    return earlier_clean | ((chunk[None, :] == chunk[:, None]) & (copy[None, :] == copy[:, None]))


def oracle(q, k, v):
    """Masked softmax over q, k, v [batch, chunk, copy, token, head, head_dim] laid end to end."""
    batch, chunks, copies, tokens, heads, head_dim = q.shape
    mask = jnp.asarray(allowed(chunks, copies, tokens))[None, None]
    q, k, v = (x.reshape(batch, -1, heads, head_dim) for x in (q, k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(jnp.float32(head_dim))
    weights = jax.nn.softmax(jnp.where(mask, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(
        batch, chunks, copies, tokens, heads, head_dim
    )


def draw(chunks, copies=2, batch=2, tokens=TOKENS, heads=HEADS, dtype=jnp.float32, seed=0):
    """q, k, v and a cotangent."""
    shape = (batch, chunks, copies, tokens, heads, HEAD_DIM)
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))


def out_and_gradients(attention):
    """(q, k, v, dout) -> (out, dq, dk, dv), compiled."""

    @functools.partial(jax.jit, compiler_options=QUICK)
    def run(q, k, v, dout):
        out, vjp = jax.vjp(attention, q, k, v)
        return out, *vjp(dout)

    return run


expected = out_and_gradients(oracle)
actual = out_and_gradients(tf.teacher_forcing)


def relative(x, reference):
    x, reference = np.asarray(x, np.float32), np.asarray(reference, np.float32)
    return np.linalg.norm(x - reference) / np.linalg.norm(reference)


@settings(deadline=None)
@given(st.integers(1, 200))
def test_schedule_covers_each_allowed_pair_once(chunks):
    seen = np.zeros((chunks, chunks), int)
    calls = tf.schedule(chunks)
    for call in calls:
        for c in range(call.count):
            start = call.first + c * (call.keys + call.queries)
            middle, stop = start + call.keys, start + call.keys + call.queries
            assert stop <= chunks
            seen[middle:stop, start:middle] += 1
    np.testing.assert_array_equal(seen, np.tril(np.ones_like(seen), -1))
    # Each rectangle has two queries (clean, noisy) a chunk; the diagonal is 2 pairs a chunk.
    pairs = 2 * chunks + 2 * sum(call.count * call.keys * call.queries for call in calls)
    assert pairs == chunks**2 + chunks
    assert len(calls) <= 2 * np.log2(chunks)


@pytest.mark.parametrize("chunks, calls", [(1, 0), (2, 1), (12, 4), (16, 4), (48, 6), (64, 6)])
def test_schedule_is_short(chunks, calls):
    assert len(tf.schedule(chunks)) == calls


@pytest.mark.parametrize("chunks", SIZES)
def test_teacher_forcing_equals_the_masked_softmax(chunks):
    args = draw(chunks)
    for name, x, reference in zip(("out", "dq", "dk", "dv"), actual(*args), expected(*args)):
        np.testing.assert_allclose(x, reference, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("chunks", (1, 5))
def test_block_causal_equals_the_masked_softmax(chunks):
    args = draw(chunks, copies=1)
    run = out_and_gradients(tf.block_causal)
    for x, reference in zip(run(*(x[:, :, 0] for x in args)), expected(*args)):
        np.testing.assert_allclose(x, reference[:, :, 0], rtol=1e-5, atol=1e-5)


def test_clean_half_is_block_causal():
    q, k, v, dout = draw(7)
    clean = jax.jit(tf.block_causal, compiler_options=QUICK)(*(x[:, :, 0] for x in (q, k, v)))
    both, *_ = actual(q, k, v, dout)
    np.testing.assert_allclose(both[:, :, 0], clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunks", (6, 7))
def test_nan_reaches_only_those_who_may_see_it(chunks):
    """Forward along the mask, backward against it."""
    q, k, v, dout = (np.asarray(x) for x in draw(chunks))
    mask = allowed(chunks, 2, 1)

    def poisoned(x, place):
        x = x.copy()
        x[:, *place] = np.nan
        return x

    def reached(x):
        return np.isnan(x).any((0, 3, 4, 5)).ravel()

    for index, place in enumerate(np.ndindex(chunks, 2)):
        out, dq, _, _ = actual(q, poisoned(k, place), poisoned(v, place), dout)
        np.testing.assert_array_equal(reached(out), mask[:, index])
        np.testing.assert_array_equal(reached(dq), mask[:, index])

        _, dq, dk, dv = actual(q, k, v, poisoned(dout, place))
        np.testing.assert_array_equal(reached(dk), mask[index])
        np.testing.assert_array_equal(reached(dv), mask[index])
        np.testing.assert_array_equal(np.flatnonzero(reached(dq)), [index])


def test_large_logits_do_not_overflow():
    q, k, v, dout = draw(5)
    q, k = 10 * q, 10 * k  # logits of about 300, where exp overflows at 88
    for x, reference in zip(actual(q, k, v, dout), expected(q, k, v, dout)):
        assert relative(x, reference) < 1e-3  # one rounding of such a logit is 3e-5


@pytest.mark.parametrize("dtype, limit", [(jnp.bfloat16, 1e-2), (jnp.float16, 2e-3)])
def test_half_precision(dtype, limit):
    args = draw(6, dtype=dtype)
    exact = expected(*(x.astype(jnp.float32) for x in args))
    for x, reference in zip(actual(*args), exact):
        assert x.dtype == dtype
        assert relative(x, reference) < limit


def test_queries_in_pieces_equal_all_at_once(monkeypatch):
    """The diagonal's 3 tokens go in pieces of 2, the last one padded; the 2 x 4 chunks halve."""
    args = draw(6)
    whole = actual(*args)
    monkeypatch.setattr(dense_attention, "_LOGITS", 300)
    for x, reference in zip(out_and_gradients(tf.teacher_forcing)(*args), whole):
        np.testing.assert_allclose(x, reference, rtol=1e-5, atol=1e-5)


def test_no_logit_matrix_passes_the_limit(monkeypatch):
    monkeypatch.setattr(dense_attention, "_LOGITS", 1000)
    q = jax.ShapeDtypeStruct((1, 8, 2, 4, 1, 2), jnp.float32)
    grad = jax.grad(lambda q, k, v: tf.teacher_forcing(q, k, v).sum(), (0, 1, 2))
    sizes = [v.aval.size for eqn in equations(jax.make_jaxpr(grad)(q, q, q)) for v in eqn.outvars]
    assert max(sizes) <= 1000


@pytest.mark.parametrize("pieces", (False, True))
def test_shard_map_over_heads(monkeypatch, pieces):
    """Fully manual over an Explicit mesh, with checked types, as the model calls it."""
    if pieces:
        monkeypatch.setattr(dense_attention, "_LOGITS", 300)
    args = draw(6, heads=4)
    whole = expected(*args)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=2, fsdp=1, seq=4))
    spec = P("data", None, None, None, "seq", None)
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(
            tf.teacher_forcing, in_specs=(spec,) * 3, out_specs=spec, check_vma=True
        )
        args = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in args]
        results = out_and_gradients(sharded)(*args)
    for x, reference in zip(results, whole):
        assert x.sharding.spec == spec
        np.testing.assert_allclose(x, reference, rtol=1e-5, atol=1e-5)


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def layers(attention, policy):
    """A loss over three attention layers: scan over jax.checkpoint, as in the model."""

    @functools.partial(jax.checkpoint, policy=policy, prevent_cse=False)
    def layer(x, weight):
        return x + attention(x * weight, x, jnp.tanh(x)), None

    def loss(x, weights):
        return jnp.sum(jnp.square(jax.lax.scan(layer, x, weights)[0]))

    return loss


SAVE = jax.checkpoint_policies.save_only_these_names(tf.OUT, tf.LSE)


@pytest.mark.parametrize("policy", (None, SAVE), ids=("recompute", "save"))
def test_remat_and_scan(policy):
    x, weights = draw(6)[0], jnp.asarray([0.5, 1.0, 1.5])
    reference = jax.jit(jax.grad(layers(oracle, None), (0, 1)), compiler_options=QUICK)(x, weights)
    got = jax.jit(jax.grad(layers(tf.teacher_forcing, policy), (0, 1)), compiler_options=QUICK)(
        x, weights
    )
    for a, b in zip(got, reference):
        assert relative(a, b) < 1e-5


def test_saved_names_spare_the_second_forward():
    x, weights = draw(6)[0], jnp.ones(3)

    def products(policy):
        loss = layers(tf.teacher_forcing, policy)
        jaxpr = jax.make_jaxpr(jax.grad(loss))(x, weights)
        return sum(eqn.primitive.name == "dot_general" for eqn in equations(jaxpr.jaxpr))

    # Per piece: 2 products forward, 5 and one for D backward; the diagonal and 3 rectangles.
    pieces = 1 + len(tf.schedule(6))
    assert products(SAVE) == pieces * (2 + 6)
    assert products(None) == pieces * (2 + 2 + 6)


def test_wrong_shapes_are_refused():
    x = jnp.zeros((1, 2, 3, 4, 1, 8))
    with pytest.raises(ValueError, match=r"\[batch, chunk, 2, token.*\(1, 2, 3, 4, 1, 8\)"):
        tf.teacher_forcing(x, x, x)
    with pytest.raises(ValueError, match=r"\[batch, chunk, token, head, head_dim\]"):
        tf.block_causal(x, x, x)
    with pytest.raises(ValueError, match=r"'flash'; choose one of xla, cudnn"):
        tf.teacher_forcing(x[:, :, :2], x[:, :, :2], x[:, :, :2], backend="flash")


def test_cudnn_lowers_for_cuda():
    """No GPU here, but the calls that one would run can be written down and counted."""
    x = jax.ShapeDtypeStruct((1, 6, 2, 256, 4, 128), jnp.bfloat16)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(data=1, fsdp=1, seq=4))
    spec = P(None, None, None, None, "seq", None)
    attend = functools.partial(tf.teacher_forcing, backend="cudnn")
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(attend, in_specs=(spec,) * 3, out_specs=spec, check_vma=True)
        run = jax.jit(lambda *xs: jax.vjp(sharded, *xs[:3])[1](xs[3]))
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))
        text = run.trace(*[shape] * 4).lower(lowering_platforms=("cuda",)).as_text()
    pieces = 1 + len(tf.schedule(6))
    assert text.count("__cudnn$fmhaSoftmax(") == pieces
    assert text.count("__cudnn$fmhaSoftmaxBackward(") == pieces


def test_cudnn_is_not_chosen_without_a_gpu():
    q = jax.ShapeDtypeStruct((1, 2, 2, 128), jnp.bfloat16)
    assert not cudnn.supports(q)
    assert dense_attention.choose_backend(q) == "xla"
