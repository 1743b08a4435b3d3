"""World mode in a browser, graded on the canvas: walking, looking, touch, gamepad, recording."""

import json

import pytest

from tests.serving.browser import act

PLAIN = "A wide plain before the hills."
SNOW = "Deep snow under a green sky."


@pytest.fixture
def world(visit, server):
    def go(**options):
        page = visit(**options)
        act.start(page, PLAIN, "world")
        act.until(page, lambda seen: act.beacon(seen)[0] > 0, "the beacon")
        return page

    return go


def take(page):
    page.locator("#screen").click()
    act.true(page, "document.pointerLockElement?.id === 'screen'")


def turn(page, dx, seconds=0.5):
    """The mouse moves by `dx`; a real one's movement, which pointer lock reports."""
    box = page.locator("#screen").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    for k in range(10):
        page.mouse.move(x + dx * (k + 1) / 10, y)
        page.wait_for_timeout(seconds * 100)


def test_w_walks_to_the_beacon_and_s_back(world, server):
    page = world()
    take(page)
    area, _ = act.beacon(act.picture(page))
    with act.held(page, "w"):
        near, _ = act.beacon(act.until(page, lambda s: act.beacon(s)[0] > 2 * area, "it grows"))
        act.true(page, "Boolean(document.querySelector('#caps [data-code=KeyW].applied'))")
    act.true(page, "!document.querySelector('#caps [data-code=KeyW].applied')")
    stands, _ = act.beacon(act.picture(page))
    with act.held(page, "s"):
        act.until(page, lambda s: act.beacon(s)[0] < stands, "it shrinks")
    assert near > area
    act.true(
        page,
        "/^0\\.\\d+ s$|^\\d+\\.\\d+ s$/.test(document.querySelector('[data-number=action]').innerText)",
    )


def test_the_mouse_to_the_right_turns_right(world, server):
    page = world()
    take(page)
    _, before = act.beacon(act.picture(page))
    turn(page, 60)
    _, after = act.beacon(
        act.until(page, lambda s: (act.beacon(s)[1] or 0) < before - 15, "it moves to the left")
    )
    assert server.newest.scene.heading > 0
    assert server.newest.scene.y == 0
    turn(page, -120)
    act.until(page, lambda s: (act.beacon(s)[1] or 999) > after + 15, "and back to the right")


def test_without_the_mouse_the_arrows_look(world, server):
    page = world()
    page.locator("#screen").focus()
    _, before = act.beacon(act.picture(page))
    with act.held(page, "ArrowRight"):
        act.until(page, lambda s: (act.beacon(s)[1] or 0) < before - 15, "it moves to the left")


def test_new_words_while_walking_on(world, server):
    page = world()
    take(page)
    page.keyboard.down("w")
    act.waits(page, lambda: server.newest.scene.y > 0, "the first step")
    page.keyboard.press("/")
    act.true(page, "document.activeElement.id === 'prompt' && !document.pointerLockElement")
    page.locator("input[name=person][value='Third person.']").check(force=True)
    page.locator("#prompt").focus()
    page.keyboard.type(SNOW)
    page.keyboard.up("w")
    before = server.newest.scene.y
    act.waits(page, lambda: server.newest.scene.y > before, "steps while words are typed")
    page.keyboard.press("Enter")
    act.waits(page, lambda: len(server.newest.script) == 2, "the prompt")
    assert server.newest.script[1]["prompt"] == f"Third person. {SNOW}"
    act.true(page, "document.activeElement.id === 'screen' && Boolean(document.pointerLockElement)")
    act.waits(page, lambda: server.newest.keys[0] == (), "W is up")


HIDE = """Object.defineProperty(document, "hidden", { get: () => true });
document.dispatchEvent(new Event("visibilitychange"));"""


@pytest.mark.parametrize(
    "leave", ["dispatchEvent(new Event('blur'))", HIDE], ids=["blur", "hidden"]
)
def test_leaving_the_window_lets_go_of_the_keys(world, server, leave):
    page = world()
    page.locator("#screen").focus()
    page.keyboard.down("w")
    act.waits(page, lambda: server.newest.keys[0] == ("KeyW",), "W")
    page.evaluate(leave)
    act.waits(page, lambda: server.newest.keys[0] == (), "nothing")


def test_a_recording_is_replayed_saved_and_loaded(world, server, tmp_path):
    page = world()
    page.locator("#screen").focus()
    with act.held(page, "w"):
        act.waits(page, lambda: server.newest.scene.y > 1, "some steps")
    act.waits(page, lambda: server.newest.keys[0] == (), "W is up")
    walked, first = server.newest.scene.y, server.newest
    with page.expect_download() as got:
        page.locator("#record-save").click()
    recording = json.loads(got.value.path().read_text())
    assert [event["codes"] for event in recording["events"]] == [["KeyW"], []]
    page.locator("#replay").click()
    act.waits(page, lambda: server.newest is not first, "another stream")
    act.waits(page, lambda: server.newest.scene.y > 0.7 * walked, "the same walk")
    file = tmp_path / "recording.json"
    file.write_text(json.dumps(recording))
    second = server.newest
    page.set_input_files("#record-file", file)
    act.waits(page, lambda: server.newest is not second, "a third stream")
    act.waits(page, lambda: server.newest.scene.y > 0, "it walks")
    assert server.newest.body["prompt"] == f"First person. {PLAIN}"


PAD = """navigator.getGamepads = () => [globalThis.pad ?? null, null, null, null];"""


def test_a_gamepad_walks_and_looks(world, server):
    page = world(script=PAD)
    page.evaluate("globalThis.pad = { connected: true, axes: [0, -1, 0.8, 0] }")
    act.waits(page, lambda: server.newest.scene.y > 0, "a step")
    act.waits(page, lambda: server.newest.scene.heading > 0.2, "a turn to the right")
    page.evaluate("globalThis.pad.axes = [0, 0.1, 0.1, 0]")
    act.waits(page, lambda: server.newest.keys[0] == (), "the stick at rest")


def test_touch_sticks_on_a_phone(world, server):
    page = world(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    stick = page.locator("#stick-move")
    stick.scroll_into_view_if_needed()
    box = stick.bounding_box()
    finger = {"identifier": 1, "x": box["x"] + box["width"] / 2, "y": box["y"] + 8}
    touch = page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
    act.waits(page, lambda: server.newest.keys[0] == ("KeyW",), "forward")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    act.waits(page, lambda: server.newest.keys[0] == (), "the stick at rest")
    box = page.locator("#stick-look").bounding_box()
    finger = {"x": box["x"] + box["width"] - 8, "y": box["y"] + box["height"] / 2}
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
    act.waits(page, lambda: server.newest.scene.heading > 0.1, "a turn to the right")
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def test_steps_and_guidance_are_changed_while_one_walks_and_recorded(world, server):
    page = world()
    page.fill("#guidance", "6")
    page.keyboard.press("Tab")
    act.waits(page, lambda: server.newest.settings["guidance"] == 6, "the guidance")
    page.locator("#steps").fill("2")
    page.keyboard.press("Enter")
    act.waits(page, lambda: server.newest.settings["steps"] == 2, "the steps")
    assert page.locator("#changed").is_visible()
    act.screenshot(page, "world_settings")
    events = page.evaluate("longlive.world.recording.events")
    assert [(e.get("steps"), e.get("guidance")) for e in events if e["type"] == "settings"] == [
        (None, 6), (2, None),
    ]  # fmt: skip
