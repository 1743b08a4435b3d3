"""kill -9 of a real process, and another one that goes on: the same latents."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import websockets.sync.client

from examples import live_client
from tests.launch.commands import ROOT
from tests.serving.running import PROMPTS, Watching, until


class Process:
    def __init__(self, folder):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.serving.kept", str(folder)], cwd=ROOT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.address = f"127.0.0.1:{int(self.process.stdout.readline())}"

    def ask(self, path, body=None):
        return json.loads(live_client.ask(f"http://{self.address}{path}", body))

    def chunk(self, id):
        return self.ask(f"/streams/{id}")["chunk"]

    def latents(self, id):
        """By chunk, those that this process made."""
        files = (self.folder / "latents").glob(f"{id}-*-{self.process.pid}.npy")
        return {int(path.stem[len(id) + 1 :].split("-")[0]): np.load(path) for path in files}

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)
        self.process.stdout.close()


@pytest.mark.slow
def test_streams_go_on_from_their_scripts_with_the_same_latents(tmp_path):
    """A script that nobody watches, and a stream that was directed: prompts, steps, a blend."""
    one = Process(tmp_path)
    shots = [{"prompt": PROMPTS[0], "chunks": 2}, {"prompt": PROMPTS[1], "chunks": 500, "steps": 2}]
    script = one.ask("/streams", {"shots": shots, "seed": 9})["id"]
    live = one.ask("/streams", {"prompt": PROMPTS[2], "seed": 3})["id"]
    with websockets.sync.client.connect(f"ws://{one.address}/streams/{live}") as socket:
        viewer = Watching(socket)
        for event, message in enumerate(
            [
                {"type": "prompt", "text": PROMPTS[0], "mode": "cut"},
                {"type": "settings", "steps": 2},
                {"type": "prompt", "text": PROMPTS[1], "mode": "blend", "chunks": 2},
            ],
            start=1,
        ):
            viewer.chunk(event - 1)
            viewer.say(event_id=event, **message)
            last = viewer.next("applied")["chunk"]
        viewer.chunk(last + 1)
        until(lambda: one.chunk(script) > 4)
        one.kill()
    before = {id: one.latents(id) for id in (script, live)}
    kept = {id: json.loads((tmp_path / f"out/{id}.json").read_text()) for id in before}

    two = Process(tmp_path)
    try:
        until(lambda: all(two.chunk(id) >= kept[id]["index"] for id in before), 120)
        until(lambda: two.chunk(script) > kept[script]["index"] + 1)
        until(lambda: all(len(two.latents(id)) >= kept[id]["index"] for id in before))
        for id, made in before.items():
            again = two.latents(id)
            assert kept[id]["index"] >= 4 and len(made) >= kept[id]["index"]
            for chunk in range(kept[id]["index"]):
                np.testing.assert_array_equal(made[chunk], again[chunk])
        assert max(two.latents(script)) > max(before[script])  # it goes on
        # What both made behind the file's index, too: the script says what comes.
        for chunk in set(before[script]) & set(two.latents(script)):
            np.testing.assert_array_equal(before[script][chunk], two.latents(script)[chunk])
        entries = two.ask(f"/streams/{live}/script.json")["shots"]
        assert any(entry.get("steps") == 2 for entry in entries)
        assert any("toward" in entry for entry in entries)
        assert two.ask(f"/streams/{live}")["steps"] == 2
        with websockets.sync.client.connect(f"ws://{two.address}/streams/{live}") as socket:
            Watching(socket).chunk(kept[live]["index"] + 1)  # and can be watched on
    finally:
        two.kill()
