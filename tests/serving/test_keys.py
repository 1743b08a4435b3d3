"""Keys and mouse through the server: clocks, limits, receipts, and scripts that repeat a walk."""

import json
import shutil
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import config as config_lib
from longlive_jax.sampling.controls import Applied
from longlive_jax.serving import keys as keys_lib
from longlive_jax.serving.keys import Commands, Keys, Reader, Record
from longlive_jax.serving.limits import Limits, Refused
from tests.serving import running
from tests.serving.running import until

PROMPT = "A red circle moves to the right."
OWN = config_lib.Actions(kind="module", heads=4, head_dim=8, keyboard_embed=8, layers=1)


# One client's messages.


def test_a_clients_clock_is_told_by_its_quickest_message():
    """The client's clock is 100 s behind; messages take 10 to 60 ms."""
    reader, stamps = Reader("walk", OWN), []
    for sent, delay in [(0.0, 0.06), (0.1, 0.01), (0.2, 0.05), (0.3, 0.03)]:
        stamps.append(reader.read({"codes": [], "t": 1000 * (sent - 100)}, sent + delay).time)
    np.testing.assert_allclose(stamps, [0.06, 0.11, 0.21, 0.31])
    late = reader.read(
        {"codes": [], "t": 1000 * (2.0 - 100)}, 2.5
    ).time  # the old ones are forgotten
    assert late == 2.5


messages = st.lists(
    st.tuples(st.floats(0, 3), st.floats(-1e12, 1e12), st.floats(-1e6, 1e6)),
    min_size=1,
    max_size=20,
)


@settings(deadline=None)
@given(messages)
def test_whatever_a_clients_clock_says_commands_are_in_order_and_turns_bounded(given):
    reader, now, last, turned = Reader("walk", OWN), 50.0, 0.0, 0.0
    for passed, t, counts in given:
        now += passed
        made = reader.read({"codes": ["KeyW"], "t": t, "dx": counts}, now)
        assert last <= made.time <= now
        assert abs(made.mouse[1]) <= 6
        last, turned = made.time, turned + abs(made.mouse[1])
    assert turned <= 6 * (1 + 24 * (now - 50.0)) + 1e-6


def test_counts_become_degrees_and_are_cut_at_six_a_picture():
    reader = Reader("walk", OWN)
    assert reader.read({"codes": [], "dx": 10, "dy": -20}, 1.0).mouse == pytest.approx((3.0, 1.5))
    assert reader.read({"codes": [], "dx": 1000}, 1.0).mouse == pytest.approx((0.0, 4.5))
    assert reader.read({"codes": [], "dx": -1000}, 1.0 + 1 / 48).mouse == pytest.approx((0, -3.0))
    assert reader.read({"codes": [], "dx": -1000}, 9.0).mouse == pytest.approx((0.0, -6.0))


def test_what_a_model_does_not_have_is_refused_by_name():
    with pytest.raises(Refused, match="'KeyQ' is no key of walk; it has KeyW, KeyS, KeyA, KeyD"):
        Reader("walk", OWN).read({"codes": ["KeyW", "KeyQ"]}, 1.0)
    still = config_lib.Actions(kind="token", mouse_dim=0)
    with pytest.raises(Refused, match="walk has no mouse"):
        Reader("walk", still).read({"codes": [], "dy": 1}, 1.0)
    with pytest.raises(Refused, match="shapes takes no keys"):
        Reader("shapes", config_lib.Actions()).read({"codes": []}, 1.0)
    assert keys_lib.describe(config_lib.Actions()) is None


def test_who_goes_while_holding_keys_lets_go_of_them():
    reader = Reader("walk", OWN)
    assert reader.let_go(1.0) is None
    reader.read({"codes": ["KeyW"]}, 1.0)
    gone = reader.let_go(2.0)
    assert gone is not None and (gone.codes, gone.time) == ((), 2.0)
    assert reader.let_go(2.0) is None


# A stream's commands and their record.


class Session:
    """Counts commands, as a session does."""

    def __init__(self):
        self.given = []

    def act(self, codes, mouse, time):
        self.given.append((codes, mouse, time))
        return Applied(len(self.given), 0, 0)


def command(event):
    return Keys(("KeyW",), (0.0, 0.0), float(event), event, float(event))


def test_commands_of_before_the_session_and_their_receipts():
    commands, session = Commands(), Session()
    commands.give(None, command(7))
    commands.begin(session)
    commands.give(session, command(9))
    assert [time for *_, time in session.given] == [7.0, 9.0]
    receipts = (Applied(1, 0, 0), Applied(2, 0, 5))
    assert [(at, keys.event) for at, keys in commands.applied(receipts)] == [(0, 7), (5, 9)]
    assert commands.applied(receipts) == []


def test_too_many_commands_are_refused():
    commands = Commands()
    for event in range(1000):
        commands.give(None, command(event))
    with pytest.raises(Refused, match="1000 commands wait already"):
        commands.give(None, command(1))


@pytest.mark.parametrize("pad", [12, 11])
@pytest.mark.parametrize("torn", [0, 5])
def test_a_record_goes_on_after_a_kill(tmp_path, pad, torn):
    """Whatever its last bytes are, and though it is a chunk ahead of what the server knew."""
    from longlive_jax.sampling.track import Track

    cfg, path = config_lib.Actions(kind="token", pad=pad), tmp_path / "x.rows"

    def stream(track, record, chunks):
        for chunk in chunks:
            track.act(["KeyW"] if chunk % 2 else [], (0, chunk), float(chunk))
            track.take(chunk, chunk + 0.5)
            session = type("Session", (), {"actions": track, "index": chunk + 1})
            record.extend(session)

    one, record = Track(cfg, 2, 1), Record(cfg, 2, path)
    stream(one, record, range(5))
    whole = record.whole(5)
    np.testing.assert_array_equal(whole.keyboard, one.record(5).keyboard)
    np.testing.assert_array_equal(whole.mouse, one.record(5).mouse)
    with path.open("ab") as file:
        file.write(bytes(torn))
    again = Record(cfg, 2, path)
    assert again.load(4) == 4 and Record(cfg, 2, path).load(9) == 5
    two = Track(cfg, 2, 1)
    two.plan([again.plan(None)])
    for chunk in range(4):
        two.take(chunk, -1.0)
    stream(two, again, [4])
    other = again.whole(5)
    np.testing.assert_array_equal(other.keyboard[:28], whole.keyboard[:28])
    assert path.stat().st_size >= 24 * 36


# The server.


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    one = running.Running(running.world(folder), folder / "out", Limits(idle_s=60))
    until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def afterwards(request):
    yield
    if "server" in request.fixturenames:
        one = request.getfixturevalue("server")
        for stream in list(one.scheduler.streams.values()):
            one.scheduler.end(stream, "test is over")


def walk(viewer):
    """W for a few chunks, a turn, and nothing; the receipts of the three."""
    viewer.chunk(0)
    applied = []
    for event, (codes, dx) in enumerate([(["KeyW"], 0), (["KeyW", "KeyD"], 25), ([], 0)], start=1):
        viewer.say(type="keys", t=1000 * time.monotonic(), codes=codes, dx=dx, event_id=event)
        assert viewer.next("accepted")["event_id"] == event
        applied.append(viewer.next("applied"))
    viewer.chunk(applied[-1]["chunk"] + 1)
    return applied


@pytest.mark.slow
def test_a_world_says_what_it_takes(server):
    (model,) = server.ask("/info")[1]["models"]
    assert model["kind"] == "world" and model["chunk_frames"] == 8
    assert model["actions"] == {
        "keys": ["KeyW", "KeyS", "KeyA", "KeyD"], "mouse": True, "degrees": 0.15
    }  # fmt: skip


@pytest.mark.slow
def test_a_walk_its_receipts_and_its_script(server, tmp_path):
    """The script makes the same latents in the server and by `Pipeline.generate`."""
    id = server.begin(seed=4)
    with server.watch(id) as viewer:
        applied = walk(viewer)
        viewer.say(type="prompt", text=PROMPT, mode="continue", event_id=9)
        assert viewer.next("applied")["event_id"] == 9
        viewer.next("stats")
        headers = [header for header, _ in viewer.pictures]
    assert [a["event_id"] for a in applied] == [1, 2, 3]
    assert sorted(a["frame"] for a in applied) == [a["frame"] for a in applied]
    for receipt in applied:
        first = next(h for h in headers if h.event >= receipt["event_id"])
        assert (first.frame, first.chunk) == (receipt["frame"], receipt["chunk"])
    server.ask(f"/streams/{id}", method="DELETE")
    script = server.ask(f"/streams/{id}/script.json")[1]
    chunks = sum(shot["chunks"] for shot in script["shots"])
    rows = script["actions"]
    assert len(rows) == 8 * chunks - 3 and rows[0]["keys"] == ["KeyW", "KeyS", "KeyA", "KeyD"]
    start, turn, stop = (receipt["frame"] - 1 for receipt in applied)  # row f drives picture f + 1
    assert not any(rows[f]["keyboard"][0] for f in range(start))
    assert all(rows[f]["keyboard"][0] == 1 for f in range(start, stop))
    assert rows[turn]["keyboard"] == [1, 0, 0, 1] and rows[turn]["mouse"] == [0, 3.75]
    assert not any(any(row["keyboard"]) for row in rows[stop + 1 :])
    made = server.latents[id]
    again = server.begin(script=script)
    server.finished(again)
    assert len(server.latents[again]) == chunks
    for ours, theirs in zip(server.latents[again], made):
        np.testing.assert_array_equal(ours, theirs)
    assert server.ask(f"/streams/{again}/script.json")[1]["actions"][1:] == rows[1:]
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    pipeline = server.server.models["walk"].pipeline
    for ours, theirs in zip(pipeline.generate(path), made, strict=False):
        np.testing.assert_allclose(np.asarray(ours.latents)[0], theirs, atol=1e-5)
    still = server.begin(script={k: v for k, v in script.items() if k != "actions"})
    server.finished(still)
    assert np.abs(server.latents[still][-1] - made[chunks - 1]).max() > 1e-3


@pytest.mark.slow
def test_a_walk_goes_on_after_a_kill(server, tmp_path):
    """Another server on a copy of the files, as they are while the stream runs."""
    id = server.begin(seed=6)
    with server.watch(id) as viewer:
        walk(viewer)
        shutil.copytree(server.scheduler.folder, tmp_path / "out")
    other = running.Running(server.server.models["walk"], tmp_path / "out", Limits())
    try:
        until(lambda: other.ask("/readyz")[0] == 200)
        stream = other.scheduler.streams[id]
        until(lambda: stream.index >= stream.replayed > 2)
        for ours, theirs in zip(other.latents[id], server.latents[id]):
            np.testing.assert_array_equal(ours, theirs)
        with other.watch(id) as viewer:
            viewer.chunk(stream.replayed)
            viewer.say(type="keys", codes=["KeyS"], event_id=1)
            assert viewer.next("applied")["chunk"] > stream.replayed
    finally:
        other.stop()


@pytest.mark.slow
def test_a_world_goes_by_as_on_a_clock(server):
    """A chunk that is made in less time than it plays waits for its turn."""
    with server.watch(server.begin()) as viewer:
        viewer.chunk(1)
        begin = time.monotonic()
        viewer.chunk(7)
        assert time.monotonic() - begin > 0.9 * 6 * 8 / 24


@pytest.mark.slow
def test_bad_keys(server):
    with server.watch(server.begin()) as viewer:
        for message, words in [
            ({"codes": ["KeyQ"]}, "'KeyQ' is no key of walk"),
            ({"codes": "KeyW"}, "codes is of the wrong type"),
            ({"codes": ["KeyW"] * 17}, "at most 16"),
            ({"codes": [], "dx": 1e300}, "dx is of the wrong type"),
            ({"codes": [], "t": "now"}, "t is of the wrong type"),
        ]:
            viewer.say(type="keys", event_id=1, **message)
            assert words in viewer.next("error")["message"]
        viewer.chunk(1)


@pytest.mark.slow
def test_a_viewer_that_vanishes_lets_go(server):
    id = server.begin()
    stream = server.scheduler.streams[id]
    with server.watch(id) as other:
        with server.watch(id) as viewer:
            viewer.chunk(0)
            viewer.say(type="keys", codes=["KeyW"], event_id=1)
            viewer.next("applied")
        until(lambda: len(stream.viewers) == 1)
        other.chunk(stream.index + 2)
    rows = stream.script()["actions"]
    assert any(row["keyboard"][0] for row in rows) and not any(rows[-2]["keyboard"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda rows: rows[:-1], "12 rows for a video of 13"),
        (lambda rows: [rows[0] | {"keys": ["KeyE", "KeyS", "KeyA", "KeyD"]}, *rows[1:]], "KeyE"),
        (lambda rows: "w*48", "actions"),
        (lambda rows: [], "no object"),
    ],
)
def test_bad_actions_of_a_script(server, change, words):
    row = {"keyboard": [1, 0, 0, 0], "mouse": [0, 1]}
    facts = {"fps": 24, "keys": ["KeyW", "KeyS", "KeyA", "KeyD"], "view": "first", "pad": 12}
    rows = [facts | row, *[row] * 12]
    script = {"format": "longlive_jax script", "shots": [{"prompt": PROMPT, "chunks": 2}]}
    assert server.ask("/streams", {"script": script | {"actions": rows}})[0] == 201
    status, answer = server.ask("/streams", {"script": script | {"actions": change(rows)}})
    assert status == 400 and words in answer["error"], answer
