"""`launch.serve` as a process: refusals, SIGTERM, kill -9 and what is left."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from examples import live_client
from longlive_jax.data.video_reader import probe
from tests.launch.commands import ROOT, run
from tests.serving.running import PROMPTS, QUICK, until

SMALL = [
    "--config=configs/train_ar_tiny_world.py", "--checkpoint=assets/tiny_world/checkpoint",
    *(f"--config.{name}={value}" for name, value in QUICK.items()), "--port=0",
]  # fmt: skip


class Process:
    def __init__(self, folder):
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", *SMALL, f"--output={folder}"], cwd=ROOT,
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.url = self.process.stdout.readline().split()[0]
        until(lambda: self.process.poll() is not None or self.ready(), 300)

    def ready(self):
        try:
            return bool(self.get("/readyz"))
        except OSError:  # 503
            return False

    def get(self, path, body=None):
        return json.loads(live_client.ask(self.url + path, body))

    def end(self, number):
        """The seconds that it took, and its exit code."""
        begin = time.monotonic()
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        assert "Traceback" not in err and not any(prompt in err for prompt in PROMPTS), err
        return time.monotonic() - begin, self.process.returncode


@pytest.mark.slow
def test_killed_and_told_to_stop(tmp_path):
    """After kill -9 streams go on from their scripts; SIGTERM leaves a video that plays."""
    server = Process(tmp_path)
    applied = live_client.main(tmp_path / "client.mp4", server.url, 3)
    assert [event for event, *_ in applied] == [1, 2]
    assert all(frame == 32 * chunk - 3 for _, chunk, frame in applied)
    assert probe(tmp_path / "client.mp4").frames > 3 * 32 - 3
    shots = [{"prompt": PROMPTS[0], "chunks": 2}, {"prompt": PROMPTS[1], "chunks": 1000}]
    id = server.get("/streams", {"shots": shots, "seed": 9})["id"]
    path = tmp_path / f"{id}.mp4"
    until(lambda: server.get(f"/streams/{id}")["chunk"] >= 4)
    assert server.end(signal.SIGKILL)[1] == -signal.SIGKILL
    assert probe(path).frames >= 60
    killed, index = path.read_bytes(), json.loads((tmp_path / f"{id}.json").read_text())["index"]

    server = Process(tmp_path)
    until(lambda: server.get(f"/streams/{id}")["chunk"] > index + 1)
    script = server.get(f"/streams/{id}/script.json")
    assert [shot["prompt"] for shot in script["shots"]] == [PROMPTS[0], PROMPTS[1]]
    seconds, code = server.end(signal.SIGTERM)
    assert seconds < 10 and code == 143
    again = path.read_bytes()
    # The pictures are those of before: not one byte of the video differs.
    assert again.startswith(killed[: len(killed) // 2]) and len(again) > len(killed)
    until(lambda: probe(path).frames >= 32 * (index + 1))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--host=0.0.0.0"], "others can reach it, so it needs --token"),
        (["--host=0.0.0.0", "--token=short"], "at least 8"),
        (["--token=with a blank"], "visible ASCII"),
        (["--config=configs/tiny.py"], "--checkpoint is missing"),
        (["--steps=two"], "must be whole numbers"),
        (["--host=192.0.2.1", "--token=0123456789"], "give another --port"),
    ],
)
def test_refused(flags, message, tmp_path):
    done = run("serve", *flags, f"--output={tmp_path}/out", check=False)
    assert done.code == 2 and message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("serve", f"--port={port}", f"--output={tmp_path}/out", check=False)
    assert done.code == 2 and "Address already in use; give another --port" in done.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": {"sample.steps": 7}}, "give --config.sample.steps=7"),
        ({"begins_with": "clip"}, "give it as --continue_from"),
    ],
)
def test_a_script_under_another_config_is_refused(change, message, tmp_path):
    script = {"format": "longlive_jax script", "shots": [{"prompt": PROMPTS[0], "chunks": 1}]}
    path = tmp_path / "script.json"
    path.write_text(json.dumps(script | change))
    flags = [f"--prompts={path}", f"--output={tmp_path}/out.mp4"]
    done = run("sample", *SMALL[:-1], *flags, check=False)
    assert done.code == 2 and message in done.stderr
