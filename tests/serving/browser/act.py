"""What a person does on the page, and what can be seen there."""

import base64
import contextlib
import json
import os
import time

import numpy as np

from tests.serving.browser import scenes

# [bytes, name, type] of a file that is dropped on the picture.
DROP = """([bytes, name, type]) => {
  const data = new DataTransfer();
  data.items.add(new File([new Uint8Array(bytes)], name, { type }));
  for (const kind of ["dragover", "drop"])
    document.querySelector("#frame").dispatchEvent(
      new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
}"""


def start(page, prompt, mode="film"):
    if mode != "film":
        page.locator(f"input[name=mode][value={mode}]").check(force=True)
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    true(page, "Boolean(longlive.player.playing)")


def direct(page, prompt, how):
    page.locator(f"input[name=how][value={how}]").check(force=True)
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")


def picture(page) -> np.ndarray:
    """The canvas, RGB [height, width, 3], 0 to 255."""
    data = page.evaluate(
        """() => { const c = document.querySelector("#screen");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height);
        let s = ""; for (let i = 0; i < d.data.length; i += 8192)
          s += String.fromCharCode(...d.data.subarray(i, i + 8192));
        return [c.height, c.width, btoa(s)]; }"""
    )
    height, width, text = data
    flat = np.frombuffer(base64.b64decode(text), np.uint8)
    return flat.reshape(height, width, 4)[..., :3].astype(np.float32)


def true(page, expression, seconds=60.0):
    """Waits for it: wait_for_function would need the eval that the page's policy forbids."""
    waits(page, lambda: page.evaluate(expression), expression, seconds)


def until(page, true, what, seconds=60.0):
    """The first picture for which `true(picture)`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seen = picture(page)
        if true(seen):
            return seen
        page.wait_for_timeout(60)
    raise AssertionError(f"not seen in {seconds} s: {what}")


def waits(page, true, what, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not in {seconds} s: {what}"
        page.wait_for_timeout(50)


def sky(prompt):
    """Whether a picture has the prompt's sky (its upper right corner, far from the sun)."""
    wanted = scenes.palette(prompt)[0]
    return lambda seen: np.abs(seen[2:6, -12:-4].mean((0, 1)) - wanted).max() < 14


def beacon(seen):
    """Pixels of the beacon, and the column of their middle."""
    mask = np.abs(seen - np.asarray(scenes.BEACON, np.float32)).max(-1) < 60
    return int(mask.sum()), float(np.nonzero(mask)[1].mean()) if mask.any() else None


def screenshot(page, name):
    """Written to LONGLIVE_SCREENSHOTS, where it is set."""
    if folder := os.environ.get("LONGLIVE_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/{name}.png")


@contextlib.contextmanager
def held(page, *keys):
    for key in keys:
        page.keyboard.down(key)
    yield
    for key in keys:
        page.keyboard.up(key)


def replay(page, script, latents, folder):
    """Opens a script: what the page then watches has the latents of what it watched.

    latents: of each chunk, by the stream's id.
    """
    old = page.evaluate("longlive.player.id")
    file = folder / "script.json"
    file.write_text(json.dumps(script))
    page.set_input_files("#script-file", file)
    true(page, f"longlive.player.id !== '{old}'")
    new = page.evaluate("longlive.player.id")
    chunks = sum(shot["chunks"] for shot in script["shots"])
    waits(page, lambda: len(latents.get(new, ())) >= chunks, "the script's chunks", 180)
    for before, after in zip(latents[old][:chunks], latents[new]):
        np.testing.assert_array_equal(before, after)
