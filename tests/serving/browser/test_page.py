"""Both modes: reload, reconnect, no WebCodecs, tokens, keyboard, screen readers, widths, themes."""

import os
import pathlib

import numpy as np
import pytest

from tests.serving.browser import act, conftest

DUSK = "A lighthouse at dusk, waves below."
KEEPER = "Inside, a keeper lights the lamp."
PLAIN = "A wide plain before the hills."


def test_a_reload_finds_the_stream_again(visit, server):
    page = visit()
    act.start(page, DUSK)
    page.reload()
    act.true(page, "Boolean(longlive.player?.playing)")
    stream = server.newest
    act.waits(page, lambda: page.evaluate("longlive.player.playing.index") > 5, "later pictures")
    assert page.evaluate("longlive.player.id") == f"s{stream.number}"
    assert DUSK in page.locator("#shots").inner_text()
    act.direct(page, KEEPER, "cut")
    act.until(page, act.sky(KEEPER), "a prompt after the reload")


def test_a_broken_line_mends_itself(visit, server):
    page = visit()
    act.start(page, DUSK)
    index = page.evaluate("longlive.player.playing.index")
    server.disconnect(server.newest)
    act.true(page, f"longlive.player.playing.index > {index} + 60")
    assert page.locator("#link").get_attribute("data-link") == "open"
    act.direct(page, KEEPER, "cut")
    act.until(page, act.sky(KEEPER), "a prompt after that")


def test_a_stream_that_is_gone_is_said(visit, server):
    page = visit()
    act.start(page, DUSK)
    stream = server.newest
    del server.streams[f"s{stream.number}"]
    server.disconnect(stream)
    page.wait_for_selector("#error:not([hidden])")
    assert "no longer has this stream" in page.locator("#error").inner_text()
    assert page.locator("html").get_attribute("data-state") == "idle"
    assert any("404" in line or "403" in line for line in visit.complaints)
    visit.complaints.clear()


@pytest.mark.parametrize("how", ["asked", "missing"])
def test_without_webcodecs_pictures_are_jpeg(visit, server, how):
    url = server.url + ("?format=jpeg" if how == "asked" else "")
    page = visit(url, script="delete globalThis.VideoDecoder;" if how == "missing" else None)
    act.start(page, DUSK)
    first = act.until(page, act.sky(DUSK), "the prompt's colours")
    assert server.newest.jpeg and page.evaluate("longlive.player.format") == "jpeg"
    act.until(page, lambda seen: np.abs(seen - first).mean() > 0.3, "another picture")


def test_a_damaged_picture_is_mended_by_a_key_frame(visit, server):
    page = visit()
    act.start(page, DUSK)
    index = page.evaluate("longlive.player.playing.index")
    page.evaluate("longlive.player.decoder.fail()")
    act.true(page, f"longlive.player.playing.index > {index} + 60")
    assert page.evaluate("longlive.player.format") == "h264"


def test_a_key_frame_that_was_lost_is_asked_for_again(visit, server):
    page = visit()
    act.start(page, DUSK)
    index = page.evaluate("longlive.player.playing.index")
    page.evaluate("longlive.player.decoder.reset()")
    act.true(page, f"longlive.player.playing.index > {index} + 60")


def test_the_page_waits_for_the_compiler(visit, server):
    page = visit()
    asked = []

    def answer(route):
        asked.append(route)
        route.fulfill(status=503 if len(asked) < 3 else 200, json={"ready": False})

    page.route("**/readyz", answer)
    page.reload()
    act.true(page, "document.querySelector('#notice').textContent.includes('compiles')")
    assert page.locator("#go").is_disabled()
    page.wait_for_selector("[data-ready]", state="attached")
    assert page.locator("#go").is_enabled() and page.locator("#notice").is_hidden()
    assert len(asked) == 3
    assert all("503" in line for line in visit.complaints)
    visit.complaints.clear()


@pytest.fixture(scope="module")
def guarded():
    yield from conftest.serve(token="a-secret")


def test_a_token_is_asked_for_and_kept(visit, guarded):
    page = visit(guarded.url, ready=False)
    page.wait_for_selector("#token-dialog[open]")
    page.fill("#token", "a-secret")
    page.keyboard.press("Enter")
    act.start(page, DUSK)
    act.until(page, act.sky(DUSK), "pictures")
    page.reload()
    act.true(page, "Boolean(longlive.player?.playing)")
    act.start(visit(guarded.url + "#token=a-secret"), KEEPER)


def test_the_keyboard_alone_directs_a_film(visit, server):
    page = visit()
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        names.append(
            page.evaluate(
                "document.activeElement.id || document.activeElement.name || document.activeElement.className"
            )
        )
        if names[-1] == "prompt":
            break
    assert names[0] == "skip" and names[-1] == "prompt", names
    page.keyboard.type(DUSK)
    page.keyboard.press("Enter")
    act.true(page, "Boolean(longlive.player.playing)")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.querySelector('input[name=how]:checked').value") == "cut"
    page.keyboard.press("Shift+Tab")
    page.keyboard.type(KEEPER)
    page.keyboard.press("Enter")
    act.until(page, act.sky(KEEPER), "the cut")
    assert KEEPER in page.locator("#live").text_content()


def test_landmarks_names_and_live_regions(visit):
    page = visit()
    roles = page.evaluate(
        "['header', 'main', 'aside[aria-label]', '[role=status]', '[role=alert]', 'form[aria-label]', 'h1', 'canvas[aria-label]']"
        ".map((s) => document.querySelectorAll(s).length)"
    )
    assert min(roles) >= 1
    for mode in ("film", "world"):
        page.locator(f"input[name=mode][value={mode}]").check(force=True)
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea")]
            .filter((e) => e.offsetParent && !(e.getAttribute("aria-label") || e.textContent.trim()
              || e.labels?.[0]?.textContent.trim())).map((e) => e.outerHTML)"""
        )
        assert nameless == []


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (colour, under) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const c of [under, colour]) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (!/, 0\\)$|^transparent/.test(c)) return c;
    }
  };
  const bad = [];
  for (const e of document.querySelectorAll(".panel *, .top *, .composer *, .transport *")) {
    const words = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!words || !e.offsetParent || e.closest(":disabled, option, .visually-hidden")) continue;
    const [a, b] = [light(getComputedStyle(e).color, "#000"), light(ground(e), "#000")];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push(`${e.className || e.tagName} ${e.textContent.trim()}: ${ratio.toFixed(2)}`);
  }
  return bad;
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_stand_out_in_either_theme(visit, theme):
    page = visit(color_scheme=theme)
    for mode in ("film", "world"):
        page.locator(f"input[name=mode][value={mode}]").check(force=True)
        assert page.evaluate(CONTRAST) == []


def test_the_theme_follows_the_system_or_the_switch(visit):
    page = visit(color_scheme="dark")
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    dark = ground()
    page.locator("#theme").click()
    light = ground()
    assert dark == "rgb(18, 18, 17)" and light == "rgb(246, 245, 242)"
    page.reload()
    assert ground() == light
    page.locator("#theme").click()
    assert ground() == dark


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
@pytest.mark.parametrize("mode", ["film", "world"])
def test_nothing_hangs_out_of_the_page(visit, width, mode):
    page = visit(viewport={"width": width, "height": 800})
    page.locator(f"input[name=mode][value={mode}]").check(force=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    mark, theme = (page.locator(s).bounding_box() for s in (".mark", "#theme"))
    assert abs(theme["y"] - mark["y"]) < 30 or width < 390, "the head is one line"


PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.mark.parametrize("name", ["light", "dark", "phone"])
@pytest.mark.parametrize("mode", ["film", "world"])
def test_screenshots(visit, server, tmp_path, mode, name):
    """Written to LONGLIVE_SCREENSHOTS, where it is set."""
    folder = pathlib.Path(os.environ.get("LONGLIVE_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page = visit(
        color_scheme="dark" if name == "dark" else "light", **(PHONE if name == "phone" else {})
    )
    act.start(page, DUSK if mode == "film" else PLAIN, mode)
    if mode == "film":
        page.locator("input[name=how][value=cut]").check(force=True)
        for prompt in (KEEPER, "The keeper turns to the window; a ship far out."):
            page.fill("#prompt", prompt)
            page.locator("#later").click()
    else:
        page.locator("#screen").focus()
        page.keyboard.down("w")
        act.waits(page, lambda: server.newest.scene.y > 2, "a walk")
    page.wait_for_timeout(700)
    page.screenshot(path=folder / f"{mode}_{name}.png")
    assert (folder / f"{mode}_{name}.png").stat().st_size > 10_000
