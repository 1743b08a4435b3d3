"""A clip as a start: decoded, encoded, gone on from, and replayed from the script."""

import contextlib
import io
import json
import types

import av
import numpy as np
import pytest

from longlive_jax.data.images import to_float
from longlive_jax.prompts import embeddings, pictures
from longlive_jax.sampling import batches
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.streams import read_request
from longlive_jax.serving.uploads import Upload
from tests.serving import clips, running
from tests.serving.running import PROMPTS, until


@contextlib.contextmanager
def serving(model, folder):
    limits = Limits(upload_bytes=300_000, pixels=2**17, clip_s=20, clip_frames=100)
    one = running.Running(model, folder / "out", limits)
    until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    with serving(running.model(folder), folder) as one:
        yield one


@pytest.fixture
def shipped(tmp_path):
    """A server whose pictures show what they are of."""
    with serving(running.shipped(), tmp_path) as one:
        yield one


def upload(server, data):
    status, answer = server.ask("/uploads", data)
    assert status == 201, answer
    return answer


@pytest.mark.slow
def test_a_stream_goes_on_from_a_clip(shipped, tmp_path):
    """Its last whole chunks are seen and kept, then what the prompt says; the script repeats it."""
    server = shipped
    data = clips.clip(70)  # of which 61 are two chunks
    answer = upload(server, data)
    assert (answer["kind"], answer["chunks"]) == ("clip", 2)
    id = server.begin(image=answer["upload"], seed=2)
    with server.watch(id) as viewer:
        viewer.say(type="prompt", text=PROMPTS[1], mode="cut", event_id=3)  # waits behind the clip
        applied = viewer.next("applied")
        assert applied["chunk"] == 3
        viewer.chunk(4)
        decoder = av.CodecContext.create("h264", "r")
        shown = [f.to_ndarray(format="rgb24") for _, h264 in viewer.pictures
                 for f in decoder.decode(av.Packet(h264))]  # fmt: skip
    red = np.stack(shown[:61]).astype(np.float32)[..., 4:10, :, :].mean((0, 1, 2))
    assert red[0] > red[1] + 60, "the clip's pictures are seen first"
    server.ask(f"/streams/{id}", method="DELETE")
    model = server.server.models["shapes"]
    pipeline, path = model.pipeline, tmp_path / "clip.mp4"
    path.write_bytes(data)
    with av.open(str(path)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 70
    past = pictures.Clip(path, *pipeline.pixels, last=61).encode(
        model.cfg, model._encoder, pipeline.vae_mesh
    )
    made = np.concatenate(server.latents[id])[: 8 * 2]
    np.testing.assert_allclose(made, past[0], atol=1e-5)

    script = server.ask(f"/streams/{id}/script.json")[1]
    assert script["begins_with"] == "clip"
    first, second = script["shots"]
    assert (first["prompt"], first["chunks"], first["cut"]) == (PROMPTS[0], 1, False)
    assert (second["prompt"], second["cut"]) == (PROMPTS[1], True)
    status, answer = server.ask("/streams", {"script": script})
    assert status == 400 and "begins with a clip: upload it" in answer["error"]
    again = server.begin(script=script, image=upload(server, data)["upload"])
    assert server.finished(again)["reason"] == "done"
    ours, theirs = server.latents[id], server.latents[again]
    assert len(theirs) == 2 + sum(shot["chunks"] for shot in script["shots"]) >= len(ours) - 1 >= 4
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a, b)
    assert server.ask(f"/streams/{again}/script.json")[1]["shots"] == script["shots"]

    # As launch.sample --prompts=script.json --continue_from=clip.mp4 --continue_frames=61 does.
    file = tmp_path / "script.json"
    file.write_text(json.dumps(script))
    videos = pipeline.videos(file)
    (batch,) = pipeline.encoded(
        batches.make(model.cfg, videos), pictures.Clip(path, *pipeline.pixels, last=61)
    )
    chunks = pipeline.render(batch, pipeline.embed(embeddings.distinct(videos)), seed=2)
    for a, b in zip(theirs, [chunk.latents[0] for chunk in chunks], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_list_is_made_behind_a_clip(server):
    """All of its chunks are new ones."""
    shots = [{"prompt": PROMPTS[0], "chunks": 1}, {"prompt": PROMPTS[1], "chunks": 2}]
    id = server.begin(shots=shots, image=upload(server, clips.clip(29))["upload"])
    assert server.finished(id)["chunk"] == 1 + 3
    entries = server.ask(f"/streams/{id}/script.json")[1]["shots"]
    assert [(e["prompt"], e["chunks"]) for e in entries] == [
        (s["prompt"], s["chunks"]) for s in shots
    ]


def test_a_long_clip_keeps_its_end(server):
    """The last 100 frames at most, in whole chunks; of another rate and size."""
    assert upload(server, clips.clip(60, fps=12, height=32, width=64))["chunks"] == 3


TRUNCATED = clips.clip(48)[:-2000]  # its index is at the end: gone
CUT_SHORT = clips.clip(120, options={"movflags": "faststart"})[:4000]


@pytest.mark.parametrize(
    "data, status, words",
    [
        (clips.clip(28), 400, "a clip of 28 frames at 24 a second; it needs 29 or more"),
        (clips.clip(42, fps=2), 400, "a clip of 21 s; the limit is 20 s: cut it"),
        (clips.clip(30, height=400, width=400), 400, "have over 131072 pixels: scale it"),
        (clips.clip(30) + bytes(300_000), 413, "over 300000 bytes, the limit of an upload"),
        (b"\0\0\0\x18ftypisom" + bytes(500), 400, "the upload is refused"),
        (b"\x1aE\xdf\xa3" + bytes(500), 400, "the upload is refused"),
        (b"RIFF\0\0\0\0AVI " + bytes(500), 415, "not a JPEG, PNG, WebP, AVIF, MP4, WebM or"),
        (TRUNCATED, 400, "the upload is refused"),
        (CUT_SHORT, 400, "the upload is refused"),
    ],
    ids=["short", "long", "pixels", "bytes", "rubbish", "rubbish webm", "avi", "no index", "cut"],
)  # fmt: skip
def test_bad_clips(server, data, status, words):
    got, answer = server.ask("/uploads", data, "POST")
    assert (got, words in answer["error"]) == (status, True), answer
    assert not list(server.scheduler.folder.glob("*.upload"))
    assert str(server.scheduler.folder) not in answer["error"]
    assert server.ask("/healthz")[0] == 200


def test_what_a_stream_may_begin_with(server, tmp_path):
    models = server.server.models
    given = Upload("clip", "shapes", 2, tmp_path, 0.0)
    for body, upload, words in [
        ({"script": {"format": "longlive_jax script", "begins_with": "image"}}, given, "an image"),
        (
            {"script": {"format": "longlive_jax script", "begins_with": [1]}},
            given,
            "something else",
        ),
        ({}, given._replace(model="other"), "was made for other: upload it for shapes"),
    ]:
        with pytest.raises(Refused, match=words):
            read_request({"prompt": "a"} | body, models, Limits(), upload)
    walk = types.SimpleNamespace(name="shapes", kind="world")
    with pytest.raises(Refused, match="shapes walks under keys, which a clip does not have"):
        read_request({"prompt": "a"}, {"shapes": walk}, Limits(), given)


def test_frames_are_those_of_the_reader(server):
    """What the other process leaves is what `VideoFile` reads here."""
    data = clips.clip(61)
    id = upload(server, data)["upload"]
    frames = np.load(server.server.uploads.take(id))
    with av.open(io.BytesIO(data)) as file:
        stored = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(video=0)])
    assert frames.shape == (61, 32, 64, 3) and frames.dtype == np.uint8
    small = to_float(frames).mean((1, 2))
    assert np.abs(small - to_float(stored).mean((1, 2))).max() < 0.03
