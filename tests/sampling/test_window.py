"""The visible past: what stays, what goes, where the next chunk comes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.sampling import window as window_lib
from tests.sampling.test_stream import SIZE, make_config, visible


@functools.partial(jax.jit, static_argnums=2)
def commit(window, cut, cfg):
    """The window after one more chunk, whose latents are its index."""
    window = window.enter_shot(cut, cfg)
    latents = jnp.broadcast_to(
        window.next_chunk[:, None, None, None, None], window.latents[:, 0].shape
    )
    slot = window.next_slot(cfg.sample.window(cfg.model))
    return window.commit(slot, latents, cfg)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.data())
def test_slots_hold_what_is_visible(data):
    sinks = data.draw(st.integers(0, 3))
    multi_shot = data.draw(st.booleans())
    slots = data.draw(st.integers(sinks + (multi_shot and sinks > 0) + 1, 8))
    cuts = data.draw(st.sets(st.integers(0, 24)))
    cfg = make_config(
        window_frames=8 * (slots + 1), sink_frames=8 * sinks, multi_shot_sink=multi_shot
    )
    window = window_lib.init(cfg, 1, *SIZE)
    assert window.chunk.shape == (1, slots)
    for chunk in range(26):
        table = np.asarray(window.chunk)[0]
        filled = table[table != window_lib.EMPTY]
        assert set(filled.tolist()) == visible(chunk, cuts, sinks, slots, multi_shot)
        assert np.asarray(window.valid)[0].tolist() == [True] * len(filled) + [False] * (
            slots - len(filled)
        )  # a prefix, for attention's key length
        window = commit(window, jnp.asarray([chunk in cuts]), cfg)


def test_what_a_slot_knows_of_its_chunk():
    cfg = make_config(window_frames=40, rope_offset=3.0)
    window = window_lib.init(cfg, 1, *SIZE)
    for chunk in range(9):
        window = commit(window, jnp.asarray([chunk in (0, 4)]), cfg)
    window = window.in_order()
    assert np.asarray(window.chunk)[0].tolist() == [0, 4, 7, 8]
    assert np.asarray(window.position)[0].tolist() == [0, 8 * 4 + 3, 8 * 7 + 3, 8 * 8 + 3]
    assert np.asarray(window.latents)[0, :, 0, 0, 0, 0].tolist() == [0, 4, 7, 8]
    assert [int(x[0]) for x in (window.next_chunk, window.shot, window.offset)] == [9, 4, 3]


def test_a_pinned_slot_stays():
    cfg = make_config(window_frames=40)
    window = window_lib.init(cfg, 2, *SIZE)
    for _ in range(3):
        window = commit(window, jnp.zeros(2, bool), cfg)
    window = window.replace(pinned=(window.chunk == 1) & jnp.asarray([[True], [False]]))
    for _ in range(7):
        window = commit(window, jnp.zeros(2, bool), cfg)
    window = window.in_order()
    assert np.asarray(window.chunk).tolist() == [[0, 1, 8, 9], [0, 7, 8, 9]]
    assert np.asarray(window.pinned).tolist() == [[False, True, False, False], [False] * 4]


def test_rows_have_counters_of_their_own():
    """A row that is older by five chunks evicts, cuts and counts as it would alone."""
    cfg = make_config(window_frames=40)
    old, young = (window_lib.init(cfg, 1, *SIZE) for _ in range(2))
    for chunk in range(5):
        old = commit(old, jnp.asarray([chunk == 3]), cfg)
    both = jax.tree.map(lambda *x: jnp.concatenate(x), old, young)
    for chunk in range(6):
        cut = [jnp.asarray([chunk == 1]), jnp.asarray([chunk in (0, 4)])]
        old, young = commit(old, cut[0], cfg), commit(young, cut[1], cfg)
        both = commit(both, jnp.concatenate(cut), cfg)
    jax.tree.map(
        lambda a, b, c: np.testing.assert_array_equal(np.concatenate([a, b]), c), old, young, both
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(st.data())
def test_references_and_landmarks_take_slots_of_the_window(data):
    """What else is visible is what a window of so many fewer slots has; no chunk goes to theirs."""
    sinks, references, landmarks = (data.draw(st.integers(0, 2)) for _ in range(3))
    given = data.draw(st.integers(0, references))
    multi_shot = data.draw(st.booleans())
    least = sinks + (multi_shot and sinks > 0) + 1
    slots = data.draw(st.integers(least, 6)) + references + landmarks
    cuts = data.draw(st.sets(st.integers(0, 16)))
    size = config_lib.WindowSize(
        slots + 1, sinks, int(multi_shot and sinks > 0), references, landmarks
    )
    assert size.chunks >= size.least and size.past_slots == slots - landmarks
    cfg = make_config(window_frames=96)
    window = window_lib.init(cfg, 1, *SIZE)
    table = jnp.full((1, slots), window_lib.EMPTY, jnp.int32)
    window = window.replace(
        chunk=table, position=table, pinned=table > 0, latents=jnp.zeros((1, slots, 8, 1, 1, 1))
    ).with_references(given)
    ours = list(range(-given - 1, -1))
    for chunk in range(17):
        found = np.asarray(window.chunk)[0]
        past = visible(chunk, cuts, sinks, slots - landmarks - given, multi_shot)
        assert sorted(found[: size.past_slots][found[: size.past_slots] != -1]) == sorted(
            [*ours, *past]
        )
        assert (found[size.past_slots :] == window_lib.EMPTY).all()
        lasting = np.asarray(window.lasting(size))[0]
        assert found[lasting].tolist() == [*ours, *range(min(sinks, chunk))]
        window = window.enter_shot(jnp.asarray([chunk in cuts]), cfg)
        window = window.commit(window.next_slot(size), window.latents[:, 0], cfg)
