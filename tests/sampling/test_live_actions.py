"""A live keyboard and mouse: commands to rows, receipts, and records that repeat a stream."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.errors import InputError
from longlive_jax.models import actions as actions_lib
from longlive_jax.sampling.controls import Applied, Command, Controls
from longlive_jax.sampling.session import Session
from longlive_jax.sampling.track import Track
from tests.sampling import test_session, test_stream

RATE = 24
KEYS = ("KeyW", "KeyS", "KeyA", "KeyD")


# Commands to rows.


def controls(*commands):
    """Of two keys; commands are (time, keys, yaw)."""
    made = Controls(2, RATE)
    for event, (time, keys, yaw) in enumerate(commands, 1):
        keyboard = np.asarray(keys, np.float32)
        made.add(Command(event, time, keyboard, np.asarray([0, yaw], np.float32)))
    return made


def test_commands_are_at_their_place_in_the_time_that_a_chunk_plays():
    """Eight pictures last a third of a second: W from the second on, A from the seventh."""
    made = controls((9.0, [0, 0], 0), (10 + 1.5 / RATE, [1, 0], 2), (10 + 6.5 / RATE, [0, 1], -3))
    rows, events = made.take(8, 10 + 8 / RATE)
    assert rows[:, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
    assert rows[:, 1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert rows[:, 3].tolist() == [0, 2, 0, 0, 0, 0, -3, 0]
    assert events == [(1, 0), (2, 1), (3, 6)]
    rows, events = made.take(8, 10 + 16 / RATE)  # nothing new: the last one stays
    assert rows.tolist() == [[0, 1, 0, 0]] * 8 and events == []


def test_what_is_after_the_cut_off_waits_and_what_is_late_comes_next():
    made = controls((1 + 1.5 / RATE, [1, 0], 0))
    rows, events = made.take(4, 1.0)
    assert not rows.any() and events == []
    made.add(Command(2, 0.5, np.asarray([0, 1], np.float32), np.asarray([0, 5], np.float32)))
    rows, events = made.take(4, 1 + 4 / RATE)
    assert events == [(2, 0), (1, 1)]
    assert rows[:, 1].tolist() == [1, 1, 0, 0] and rows[:, 0].tolist() == [0, 1, 1, 1]
    assert rows[:, 3].tolist() == [5, 0, 0, 0]
    overtaken = Command(3, 1.0, np.asarray([0, 1], np.float32), np.zeros(2, np.float32))
    made.add(overtaken)  # given before what is held now, and here after it
    rows, _ = made.take(4, 1 + 8 / RATE)
    assert rows[:, 0].tolist() == [1] * 4 and rows[:, 1].tolist() == [1, 0, 0, 0]


def test_a_slow_chunk_takes_what_is_old_at_once():
    """Ten seconds have passed, the chunk plays for a sixth of one."""
    made = controls()
    made.take(4, 0.0)
    made.add(Command(1, 3.0, np.asarray([1, 0], np.float32), np.zeros(2, np.float32)))
    rows, _ = made.take(4, 10.0)
    assert rows[:, 0].tolist() == [1, 1, 1, 1]


commands = st.lists(
    st.tuples(
        st.floats(0, 4, width=32),  # when it was given, and how much later it comes
        st.floats(0, 2, width=32),
        st.lists(st.sampled_from([0, 1]), min_size=2, max_size=2),
        st.floats(-5, 5, width=32),
    ),
    max_size=12,
)


@settings(deadline=None)
@given(commands, st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 1)), min_size=1, max_size=6))
def test_no_degree_and_no_touched_key_is_lost(given, chunks):
    """Whatever the chunks' lengths and times, and however late commands come."""
    waiting = sorted(
        (time + late, event, Command(event, time, np.float32(keys), np.float32([0, yaw])))
        for event, (time, late, keys, yaw) in enumerate(given, 1)
    )
    made, now, total, by_event = controls(), 0.0, [], {event: c for _, event, c in waiting}
    for number, passed in [*chunks, (3, 100.0)]:
        now += passed
        while waiting and waiting[0][0] <= now:
            made.add(waiting.pop(0)[2])
        rows, events = made.take(number, now)
        assert rows.shape == (number, 4)
        for event, row in events:
            assert (rows[row, :2] >= by_event.pop(event).keyboard).all()  # it shows, and once
        total.append(rows[:, 3].sum())
    assert not by_event and not made.waiting
    np.testing.assert_allclose(sum(total), sum(yaw for *_, yaw in given), atol=1e-3)


# A stream's track.


def own(**fields):
    return config_lib.Actions(
        **({"kind": "module", "heads": 4, "head_dim": 8, "keyboard_embed": 8, "layers": 1} | fields)
    )


def walk(pictures, seed=0, pad=12):
    draw = np.random.default_rng(seed)
    return sidecars.Actions(
        keyboard=draw.integers(0, 2, (pictures, 4)), mouse=draw.normal(0, 4, (pictures, 2)),
        fps=RATE, keys=KEYS, pad=pad, view="third",
    )  # fmt: skip


@pytest.mark.parametrize("pad", [12, 11, 8])
@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("of_sidecar", [12, 11])
def test_a_plan_reaches_the_model_as_training_has_it(pad, frames, of_sidecar):
    """Chunk by chunk as `models.actions.of_chunk` cuts the whole array; and so does the record."""
    chunks = 4
    pictures = 4 * frames * chunks - 3
    plan, cfg = walk(pictures, pad=of_sidecar), own(pad=pad)
    record = plan
    for _ in range(2):
        track = Track(cfg, frames, 2)
        track.plan([record, walk(pictures, 1)])
        whole = sidecars.vectors(plan, cfg)
        for chunk in range(chunks):
            made, receipts = track.take(chunk, 0.0)
            assert receipts == ()
            for name, x in whole.items():
                expected = actions_lib.of_chunk(x[None], cfg, chunk, frames)
                np.testing.assert_array_equal(made[name][:1], expected)
        record = track.record(chunks)
        assert len(record) == pictures and (record.view, record.pad) == ("third", pad)


@pytest.mark.parametrize("pad", [12, 11])
def test_receipts_name_the_first_picture(pad):
    track = Track(own(pad=pad), 2, 1)
    one = track.act(["KeyW"], (0, 0), 0.99)
    two = track.act({"KeyW": 0.5}, (0, 30), 1.25)
    late = track.act([], (0, 0), 9.0)
    assert [x.event_id for x in (one, two, late)] == [1, 2, 3]
    made, receipts = track.take(0, 1.0)
    # Of the first five pictures the first is driven by nothing with pad 12.
    assert receipts == (Applied(1, 0, 4),)
    assert made["keyboard"][0, :, 0].tolist() == [0] * 7 + [1]
    made, receipts = track.take(1, 1.0 + 8 / RATE)
    assert receipts == (Applied(2, 1, 11),)
    assert made["keyboard"][0, :, 0].tolist() == [1] * 7 + [0.5]
    np.testing.assert_allclose(made["mouse"][0, :, 1], [0] * 6 + [20 / 15, 0])
    assert track.clipped == 1
    record = track.record(2)
    assert len(record) == 13 and record.mouse[:, 1].tolist().index(20) == 11 - (pad == 12)


def test_live_commands_go_on_where_a_plan_ends():
    track = Track(own(), 2, 1)
    track.plan([walk(8)])
    track.act(["KeyD"], (0, 0), 0.0)
    made, receipts = track.take(0, 1.0)
    assert receipts == ()
    made, receipts = track.take(1, 2.0)  # rows 4 to 7 are planned, 8 to 11 are live
    assert receipts == (Applied(1, 1, 9),)
    np.testing.assert_array_equal(made["keyboard"][0, :4], walk(8).keyboard[4:])
    assert made["keyboard"][0, 4:].tolist() == [[0, 0, 0, 1]] * 4


def test_bad_commands_are_refused_by_name():
    track = Track(own(keyboard_dim=2, mouse_dim=0), 2, 1)
    for keys, mouse, time, row, message in (
        (["KeyA"], (0, 0), 0, None, "key 'KeyA': the model has none; its keys are KeyW, KeyS"),
        ({"KeyW": 2}, (0, 0), 0, None, "key KeyW=2; it must be 0"),
        ([], (0, 1), 0, None, r"mouse=\(0, 1\) for a model without a mouse"),
        ([], (0, float("nan")), 0, None, "mouse=.*; it must be finite degrees"),
        ([], (0, 0), float("inf"), None, "t=inf; it must be finite seconds"),
        ([], (0, 0), 0, 1, "row 1 of 1; rows count from 0"),
    ):
        with pytest.raises(InputError, match=f"^actions: {message}"):
            track.act(keys, mouse, time, row)
    with pytest.raises(InputError, match="of 2 videos for 1 rows"):
        track.plan([walk(5)] * 2)
    with pytest.raises(InputError, match="fps=16, the video has 24"):
        track.plan([dataclasses.replace(walk(5), fps=16)])
    with pytest.raises(InputError, match="no record before the first chunk"):
        track.record(0)
    with pytest.raises(InputError, match="keyboard_dim=7 and no names for its keys"):
        Track(own(keyboard_dim=7), 2, 1)


# Sessions.


@functools.cache
def config(**fields):
    model = dataclasses.replace(test_stream.MODEL, chunk_frames=2, actions=own(window=4, **fields))
    sample = config_lib.Sample(steps=2, window_frames=8, sink_frames=2, multi_shot_sink=False)
    return dataclasses.replace(test_stream.make_config(), model=model, sample=sample)


def begin(cfg, **start):
    session = test_session.begin(cfg, decodes=False, **start)
    session.prompt(["a cave"] * session.rows)
    return session


def drive(session):
    """Four chunks of commands, one of which waits for its chunk, and their receipts."""
    receipts = []
    session.act(["KeyW"], (0, 3), t=0.9)
    for chunk in range(4):
        if chunk == 1:
            session.act(["KeyW", "KeyD"], (-2.5, 1.25), t=1.3)
            session.act(["KeyD"], (0, 40), t=1.31)
            session.act([], t=2.0)
        receipts += session.step(now=1.0 + chunk / 3).receipts
    return receipts


@functools.cache
def driven():
    session = begin(config())
    return session, drive(session)


def latents(chunks):
    return np.stack([np.asarray(chunk.latents) for chunk in chunks])


def test_a_live_stream_is_repeated_by_its_record(tmp_path):
    """To the bit: by replay, by the sidecar that was written, and after it was saved."""
    session, receipts = driven()
    assert [(r.event_id, r.chunk) for r in receipts] == [(1, 0), (2, 1), (3, 1), (4, 3)]
    expected = latents(session.replay())
    assert np.abs(np.diff(expected, axis=0)).max() > 0.1
    record = session.record()
    assert len(record) == 4 * 8 - 3 and record.keys == KEYS
    path = tmp_path / "walk.actions.jsonl"
    sidecars.write(path, record)
    again = begin(config())
    again.plan([sidecars.read(path, len(record), RATE)])
    np.testing.assert_array_equal(latents(again.step() for _ in range(4)), expected)
    again.save(tmp_path / "s")
    there = Session.restore(test_session.engine_of(config(), False), None, tmp_path / "s")
    np.testing.assert_array_equal(latents(there.replay()), expected)
    still = begin(config())
    assert np.abs(latents(still.step() for _ in range(4)) - expected).max() > 1e-3
    live = begin(config())
    assert drive(live) == receipts
    np.testing.assert_array_equal(live.record().mouse, record.mouse)


def test_a_saved_stream_keeps_what_is_held_and_what_waits(tmp_path):
    session, _ = driven()
    session = session.copy()
    session.act(["KeyA"], t=1e9)  # has not been when it is saved
    session.save(tmp_path / "s")
    held = session.copy().step(now=3.0)
    assert held.receipts == ()
    there = Session.restore(test_session.engine_of(config(), False), None, tmp_path / "s")
    chunk = there.step(now=0.5)  # another machine, another clock
    assert [r.event_id for r in chunk.receipts] == [5]
    assert there.act().event_id == 6 and session.act().event_id == 6
    assert session.index == 4 and len(there.record()) == 5 * 8 - 3


def test_rows_are_driven_apart():
    session = begin(config(), samples=(0, 0))
    session.act(["KeyW"], row=1)
    chunk = session.step()
    assert [r.event_id for r in chunk.receipts] == [1]
    first, second = np.asarray(chunk.latents)
    assert np.abs(first - second).max() > 1e-4
    assert not session.record(0).keyboard.any() and session.record(1).keyboard[:, 0].any()


def test_a_model_without_the_path_takes_none():
    session = test_session.begin(test_stream.make_config(), decodes=False)
    assert session.actions is None
    for call in (session.act, session.record, functools.partial(session.plan, [])):
        with pytest.raises(InputError, match="actions for a model without an action path"):
            call()
