"""References and landmarks: what is put into their slots is seen, and nothing else changes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.worlds import poses as poses_lib
from longlive_jax.errors import InputError
from longlive_jax.sampling import draws, landmarks, memory
from longlive_jax.sampling.memory import Kept
from longlive_jax.sampling.session import Session
from tests.sampling import test_session, test_stream

RATE, FRAMES = 24, 2  # of a chunk
FIELDS = dict(landmarks=1, distance=6.0, angle=30.0, speed=1.0, glide=0.0)
# Ahead 16 pictures and back: with a chunk of 8 pictures, chunk 6 begins where chunk 1 was.
LINE = "w*24, s*24, still"


@functools.cache
def config(window=8, sink=2, actions=True, **fields):
    own = config_lib.Actions(kind="token" if actions else "none", keyboard_dim=4, mouse_dim=2)
    model = dataclasses.replace(test_stream.MODEL, chunk_frames=FRAMES, actions=own)
    sample = config_lib.Sample(
        steps=2, window_frames=window, sink_frames=sink, multi_shot_sink=False,
        memory=config_lib.Memory(**fields),
    )  # fmt: skip
    return dataclasses.replace(test_stream.make_config(), model=model, sample=sample)


def begin(cfg, line=LINE, pictures=61, **start):
    session = test_session.begin(cfg, decodes=False, **start)
    session.prompt(["a cave"] * session.rows)
    if line:
        session.plan([sidecars.parse(line, pictures)] * session.rows)
    return session


def latents(chunks):
    return np.stack([np.asarray(chunk.latents) for chunk in chunks])


def walk(session, chunks=8):
    """Latents of the chunks, and what is shown in each."""
    made, shown = [], []
    for _ in range(chunks):
        made.append(session.step())
        shown.append([list(x) for x in session.landmarks.shown])
    return latents(made), shown


@functools.cache
def walked():
    session = begin(config(**FIELDS))
    return session, *walk(session)


# Landmarks of a session.


def test_who_is_back_is_shown_what_was_there():
    _, made, shown = walked()
    assert shown[:3] == [[[]]] * 3  # nothing has left the window yet
    assert shown[6] == [[1]] and shown[4] != [[]]
    assert np.isfinite(made).all()


def test_what_is_out_of_sight_is_not_shown():
    """The player turns round and stays so; or is near nothing, or another prompt was given."""
    _, shown = walk(begin(config(**FIELDS), "w*20, yaw+20*9, still", 61))
    assert not any(x for row in shown[4:] for x in row if 1 in x)
    _, shown = walk(begin(config(**FIELDS), "w", 61))
    assert not any(x for row in shown for x in row)
    session = begin(config(**FIELDS))
    for index in range(8):
        if index == 3:
            session.prompt("a canyon")
        session.step()
        assert index < 3 or not any(c < 3 for c in session.landmarks.shown[0])


def test_a_stream_is_the_same_by_replay_record_and_restore(tmp_path):
    session, made, shown = walked()
    np.testing.assert_array_equal(latents(session.replay()), made)
    record = session.record()
    assert record.pose is None
    again = begin(config(**FIELDS), None)
    again.plan([record])
    half, first = walk(again, 5)
    again.save(tmp_path / "s")
    there = Session.restore(test_session.engine_of(config(**FIELDS), False), None, tmp_path / "s")
    copied = again.copy()
    for one in (again, there, copied):
        rest, then = walk(one, 3)
        np.testing.assert_array_equal(np.concatenate([half, rest]), made)
        assert first + then == shown
    there.save(tmp_path / "t")  # what was restored can be saved again


def test_poses_that_are_given_are_taken_and_recorded():
    """The keys say nothing, the poses go there and back; a record has them for what follows."""
    x = np.abs(np.arange(61) - 24.0) * -1
    pose = poses_lib.rows([poses_lib.Pose(float(a), 0.0) for a in x])
    given = dataclasses.replace(sidecars.parse("still", 61), pose=pose)
    session = begin(config(**FIELDS), None)
    session.plan([given])
    made, shown = walk(session)
    assert shown == walked()[2]
    np.testing.assert_array_equal(session.record().pose, pose[: len(session.record())])
    np.testing.assert_array_equal(latents(session.replay()), made)
    part = begin(config(**FIELDS), None)  # behind the given ones they are reckoned
    part.plan([given.cut(0, 20)])
    made, _ = walk(part)
    assert len(part.record().pose) == 61
    np.testing.assert_array_equal(latents(part.replay()), made)


@pytest.mark.slow
def test_rows_have_landmarks_of_their_own():
    cfg = config(**FIELDS)
    session = test_session.begin(cfg, decodes=False, samples=(0, 1))
    session.prompt(["a cave"] * 2)
    session.plan([sidecars.parse(line, 61) for line in ("w", LINE)])
    made, shown = walk(session)
    assert [x[0] for x in shown] == [[]] * 8 and [x[1] for x in shown] == [
        x[0] for x in walked()[2]
    ]
    alone = begin(cfg, "w", samples=(0,))
    test_stream.close(walk(alone)[0][:, 0], made[:, 0], 1e-4)


def test_the_first_chunk_is_a_landmark_beside_others():
    """Each row gets its own: the stack takes chunk 0 for what it is."""
    made = [
        Kept(*(jnp.full((2,), n, jnp.int32) for _ in range(2)), jnp.full((2, 1), n)) for n in (0, 3)
    ]
    own = landmarks.Landmarks.__new__(landmarks.Landmarks)
    own.shown = [[3], [0]]
    own._places = {n: landmarks._Place(kept, (), np.zeros(0)) for n, kept in zip((0, 3), made)}
    assert own._stack(0).chunk.tolist() == [3, 0]


def test_a_change_of_the_prompt_with_recache():
    """Landmarks are no part of it: they are hidden before, and chosen anew."""
    session = begin(config(**FIELDS))
    for index in range(8):
        if index == 5:
            session.prompt("a canyon", recache=True)
        session.step()
    assert session.script[1].recache
    state = jax.device_get(session.carried.stream.window)
    assert state.chunk[0, 0] == 0
    assert np.isfinite(np.asarray([np.asarray(c.latents) for c in session.replay()])).all()


# The programs.


def state_at(cfg, chunks, line=LINE):
    """A session after so many chunks, with its sampler, and the inputs of the next chunk."""
    session = begin(cfg, line)
    for _ in range(chunks):
        session.step().check()
    state = session.carried.stream
    noise = draws.noise(cfg, session.start, session.index)
    inputs, _ = session._inputs(session._next, noise, 0.0)
    return session, state, inputs


def kept_of(session, state_of, chunk):
    """Chunk `chunk` as a landmark, as it was when it was the newest."""
    there, state, _ = state_of(session.engine.cfg, chunk + 1)
    return jax.device_get(memory.programs(there._sampler).newest(state))


def test_a_landmark_is_as_if_the_window_still_had_it():
    """Window of sink, one recent chunk and one landmark, against one of sink and two recent."""
    narrow, wide = config(8, **FIELDS), config(8, landmarks=0)
    one, state, inputs = state_at(narrow, 3, "w")
    kept = kept_of(one, functools.partial(state_at, line="w"), 1)
    assert kept.chunk.tolist() == [1] and kept.position.tolist() == [2]
    two, other, same = state_at(wide, 3, "w")
    assert sorted(np.asarray(other.window.chunk)[0].tolist()) == [0, 1, 2]
    np.testing.assert_array_equal(inputs.noise, same.noise)
    programs, params = memory.programs(one._sampler), one.engine.params

    def denoised(kept, count=1):
        place = programs.place(kept, programs.kept_specs)
        where = jnp.int32(0), programs.place(np.asarray([count], np.int32), memory.BATCH)
        copied = jax.tree.map(lambda x: x.copy(), state)
        shown = programs.show(params, copied, inputs, place, *where)
        assert np.asarray(shown.window.chunk)[0].tolist() == [0, 2, 1 if count else -1]
        return np.asarray(one._sampler.denoise(params, shown, inputs))

    expected = np.asarray(two._sampler.denoise(two.engine.params, other, same))
    without = np.asarray(one._sampler.denoise(params, state, inputs))
    test_stream.close(denoised(kept), expected, 1e-5)
    assert np.abs(without - expected).max() > 1e-3
    # It is its latents that are seen; what is hidden is not, to the bit.
    changed = kept.replace(latents=kept.latents + 1)
    assert np.abs(denoised(changed) - expected).max() > 1e-3
    np.testing.assert_array_equal(denoised(kept, 0), without)


def test_without_landmarks_in_sight_the_window_is_a_smaller_one():
    """To the bit that of a stream with so much less of a window."""
    far = begin(config(8, **FIELDS), "w")
    plain = begin(config(6, landmarks=0), "w")
    test_stream.close(walk(far)[0], latents(plain.step() for _ in range(8)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["bf16", "fp8"])
def test_landmarks_on_a_mesh_and_in_a_quantised_cache(kv):
    """Heads and frames on two devices; keys and values in the cache's own format."""
    made = []
    for seq in (1, 2):
        cfg = config(**FIELDS)
        quant = dataclasses.replace(cfg.quant, kv=kv)
        cfg = dataclasses.replace(cfg, mesh=config_lib.Mesh(seq=seq), quant=quant)
        session = begin(cfg, references=None)
        found, shown = walk(session, 7)
        assert shown == walked()[2][:7]
        made.append(found)
    test_stream.close(*made, 1e-4 if kv == "bf16" else 0.2)


@pytest.mark.slow
def test_the_keyboard_modules_caches_stay():
    """A landmark is read under its own actions; the caches go on from the chunk before."""
    cfg = config(**FIELDS)
    module = config_lib.Actions(
        kind="module", heads=2, head_dim=8, keyboard_embed=8, layers=1, window=4
    )
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, actions=module))
    session = begin(cfg)
    made, shown = walk(session)
    assert shown == walked()[2]
    assert np.asarray(session.carried.stream.actions.latent).tolist() == [[14, 15]]
    np.testing.assert_array_equal(latents(session.replay()), made)


# References.


def references(count, rows=1):
    draw = np.random.default_rng(5)
    return draw.standard_normal((rows, count, FRAMES, *test_session.SIZE, 4), np.float32)


def test_references_are_seen_and_stay(tmp_path):
    cfg = config(10, actions=False, references=2)
    given = references(2)
    session = begin(cfg, None, references=given)
    made = latents(session.step() for _ in range(6))
    window = jax.device_get(session.carried.stream.window)
    assert window.chunk[0, :3].tolist() == [-3, -2, 0] and window.pinned[0, :2].all()
    assert window.position[0, :3].tolist() == [-20, -10, 0]  # each a shot of 2, 8 are skipped
    assert not window.pinned[0, 2:].any()
    np.testing.assert_array_equal(latents(session.replay()), made)
    session.save(tmp_path / "s")
    there = Session.restore(test_session.engine_of(cfg, False), None, tmp_path / "s")
    np.testing.assert_array_equal(there.step().latents, session.step().latents)
    other = begin(
        cfg, None, references=given * np.asarray([1, -1])[None, :, None, None, None, None]
    )
    assert np.abs(latents([other.step()]) - made[0]).max() > 1e-3
    none = begin(cfg, None)  # slots that no image has are the stream's own
    for _ in range(6):
        none.step()
    assert jax.device_get(none.carried.stream.window.chunk)[0].min() == 0


@pytest.mark.parametrize("stay", [True, False])
def test_references_at_a_cut(stay):
    cfg = config(10, actions=False, references=2, references_past_cuts=stay)
    session = begin(cfg, None, references=references(2))
    for index in range(6):
        session.prompt("a cave", cut=index == 1)
        session.step()
    chunks = jax.device_get(session.carried.stream.window.chunk)[0].tolist()
    assert sorted(chunks) == ([-3, -2, 0, 5] if stay else [0, 3, 4, 5])


@pytest.mark.slow
def test_references_are_brought_under_another_prompt():
    cfg = config(10, references=1)
    session = begin(cfg, "w", references=references(1))
    session.step()
    session.prompt("a canyon", recache=True)
    session.step()
    window = jax.device_get(session.carried.stream.window)
    assert window.chunk[0].tolist() == [-2, 0, 1, -1] and window.pinned[0].tolist()[0]


def test_more_references_than_slots():
    with pytest.raises(InputError, match=r"2 images for memory.references=1 .*references=2, or"):
        begin(config(10, references=1), None, references=references(2))
