"""The page on the real server with the shipped networks, made small."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from longlive_jax.serving.limits import Limits
from tests.serving import running
from tests.serving.browser import act

ONE, TWO = "A red circle moves to the right.", "A blue star falls."


@pytest.fixture(scope="module")
def real(browser, tmp_path_factory):
    one = running.Running(running.model(), tmp_path_factory.mktemp("live") / "out", Limits())
    running.until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture
def page(visit, real):
    return visit(real.url + "/")


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


def test_a_prompt_that_is_too_long_is_refused_in_words(page):
    page.fill("#prompt", "x" * 1200)
    page.keyboard.press("Enter")
    page.wait_for_selector("#error:not([hidden])")
    assert "1200 characters" in page.locator("#error").inner_text()
