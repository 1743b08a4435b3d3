"""Teacher forcing of videos longer than the window, against one masked softmax over all of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.ops.teacher_forcing import teacher_forcing
from longlive_jax.ops.windowed import windowed_teacher_forcing
from tests.ops.test_teacher_forcing import HEAD_DIM, QUICK, draw, out_and_gradients

CHUNKS, SLOTS = 7, 3
# Which chunks are visible to each: without a cut, and with one at chunk 4, whose first chunk stays.
# The rows that are not read have nonsense.
TABLES = np.array(
    [
        [[-1] * 3, [0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]],
        [[-1] * 3, [9, -1, -1], [5, 1, -1], [6, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]],
    ],
    np.int32,
)
TABLES[1, 6] = [5, 0, 4]  # in any order


def masked(q, k, v, tables):
    """All chunks and copies laid end to end, one softmax a query."""
    batch, chunks, copies, tokens = q.shape[:4]
    seen = np.zeros((batch, chunks, copies, chunks, copies), bool)
    for row in range(batch):
        for i in range(chunks):
            past = range(i) if i <= tables.shape[-1] else tables[row, i]
            for copy in range(copies):
                seen[row, i, copy, list(past), 0] = True
                seen[row, i, copy, i, copy] = True
    seen = seen.reshape(batch, chunks * copies, -1).repeat(tokens, 1).repeat(tokens, 2)
    q, k, v = (x.reshape(batch, -1, *x.shape[4:]) for x in (q, k, v))
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / jnp.sqrt(jnp.float32(HEAD_DIM))
    weights = jax.nn.softmax(jnp.where(jnp.asarray(seen)[:, None], logits, -jnp.inf), axis=-1)
    out = jnp.einsum("bhts,bshd->bthd", weights, v)
    return out.reshape(batch, chunks, copies, tokens, *out.shape[2:])


@pytest.mark.parametrize("chunks", [CHUNKS, SLOTS + 1], ids=["longer", "as long"])
def test_out_and_gradients_are_the_masked_oracles(chunks):
    tables = TABLES[:, :chunks]
    given = draw(chunks)
    ours = functools.partial(windowed_teacher_forcing, visible=jnp.asarray(tables))
    got = out_and_gradients(ours)(*given)
    expected = out_and_gradients(functools.partial(masked, tables=tables))(*given)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_window_is_not_all_of_the_past():
    q, k, v, _ = draw(CHUNKS)
    run = functools.partial(jax.jit, compiler_options=QUICK)
    some = run(windowed_teacher_forcing)(q, k, v, jnp.asarray(TABLES))
    every = run(teacher_forcing)(q, k, v)
    np.testing.assert_allclose(some[:, : SLOTS + 1], every[:, : SLOTS + 1], rtol=1e-5, atol=1e-6)
    assert np.all(np.abs(some - every)[:, SLOTS + 1 :].max(axis=(3, 4, 5)) > 1e-3)
