"""Film mode in a browser: prompts, cuts, the shot list, a start image, what is kept."""

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from tests.serving import clips
from tests.serving.browser import act

DUSK = "A lighthouse at dusk, waves below."
KEEPER = "Inside, a keeper lights the lamp."
DUNES = "Slow drift over dunes at sunrise."
TRAIN = "A night train crosses a valley."


def test_a_typed_prompt_becomes_moving_pictures(visit, server):
    page = visit()
    act.start(page, DUSK)
    first = act.until(page, act.sky(DUSK), "the prompt's colours")
    act.until(page, lambda seen: np.abs(seen - first).mean() > 0.3, "another picture")
    assert server.newest.body["prompt"] == DUSK
    assert page.evaluate("longlive.player.format") == "h264"
    act.true(page, "document.querySelector('#deadline-text').textContent.startsWith('Made in')")
    assert page.locator("[data-number=memory]").inner_text() == "17.3 GB"


def test_cut_continue_and_blend(visit, server):
    page = visit()
    act.start(page, DUSK)
    act.direct(page, KEEPER, "cut")
    act.until(page, act.sky(KEEPER), "the second shot")
    act.direct(page, DUNES, "continue")
    act.until(page, act.sky(DUNES), "the new words")
    act.direct(page, TRAIN, "recache")
    act.until(page, act.sky(TRAIN), "the soft change")
    page.locator("input[name=how][value=blend]").check(force=True)
    page.fill("#blend", "2")
    act.direct(page, DUSK, "blend")
    halfway = (act.scenes.palette(TRAIN)[0] + act.scenes.palette(DUSK)[0]) / 2
    act.until(
        page, lambda s: np.abs(s[2:6, -12:-4].mean((0, 1)) - halfway).max() < 14, "half of both"
    )
    act.until(page, act.sky(DUSK), "the end of the blend")
    modes = [event["mode"] for event in server.newest.script]
    assert modes == ["cut", "cut", "continue", "recache", "blend"]
    shots = page.locator("#shots li")
    assert shots.count() == 5 and DUNES in shots.nth(2).inner_text()
    assert page.locator("#shots [aria-current]").count() == 1
    assert "s" in page.locator("[data-number=action]").inner_text()


def test_pause_stops_the_picture_and_the_server(visit, server):
    page = visit()
    act.start(page, DUSK)
    page.locator("#pause").click()
    act.waits(page, lambda: server.newest.paused, "the pause at the server")
    page.wait_for_timeout(300)
    index = page.evaluate("longlive.player.playing.index")
    page.wait_for_timeout(1000)
    assert page.evaluate("longlive.player.playing.index") == index
    page.locator("#screen").focus()
    page.keyboard.press("Space")
    act.true(page, f"longlive.player.playing.index > {index}")
    assert not server.newest.paused


def test_shots_ahead_are_edited_moved_saved_loaded_and_played(visit, server, tmp_path):
    page = visit()
    page.locator("input[name=how][value=cut]").check(force=True)
    for prompt in (KEEPER, DUNES, TRAIN, DUSK):
        page.fill("#prompt", prompt)
        page.locator("#later").click()
    order = lambda: page.evaluate("longlive.schedule.ahead.map((s) => s.prompt)")  # noqa: E731
    grips = page.locator("#shots .grip")
    grips.nth(3).focus()
    page.keyboard.press("Home")
    assert order() == [DUSK, KEEPER, DUNES, TRAIN]
    page.keyboard.press("ArrowDown")
    assert order() == [KEEPER, DUSK, DUNES, TRAIN]
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(
        "Move shot 2"
    )
    page.keyboard.press("Delete")
    assert order() == [KEEPER, DUNES, TRAIN]
    assert "Deleted" in page.locator("#live").inner_text()
    below = page.locator("#shots li").nth(2).bounding_box()
    grips.nth(0).hover()
    page.mouse.down()
    page.mouse.move(below["x"] + 20, below["y"] + below["height"] / 2, steps=4)
    page.mouse.up()
    assert order() == [DUNES, TRAIN, KEEPER]
    page.locator("#shots textarea").nth(1).fill(TRAIN + " Snow falls.")
    page.locator("#shots .meta input[type=number]").nth(0).fill("1")
    page.locator("#shots .meta input[type=number]").nth(1).fill("1")
    page.locator("#shots .meta input[type=checkbox]").nth(2).uncheck()
    with page.expect_download() as got:
        page.locator("#save").click()
    saved = json.loads(got.value.path().read_text())
    assert saved == [
        {"prompt": DUNES, "chunks": 1, "cut": True},
        {"prompt": TRAIN + " Snow falls.", "chunks": 1, "cut": True},
        {"prompt": KEEPER, "chunks": 2, "cut": False},
    ]
    file = tmp_path / "shots.json"
    file.write_text(json.dumps(saved))
    page.reload()
    page.wait_for_selector("[data-ready]", state="attached")
    page.set_input_files("#list-file", file)
    act.true(page, "longlive.schedule.ahead.length === 3")
    page.fill("#prompt", "")
    page.locator("#go").click()
    act.waits(page, lambda: len(server.newest.script) == 3, "all three shots")
    played = [(event["chunk"], event["prompt"], event["mode"]) for event in server.newest.script]
    assert played == [
        (0, DUNES, "cut"),
        (1, TRAIN + " Snow falls.", "cut"),
        (2, KEEPER, "continue"),
    ]


@pytest.mark.parametrize("text", ["{}", "[{}]", '[{"prompt": "A", "chunks": 0}]', "no"])
def test_a_bad_list_is_refused_in_words(visit, tmp_path, text):
    page = visit()
    file = tmp_path / "shots.json"
    file.write_text(text)
    page.set_input_files("#list-file", file)
    page.wait_for_selector("#error:not([hidden])")
    assert "shot" in page.locator("#error").inner_text()
    assert page.evaluate("longlive.schedule.ahead.length") == 0


def test_a_dropped_picture_begins_the_film(visit, server):
    page = visit()
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (250, 250, 0)).save(file, "PNG")
    page.evaluate(act.DROP, [list(file.getvalue()), "sun.png", "image/png"])
    page.wait_for_selector("#start-image:not([hidden])")
    assert "sun.png" in page.locator("#start-image").inner_text()
    act.start(page, DUSK)
    assert server.newest.image[0, 0].tolist() == [250, 250, 0]
    wanted = 0.5 * act.scenes.palette(DUSK)[0] + np.asarray([125, 125, 0])
    act.until(page, lambda s: np.abs(s[2:6, -12:-4].mean((0, 1)) - wanted).max() < 16, "both")


def test_a_dropped_clip_comes_before_the_first_shots_chunks(visit, server):
    page = visit()
    page.evaluate(act.DROP, [list(clips.clip(40, colour=(0, 0, 250))), "sea.mp4", "video/mp4"])
    page.wait_for_selector("#start-image:not([hidden])")
    assert page.locator("#start-image span").inner_text() == "sea.mp4, its last 2.5 s"
    assert page.locator("#start-image img").is_hidden()
    page.fill("#prompt", KEEPER)
    page.locator("#later").click()  # with a shot ahead, the first one has two chunks
    act.start(page, DUSK)
    assert page.evaluate("longlive.schedule.end") in (2 + 2, 2 + 2 + 2)
    assert server.newest.image[0, 0, 2] > 200
    act.waits(page, lambda: len(server.newest.script) == 2, "the second shot")
    assert server.newest.script[1]["chunk"] == 4


def test_a_dropped_text_is_refused_in_the_servers_words(visit):
    page = visit()
    page.evaluate(act.DROP, [list(b"no picture"), "a.txt", "text/plain"])
    page.wait_for_selector("#error:not([hidden])")
    assert "neither a picture nor a clip" in page.locator("#error").inner_text()
    assert visit.complaints == [
        "logged: Failed to load resource: the server responded with a status of 400 (Bad Request)"
    ]
    visit.complaints.clear()


def test_video_and_script_are_kept_and_a_script_is_opened(visit, server, tmp_path):
    page = visit()
    act.start(page, DUSK)
    act.true(page, "longlive.player.playing.index > 20")
    with page.expect_download() as got:
        page.locator("#video").click()
    with av.open(str(got.value.path())) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) > 20 and act.sky(DUSK)(frames[0].astype(np.float32))
    with page.expect_download() as got:
        page.locator("#script").click()
    script = json.loads(got.value.path().read_text())
    assert script["start"]["prompt"] == DUSK
    assert got.value.suggested_filename.endswith("script.json")
    file = tmp_path / "script.json"
    file.write_text(json.dumps(script))
    before = len(server.streams)
    page.set_input_files("#script-file", file)
    act.waits(page, lambda: server.newest.number > before, "the script's stream")
    assert server.newest.body["prompt"] == DUSK


def test_seed_steps_and_guidance_reach_the_server(visit, server):
    page = visit()
    page.fill("#seed", "7")
    page.fill("#steps", "2")
    page.fill("#guidance", "3.5")
    act.start(page, DUSK)
    body = server.newest.body
    assert (body["seed"], body["steps"], body["guidance"]) == (7, 2, 3.5)
    assert page.locator("#seed").is_disabled()


def test_steps_and_guidance_of_a_running_film(visit, server):
    page = visit()
    act.start(page, DUSK)
    change = lambda name, value: (page.fill(name, value), page.keyboard.press("Tab"))  # noqa: E731
    change("#steps", "8")
    act.waits(page, lambda: server.newest.settings["steps"] == 8, "the steps")
    act.true(page, "/^8 steps from chunk \\d+$/.test(document.querySelector('#changed').innerText)")
    change("#guidance", "5.5")
    act.waits(page, lambda: server.newest.settings["guidance"] == 5.5, "the guidance")
    act.screenshot(page, "film_settings")
    change("#steps", "7")  # not compiled
    page.wait_for_selector("#error:not([hidden])")
    assert "one of 2, 4, 8" in page.locator("#error").inner_text()
    act.true(page, "document.querySelector('#steps').value === '8'")
    change("#guidance", "31")  # over the field's limit: not sent
    act.true(page, "document.querySelector('#guidance').value === '5.5'")
    page.reload()
    act.true(page, "document.querySelector('#steps').value === '8'")
    assert page.input_value("#guidance") == "5.5"
    assert server.newest.settings == {"steps": 8, "guidance": 5.5}
