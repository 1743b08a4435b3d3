"""Steps and guidance of a running stream, over the socket, and in its script."""

import json

import numpy as np
import pytest

from longlive_jax.serving.limits import Limits
from tests.serving import running
from tests.serving.running import PROMPTS, until


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    model = running.model(folder, steps=(2,), sample__guidance_scale=3.0)
    one = running.Running(model, folder / "out", Limits())
    until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


def change(viewer, event, **values):
    """The chunk that a change is applied in."""
    viewer.say(type="settings", event_id=event, **values)
    applied = viewer.next("applied")
    assert applied["event_id"] == event and applied["frame"] == 32 * applied["chunk"] - 3
    return applied["chunk"]


@pytest.mark.slow
def test_changed_while_it_runs_kept_and_replayed(server, tmp_path):
    (info,) = server.ask("/info")[1]["models"]
    assert (info["steps_choices"], info["guidance"], info["guided"]) == ([1, 2], 3.0, True)
    id = server.begin(seed=4, guidance=2)
    assert server.state(id)["guidance"] == 2
    with server.watch(id) as viewer:
        viewer.chunk(0)
        first = change(viewer, 1, steps=2)
        header, _ = viewer.chunk(first)
        assert header.event == 1
        second = change(viewer, 2, guidance=5.5)
        viewer.say(type="prompt", text=PROMPTS[1], mode="cut", event_id=3)
        third = viewer.next("applied")["chunk"]
        back = change(viewer, 4, guidance=3, steps=1)
        viewer.chunk(back + 1)
        state = server.state(id)
        assert (state["steps"], state["guidance"]) == (1, 3.0)
    server.ask(f"/streams/{id}", method="DELETE")
    script = server.ask(f"/streams/{id}/script.json")[1]
    assert script["settings"]["sample.steps"] == 1
    assert script["settings"]["sample.guidance_scale"] == 3.0
    expected, chunk = {}, 0
    for shot in script["shots"]:
        for _ in range(shot["chunks"]):
            expected[chunk], chunk = (shot.get("steps", 1), shot.get("guidance", 3.0)), chunk + 1
    assert expected[0] == (1, 2.0)
    assert expected[first] == (2, 2.0) and expected[second] == (2, 5.5) == expected[third]
    assert expected[back] == (1, 3.0)
    made = server.latents[id][:chunk]
    again = server.begin(script=script)
    assert server.finished(again)["reason"] == "done"
    assert len(made) >= chunk - 1  # the last one may have been cut off
    np.testing.assert_array_equal(made, server.latents[again][: len(made)])
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    chunks = server.server.models["shapes"].pipeline.generate(path)  # as launch.sample
    np.testing.assert_allclose(made, [c.latents[0] for c in chunks][: len(made)], atol=2e-5)


def test_a_change_outlives_the_shots_of_a_list(server):
    """Where the list says nothing of steps; where it does, it is followed."""
    shots = [
        {"prompt": PROMPTS[0], "chunks": 2},
        {"prompt": PROMPTS[1], "chunks": 2},
        {"prompt": PROMPTS[2], "chunks": 1, "guidance": 4},
        {"prompt": PROMPTS[0], "chunks": 1},
    ]
    id = server.begin(shots=shots)
    with server.watch(id) as viewer:
        viewer.chunk(0)
        at = change(viewer, 1, steps=2, guidance=6)
        viewer.chunk(5)
    server.ask(f"/streams/{id}", method="DELETE")
    entries = server.ask(f"/streams/{id}/script.json")[1]["shots"]
    own = [(e.get("steps"), e.get("guidance")) for e in entries for _ in range(e["chunks"])]
    assert 1 <= at <= 3 and own[:6] == [(None, None)] * at + [(2, 6)] * (4 - at) + [(None, 4)] + [
        (None, None)
    ]


@pytest.mark.parametrize(
    "values, words",
    [
        ({"steps": 3}, "steps must be one of 1, 2, which this server has compiled (--steps)"),
        ({"steps": 0}, "steps must be one of 1, 2"),
        ({"steps": 1.5}, "steps is of the wrong type"),
        ({"guidance": 31}, "guidance must be a number from 0 to 30"),
        ({"guidance": -1}, "guidance must be a number from 0 to 30"),
        ({"guidance": True}, "guidance is of the wrong type"),
        ({}, "give steps, guidance, or both"),
    ],
)
def test_bad_changes(server, values, words):
    with server.watch(server.begin()) as viewer:
        viewer.say(type="settings", event_id=5, **values)
        error = viewer.next("error")
        assert words in error["message"] and ("1.5" in str(values) or "True" in str(values)
                                              or error["event_id"] == 5)  # fmt: skip


@pytest.mark.parametrize(
    "body, words",
    [
        ({"guidance": 31}, "guidance must be a number"),
        ({"guidance": [3]}, "guidance must be a number"),
        ({"guidance": True}, "guidance must be a number"),
        ({"steps": True}, "steps must be one of 1, 2"),
        ({"steps": "2"}, "steps must be one of 1, 2"),
        ({"shots": [{"prompt": "a", "guidance": 1e9}]}, "1000 or less"),
        ({"shots": [{"prompt": "a", "guidance": 99}]}, "from 0 to 30"),
    ],
)
def test_bad_beginnings(server, body, words):
    status, answer = server.ask("/streams", {"prompt": PROMPTS[0]} | body)
    assert status == 400 and words in answer["error"]
