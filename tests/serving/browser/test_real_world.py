"""World mode on the real server: a model of random weights that takes keys, graded by its script."""

import json

import pytest

from longlive_jax.serving.limits import Limits
from tests.serving import running
from tests.serving.browser import act
from tests.serving.browser.test_world import take, turn

PLAIN = "A red circle moves to the right."


@pytest.fixture(scope="module")
def real(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    one = running.Running(running.world(folder), folder / "out", Limits())
    running.until(lambda: one.ask("/readyz")[0] == 200, 300)
    yield one
    one.stop()


@pytest.fixture
def page(visit, real):
    page = visit(real.url + "/")
    assert page.locator("input[name=mode][value=film]").is_disabled()
    act.start(page, PLAIN)
    return page


def rows(page, real):
    """The actions of the stream so far; none before its first chunk."""
    stream = real.scheduler.streams[page.evaluate("longlive.player.id")]
    return stream.script().get("actions", [])


def w_is(page, real, *values):
    """Whether these are the newest states of W."""
    return [row["keyboard"][0] for row in rows(page, real)][-len(values) :] == list(values)


def test_w_and_the_mouse_are_applied_shown_and_kept(page, real, tmp_path):
    take(page)
    cap = "Boolean(document.querySelector('#caps [data-code=KeyW].applied'))"
    with act.held(page, "w"):
        act.true(page, cap)
        turn(page, 60)
    act.true(page, f"!{cap}")
    first = rows(page, real)
    walked = [row["keyboard"][0] for row in first]
    assert walked[0] == 0 and sum(walked) >= 4
    yaw = sum(row["mouse"][1] for row in first)
    assert 4 < yaw < 12  # 60 counts of 0.15 degrees, however the browser rounds them
    assert max(abs(row["mouse"][1]) for row in first) <= 12
    act.true(
        page, "/^\\d+\\.\\d+ s$/.test(document.querySelector('[data-number=action]').innerText)"
    )
    page.evaluate("document.exitPointerLock()")
    act.true(page, "!document.pointerLockElement")
    with page.expect_download() as got:
        page.locator("#script").click()
    script = json.loads(got.value.path().read_text())
    chunks = sum(shot["chunks"] for shot in script["shots"])
    assert len(script["actions"]) == 8 * chunks - 3
    act.replay(page, script, real.latents, tmp_path)


def test_a_lost_connection_lets_go_and_what_is_still_held_comes_again(page, real):
    page.locator("#screen").focus()
    cap = "document.querySelector('#caps [data-code=KeyW]').classList.contains('applied')"
    page.keyboard.down("w")
    act.true(page, cap)
    made = len(rows(page, real))
    page.evaluate("longlive.player.connection.socket.close()")
    act.waits(
        page,
        lambda: w_is(page, real, 0) or len(rows(page, real)) > made + 16,
        "the close",
    )
    act.waits(page, lambda: w_is(page, real, 1, 1), "W again")
    page.keyboard.up("w")
    act.true(page, f"!{cap}")


def test_new_words_while_walking_are_in_the_script(page, real):
    page.locator("#screen").focus()
    page.keyboard.down("w")
    act.waits(page, lambda: w_is(page, real, 1), "W")
    page.keyboard.press("/")
    page.keyboard.type("A blue star falls.")
    page.keyboard.press("Enter")
    stream = real.scheduler.streams[page.evaluate("longlive.player.id")]
    act.waits(page, lambda: len(stream.script()["shots"]) == 2, "the prompt")
    page.keyboard.up("w")
    assert stream.script()["shots"][1]["prompt"] == "First person. A blue star falls."
    act.waits(page, lambda: w_is(page, real, 0), "W is up")
