"""The protocol of docs/live.md: streams, receipts, pictures, videos and scripts."""

import io
import json

import av
import numpy as np
import pytest
import websockets.exceptions
from PIL import Image

from longlive_jax.data.video_reader import probe
from longlive_jax.serving import messages
from longlive_jax.serving.limits import Limits
from tests.launch.commands import ROOT
from tests.serving import running
from tests.serving.running import PROMPTS, until

ONE, TWO, THREE = PROMPTS


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    limits = Limits(streams=2, waiting=2, idle_s=60, message_burst=60, messages_per_s=30,
                    prompt=200, body_bytes=20_000, message_bytes=4096,
                    upload_bytes=500_000, pixels=2**20)  # fmt: skip
    folder = tmp_path_factory.mktemp("live")
    one = running.Running(running.model(folder), folder / "out", limits)
    assert one.ask("/streams", {"prompt": ONE})[0] == 503 or one.scheduler.ready.is_set()
    until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def afterwards(server):
    yield
    for stream in list(server.scheduler.streams.values()):
        server.scheduler.end(stream, "test is over")


def test_info_and_health(server):
    assert server.ask("/healthz")[0] == 200
    status, info = server.ask("/info")
    assert status == 200 and info["token_required"] is False
    (model,) = info["models"]
    assert (model["height"], model["width"], model["fps"], model["chunk_frames"]) == (
        32,
        64,
        24,
        32,
    )
    assert (
        model["kind"] == "film" and model["actions"] is None and model["prompts"] == list(PROMPTS)
    )
    assert info["limits"] == {"prompt": 200, "upload": 500_000, "pixels": 2**20, "streams": 2,
                              "chunks": 2000}  # fmt: skip


def test_a_directed_stream(server):
    """Prompts are accepted, applied with chunk and frame, and marked in the pictures."""
    id = server.begin(seed=3)
    with server.watch(id) as viewer:
        hello = viewer.next("hello")
        assert hello["codec"].startswith("avc1.42") and hello["frame"] == 0
        assert (hello["width"], hello["height"], hello["fps"]) == (64, 32, 24)
        header, _ = viewer.chunk(0)
        assert header.flags & messages.KEY and header.flags & messages.FIRST
        assert (header.chunk, header.frame, header.event) == (0, 0, 0)
        viewer.say(type="prompt", text=TWO, mode="cut", event_id=7)
        assert viewer.next("accepted")["event_id"] == 7
        applied = viewer.next("applied")
        assert applied["event_id"] == 7 and applied["chunk"] >= 1
        assert applied["frame"] == 32 * applied["chunk"] - 3
        header, _ = viewer.chunk(applied["chunk"])
        assert header.frame == applied["frame"] and header.event == 7
        assert header.flags & messages.KEY and header.flags & messages.CUT
        stats = viewer.next("stats")
        assert stats["playing_s"] == pytest.approx(32 / 24, abs=1e-3) and stats["chunk_s"] > 0
        assert stats["viewers"] == 1 and stats["action_to_picture_s"] > 0
        frames = [header.frame for header, _ in viewer.pictures]
        assert frames == list(range(len(frames)))
        decoder = av.CodecContext.create("h264", "r")
        shown = [f for _, data in viewer.pictures for f in decoder.decode(av.Packet(data))]
        assert len(shown) == len(frames) and (shown[0].width, shown[0].height) == (64, 32)
    script = server.ask(f"/streams/{id}/script.json")[1]
    assert script["seed"] == 3
    first, second = script["shots"]
    assert first == {"prompt": ONE, "chunks": applied["chunk"], "cut": False}
    assert (second["prompt"], second["cut"]) == (TWO, True)
    server.ask(f"/streams/{id}", method="DELETE")
    assert server.state(id)["reason"] == "deleted"


def test_the_script_makes_the_same_latents(server, tmp_path):
    """By `Pipeline.generate`, as launch.sample does: prompts, recache, cuts and a blend."""
    id = server.begin(seed=5)
    with server.watch(id) as viewer:
        for chunk, (text, mode) in enumerate(
            [(TWO, "recache"), (THREE, "cut"), (ONE, "blend")], start=1
        ):
            viewer.chunk(2 * chunk - 2)
            viewer.say(type="prompt", text=text, mode=mode, chunks=2, event_id=chunk)
            viewer.next("applied")
        viewer.next("stats")
        viewer.next("stats")
    server.ask(f"/streams/{id}", method="DELETE")
    script = server.ask(f"/streams/{id}/script.json")[1]
    assert {True} == {any(key in shot for shot in script["shots"]) for key in ("weight", "recache")}
    assert sum(shot["cut"] for shot in script["shots"]) == 1
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script))
    pipeline = server.server.models["shapes"].pipeline
    again = list(pipeline.generate(path))
    made = server.latents[id][: len(again)]
    assert len(again) == len(made) >= 6
    for ours, theirs in zip(made, again, strict=True):
        np.testing.assert_allclose(ours, theirs.latents[0], atol=1e-5)
    assert np.abs(made[1] - made[0]).max() > 0.1


def test_a_script_without_a_viewer(server):
    """Shots are made to their end; the video plays while it is made, and after."""
    shots = [{"prompt": ONE, "chunks": 2}, {"prompt": TWO, "chunks": 1}]
    id = server.begin(shots=shots, seed=1)
    assert server.finished(id)["reason"] == "done"
    path = server.scheduler.streams[id].video
    until(lambda: server.ask(f"/streams/{id}/video.mp4")[1][4:8] == b"ftyp")
    until(lambda: probe(path).frames == 3 * 32 - 3)
    script = server.ask(f"/streams/{id}/script.json")[1]
    assert [(s["prompt"], s["chunks"], s["cut"]) for s in script["shots"]] == [
        (ONE, 2, False), (TWO, 1, True)
    ]  # fmt: skip
    again = server.begin(script=script)
    server.finished(again)
    for ours, theirs in zip(server.latents[again], server.latents[id], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_jpeg_for_those_without_webcodecs(server):
    with server.watch(server.begin(), "format=jpeg") as viewer:
        assert viewer.next("hello")["codec"] == "jpeg"
        header, payload = viewer.next()
        assert header.flags & messages.JPEG and header.flags & messages.KEY
        assert Image.open(io.BytesIO(payload)).size == (64, 32)


def test_a_second_viewer_begins_with_a_key_frame(server):
    id = server.begin()
    with server.watch(id) as first:
        first.chunk(0)
        with server.watch(id) as second:
            first.chunk(2)
            header, _ = second.next()
            assert header.flags & messages.KEY and header.frame > 0


def test_a_viewer_that_does_not_read_pauses_its_stream_alone(server):
    rude, polite = server.begin(), server.begin()
    with server.watch(rude) as idle, server.watch(polite) as viewer:
        viewer.chunk(4)
        assert 1 <= server.state(rude)["chunk"] <= 2
        idle.chunk(3)  # once it reads, it goes on


def test_pause(server):
    id = server.begin()
    with server.watch(id) as viewer:
        viewer.chunk(0)
        viewer.say(type="pause", paused=True, event_id=4)
        assert viewer.next("applied")["event_id"] == 4
        stats = viewer.next("stats")  # of the chunk that was under way
        here = server.state(id)
        assert here["paused"] and stats["type"] == "stats"
        viewer.say(type="pause", paused=False, event_id=5)
        viewer.chunk(here["chunk"] + 1)


def test_the_queue(server):
    first, second = server.begin(), server.begin()
    third = server.begin()
    assert server.state(third)["position"] == 1
    fourth = server.begin()
    assert server.state(fourth)["position"] == 2
    status, answer = server.ask("/streams", {"prompt": ONE})
    assert status == 503 and "2 streams wait" in answer["error"]
    with server.watch(fourth) as viewer:
        assert viewer.next("queue")["position"] == 2
        server.ask(f"/streams/{first}", method="DELETE")
        assert viewer.next("queue")["position"] == 1
        server.ask(f"/streams/{second}", method="DELETE")
        assert viewer.next("queue")["position"] == 0
        viewer.chunk(0)


def test_newcomers_do_not_pass_those_who_wait(server):
    """Viewers who begin streams again and again get no more than others."""
    scheduler = server.scheduler
    old, new = (scheduler.get(server.begin()) for _ in range(2))
    with scheduler._wake:
        old.turn, new.state = 7, "queued"
        scheduler._turn = 9  # two chunks of others since
        scheduler._admit()
        assert new.turn == 9 and min((old, new), key=lambda s: s.turn) is old


def test_a_bad_stream_ends_alone(server, monkeypatch):
    model = server.server.models["shapes"]
    real = type(model).begin

    def begin(self, seed, *args, **options):
        if seed == 13:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return real(self, seed, *args, **options)

    monkeypatch.setattr(type(model), "begin", begin)
    bad, good = server.begin(seed=13, shots=[{"prompt": ONE}]), server.begin()
    assert server.finished(bad)["reason"] == "error: the server could not make the next chunk"
    with server.watch(good) as viewer:
        viewer.chunk(1)


@pytest.mark.parametrize(
    "body, status, words",
    [
        (b"{", 400, "not JSON"),
        ({}, 400, "the prompt is empty"),
        ({"prompt": 5}, 400, "the prompt is empty"),
        ({"prompt": "a" * 201}, 413, "201 characters; the limit is 200"),
        ({"prompt": "a", "path": "/etc"}, 400, "a stream is a JSON object"),
        ({"prompt": "a", "model": "../x"}, 400, "no such model"),
        ({"prompt": "a", "seed": -1}, 400, "seed must be"),
        ({"prompt": "a", "seed": True}, 400, "seed must be"),
        ({"prompt": "a", "steps": 999}, 400, "steps must be one of 1"),
        ({"prompt": "a", "guidance": 3}, 400, "start it with --config.sample.guidance_scale"),
        ({"shots": [{"prompt": "a", "steps": 999}]}, 400, "steps must be one of 1"),
        ({"shots": [{"prompt": "a", "guidance": 3}]}, 400, "no pass under the negative prompt"),
        ({"prompt": "a", "image": "../../etc/passwd"}, 404, "no such upload"),
        ({"shots": []}, 400, "shots must be a list"),
        ({"shots": [{"prompt": "a", "image": "x.png"}]}, 400, "a shot is an object"),
        ({"shots": [{"prompt": "a", "chunks": 10**9}]}, 400, "chunks must be"),
        ({"shots": [{"prompt": "a", "chunks": 1500}] * 2}, 400, "3000 chunks"),
        ({"shots": [{"prompt": "a", "weight": 0.5}]}, 400, "a blend needs"),
        ({"script": {"format": "x"}}, 400, "script must be"),
        (b"x" * 30_000, 413, "over 20000 bytes"),
    ],
)  # fmt: skip
def test_bad_requests(server, body, status, words):
    got, answer = server.ask("/streams", body, "POST")
    assert (got, words in answer["error"]) == (status, True), answer


def test_bad_messages(server):
    id = server.begin()
    with server.watch(id) as viewer:
        for message, words in [
            ("{", "not JSON"),
            ("[]", "needs a type"),
            ('{"type": "x"}', "needs a type"),
            ('{"type": "prompt"}', "text is missing"),
            ('{"type": "prompt", "text": "a", "mode": "jump"}', "mode must be"),
            ('{"type": "prompt", "text": "%s"}' % ("a" * 201), "the limit is 200"),
            ('{"type": "prompt", "text": "a", "event_id": -1}', "event_id is of the wrong type"),
            ('{"type": "seen", "frame": 1.5}', "frame is of the wrong type"),
            ('{"type": "keys", "codes": ["KeyW"], "event_id": 1}', "takes no keys"),
            ('{"type": "settings", "steps": 50, "event_id": 1}', "one of 1, which this server"),
            ('{"type": "settings", "guidance": 3}', "no pass under the negative prompt"),
            ('{"type": "settings", "event_id": 1}', "give steps, guidance, or both"),
            ('{"type": "keys", "codes": ["KeyW"], "dx": NaN}', "dx is of the wrong type"),
        ]:
            viewer.socket.send(message)
            assert words in viewer.next("error")["message"], message
        viewer.chunk(1)  # the stream has not noticed


def test_rude_viewers(server):
    """Floods and oversized messages end their connection; the stream and the others go on."""
    id = server.begin()
    with server.watch(id) as polite:
        polite.chunk(0)
        with (
            server.watch(id) as flood,
            pytest.raises(websockets.exceptions.ConnectionClosed),
        ):
            for _ in range(5000):
                flood.say(type="keyframe")
            while True:
                flood.next()
        with server.watch(id) as large, pytest.raises(websockets.exceptions.ConnectionClosed):
            large.socket.send("x" * 100_000)
            while True:
                large.next()
        for _ in range(3):  # those who vanish
            with server.watch(id) as gone:
                gone.socket.socket.close()
        polite.chunk(server.state(id)["chunk"] + 1)
    with pytest.raises(websockets.exceptions.ConnectionClosed), server.watch("none") as viewer:
        assert viewer.next("error")["message"].startswith("no such stream")
        viewer.next()


def test_uploads(server, tmp_path):
    photo = (ROOT / "assets/photo.jpg").read_bytes()
    file = io.BytesIO()
    Image.open(io.BytesIO(photo)).resize((128, 64)).save(file, "PNG")
    status, answer = server.ask("/uploads", file.getvalue())
    assert (status, answer["kind"]) == (201, "image")
    id = server.begin(image=answer["upload"], shots=[{"prompt": ONE, "chunks": 1}])
    assert server.finished(id, 200)["reason"] == "done"
    script = server.ask(f"/streams/{id}/script.json")[1]
    assert script["begins_with"] == "image"
    status, answer = server.ask("/uploads", (ROOT / "assets/clip.mp4").read_bytes())
    assert (status, answer["kind"]) in {(201, "clip"), (413, None)}, answer
    large = io.BytesIO()
    Image.new("RGB", (2000, 1000)).save(large, "PNG")
    for data, code, words in [
        (b"", 400, "empty"),
        (b"GIF89a" + bytes(100), 415, "not a JPEG"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), 400, "refused"),
        (large.getvalue(), 400, "the limit is 1048576 pixels"),
        (b"\xff\xd8\xff" + bytes(600_000), 413, "500000 bytes"),
    ]:
        status, answer = server.ask("/uploads", data, "POST")
        assert (status, words in answer["error"]) == (code, True), answer
        assert str(tmp_path.parent) not in answer["error"]
    assert not list(server.scheduler.folder.glob("*.upload"))


def test_metrics(server):
    id = server.begin(shots=[{"prompt": ONE, "chunks": 1}])
    server.finished(id)
    text = server.ask("/metrics")[1].decode()
    for name in ("longlive_chunk_seconds_bucket", "longlive_first_frame_seconds_count",
                 "longlive_chunks_in_time_total", "longlive_underruns_total",
                 "longlive_memory_bytes", 'longlive_streams{state="queued"}'):  # fmt: skip
        assert name in text


def test_no_path_of_a_client_is_opened(server):
    for path in ("/static/../limits.py", "/static/%2e%2e/limits.py", "/streams/..%2f..%2fx/video.mp4",
                 "/streams/%2fetc%2fpasswd/script.json"):  # fmt: skip
        assert server.ask(path)[0] == 404


def test_a_stream_that_waits_for_its_turn_is_not_idle(server):
    """Only one that could not run for so long is."""
    id = server.begin()
    stream, scheduler = server.scheduler.streams[id], server.scheduler
    with server.watch(id) as viewer:
        viewer.chunk(0)
        until(lambda: not stream.runnable(scheduler.limits))  # unseen pictures: it rests
        with scheduler._wake:
            stream.lively = 0.0
            assert scheduler._over(stream, 1e9).startswith("limit")  # of time, in all
            assert scheduler._over(stream, stream.born + 61) == "idle"
            viewer_seen, stream.viewers[0].seen = stream.viewers[0].seen, stream.made
            scheduler._choose()
            assert stream.lively > 0 and scheduler._over(stream, stream.lively + 1) == ""
            stream.viewers[0].seen = viewer_seen
