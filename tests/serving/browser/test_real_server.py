"""The page on the real server with the shipped networks, made small."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from longlive_jax.serving.limits import Limits
from tests.serving import clips, running
from tests.serving.browser import act

ONE, TWO = "A red circle moves to the right.", "A blue star falls."


@pytest.fixture(scope="module")
def real(browser, tmp_path_factory):
    one = running.Running(
        running.shipped(steps=(2,)), tmp_path_factory.mktemp("live") / "out", Limits()
    )
    running.until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture
def page(visit, real):
    page = visit(real.url + "/")
    page.complaints = visit.complaints
    return page


def shown(page):
    """Prompts and first chunks of the shots that were applied."""
    rows = page.evaluate("longlive.schedule.done.map((s) => [s.prompt, s.chunk])")
    return [tuple(row) for row in rows]


def test_directed_reloaded_kept_and_replayed_to_the_same_latents(page, real, tmp_path):
    act.start(page, ONE)
    first = act.picture(page)
    act.until(page, lambda seen: np.abs(seen - first).mean() > 0.3, "another picture")
    assert page.evaluate("longlive.player.format") == "h264"
    act.direct(page, TWO, "cut")
    act.waits(page, lambda: len(shown(page)) == 2 and shown(page)[1][1] is not None, "the cut")
    cut = shown(page)[1][1]
    act.true(page, f"longlive.player.playing.chunk >= {cut}")
    index = page.evaluate("longlive.player.playing.index")
    page.reload()
    act.true(page, f"longlive.player?.playing?.index > {index}")
    with page.expect_download() as got:
        page.locator("#video").click()
    with av.open(str(got.value.path())) as video:
        assert sum(1 for _ in video.decode(video=0)) >= index
    with page.expect_download() as got:
        page.locator("#script").click()
    script = json.loads(got.value.path().read_text())
    assert script["shots"][-1]["prompt"].endswith(TWO) and len(script["shots"]) == 2
    act.replay(page, script, real.latents, tmp_path)


def test_a_dropped_picture_begins_a_film(page, real):
    file = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 40, 40)).save(file, "PNG")
    page.set_input_files(
        "#file", {"name": "red.png", "mimeType": "image/png", "buffer": file.getvalue()}
    )
    page.wait_for_selector("#start-image:not([hidden])")
    act.start(page, ONE)
    assert page.locator("#start-image").is_hidden()
    seen = act.picture(page).mean((0, 1))
    assert seen[0] > seen[1] + 30, "the first picture is red"


def test_a_dropped_clip_is_gone_on_from_and_its_script_opened(page, real, tmp_path):
    """Dropped on the picture; then the same clip and the script, to the same latents."""
    data = clips.clip(64)
    page.evaluate(act.DROP, [list(data), "walk.mp4", "video/mp4"])
    page.wait_for_selector("#start-image:not([hidden])")
    assert page.locator("#start-image span").inner_text() == "walk.mp4, its last 2.5 s"
    act.screenshot(page, "film_clip")
    act.start(page, ONE)
    assert page.locator("#start-image").is_hidden()
    seen = act.picture(page)[4:10].mean((0, 1))
    assert seen[0] > seen[1] + 60, "the clip is red"
    act.true(page, "longlive.player.playing.chunk >= 3")
    with page.expect_download() as got:
        page.locator("#script").click()
    script = json.loads(got.value.path().read_text())
    assert script["begins_with"] == "clip" and script["shots"][0]["prompt"] == ONE
    old = page.evaluate("longlive.player.id")
    file = tmp_path / "script.json"
    file.write_text(json.dumps(script))
    page.set_input_files("#script-file", file)  # without its clip
    page.wait_for_selector("#error:not([hidden])")
    assert "begins with a clip: upload it" in page.locator("#error").inner_text()
    page.set_input_files("#file", {"name": "walk.mp4", "mimeType": "video/mp4", "buffer": data})
    page.wait_for_selector("#start-image:not([hidden])")
    assert "for the next film" in page.locator("#start-image").inner_text()
    page.set_input_files("#script-file", file)
    act.true(page, f"longlive.player.id !== '{old}'")
    new = page.evaluate("longlive.player.id")
    chunks = 2 + sum(shot["chunks"] for shot in script["shots"])
    act.waits(page, lambda: len(real.latents.get(new, ())) >= chunks, "the script's chunks", 180)
    for before, after in zip(real.latents[old][:chunks], real.latents[new]):
        np.testing.assert_array_equal(before, after)
    page.complaints[:] = [c for c in page.complaints if "400 (Bad Request)" not in c]


@pytest.mark.parametrize(
    "data, words",
    [
        (b"no clip at all, but words" * 9, "not a JPEG, PNG, WebP, AVIF, MP4"),
        (clips.clip(48)[:-1500], "the upload is refused"),
        (clips.clip(9), "a clip of 9 frames at 24 a second; it needs 29 or more"),
    ],
    ids=["words", "truncated", "short"],
)
def test_a_clip_that_cannot_be_taken_is_refused_in_words(page, data, words):
    page.evaluate(act.DROP, [list(data), "bad.mp4", "video/mp4"])
    page.wait_for_selector("#error:not([hidden])")
    assert words in page.locator("#error").inner_text()
    assert page.locator("#start-image").is_hidden()
    page.complaints.clear()  # the browser logs the 400


def test_steps_are_changed_while_it_runs(page, real):
    """Guidance cannot be: the shipped world samples without."""
    assert page.locator("#guidance").is_disabled()
    assert "without guidance" in page.locator("#guidance").get_attribute("title")
    act.start(page, ONE)
    page.fill("#steps", "2")
    page.keyboard.press("Tab")
    act.true(page, "/^2 steps from chunk \\d+$/.test(document.querySelector('#changed').innerText)")
    chunk = int(page.locator("#changed").inner_text().split()[-1])
    stream = real.scheduler.streams[page.evaluate("longlive.player.id")]
    entries = stream.script()["shots"]
    assert [e.get("steps") for e in entries] == [None, 2] and entries[0]["chunks"] == chunk
    page.fill("#steps", "3")
    page.keyboard.press("Tab")
    page.wait_for_selector("#error:not([hidden])")
    assert "steps must be one of 1, 2" in page.locator("#error").inner_text()
    assert page.input_value("#steps") == "2"


def test_a_prompt_that_is_too_long_is_refused_in_words(page):
    page.fill("#prompt", "x" * 1200)
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "1200 characters" in page.locator("#error").inner_text()
