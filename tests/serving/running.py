"""A server of a small model in this process, asked over real sockets."""

import contextlib
import json
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import uvicorn
import websockets.sync.client

from longlive_jax import load_config
from longlive_jax.pipeline import Pipeline
from longlive_jax.serving.models import Model
from longlive_jax.serving.server import Server
from tests.launch.commands import ACTIONS, ROOT, save_tiny

# Small pictures.
QUICK = {"sample.steps": 1, "video.height": 32, "video.width": 64, "dtype": "float32"}
PROMPTS = ("A red circle moves to the right.", "A blue star falls.", "A pink moon gets bigger.")


def model(folder, steps=(), **overrides) -> Model:
    """Random weights; overrides: of the config, with double underscores for points."""
    return _shapes("tiny", save_tiny(folder / "checkpoint"), steps, overrides)


def shipped(steps=(), **overrides) -> Model:
    """The networks that are shipped, which compile for longer."""
    return _shapes("train_ar_tiny_world", ROOT / "assets/tiny_world/checkpoint", steps, overrides)


def _shapes(config, checkpoint, steps, overrides):
    settings = QUICK | {name.replace("__", "."): value for name, value in overrides.items()}
    pipeline = Pipeline(checkpoint, load_config(ROOT / f"configs/{config}.py", settings))
    return Model("shapes", "Moving shapes", pipeline, prompts=PROMPTS, steps=steps)


def world(folder) -> Model:
    """Random weights with an action path; a chunk has 8 pictures."""
    settings = ACTIONS | {
        "sample.steps": 1, "video.height": 32, "video.width": 64, "dtype": "float32",
        "model.chunk_frames": 2, "sample.window_frames": 8, "sample.sink_frames": 2,
        "actions.window": 4,
    }  # fmt: skip
    cfg = load_config(ROOT / "configs/tiny.py", settings)
    checkpoint = save_tiny(folder / "checkpoint", overrides=settings)
    return Model("walk", "A walk", Pipeline(checkpoint, cfg), prompts=("A plain.",))


class Running:
    """A server that listens; `latents` are those of each stream's chunks, by id."""

    def __init__(self, model, folder, limits, token="", **options):
        self.latents, self.token, self.keep = {}, token, True
        self.server = Server(
            {model.name: model}, folder, limits, token=token, observe=self._observe, **options
        )
        config = uvicorn.Config(
            self.server.app, port=0, log_level="error", ws_max_size=limits.message_bytes,
            timeout_graceful_shutdown=2,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run)
        self._thread.start()
        until(lambda: self._uvicorn.started)
        self.port = self._uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def _observe(self, stream, chunk):
        if self.keep:
            self.latents.setdefault(stream.id, []).append(np.asarray(chunk.latents)[0])

    @property
    def scheduler(self):
        return self.server.scheduler

    def stop(self):
        self._uvicorn.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def ask(self, path, body=None, method=None, headers=None):
        """(status, JSON or bytes)."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = dict(headers or {})
        if self.token and "Authorization" not in headers:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                status, kind, content = answer.status, answer.headers["content-type"], answer.read()
        except urllib.error.HTTPError as error:
            status, kind, content = error.code, error.headers["content-type"], error.read()
        return status, json.loads(content) if kind and "json" in kind else content

    def begin(self, **body):
        """The id of a new stream."""
        status, answer = self.ask("/streams", {"prompt": PROMPTS[0]} | body)
        assert status == 201, answer
        return answer["id"]

    @contextlib.contextmanager
    def watch(self, id, query="", **options):
        url = f"ws://127.0.0.1:{self.port}/streams/{id}?{query}"
        options = {"compression": None, "close_timeout": 0.5} | options
        with websockets.sync.client.connect(url, **options) as socket:
            yield Watching(socket)

    def state(self, id):
        return self.ask(f"/streams/{id}")[1]

    def finished(self, id, seconds=60):
        until(lambda: self.state(id)["state"] == "ended", seconds)
        return self.state(id)


class Watching:
    """A polite viewer."""

    def __init__(self, socket):
        self.socket, self.texts, self.pictures = socket, [], []

    def say(self, **message):
        self.socket.send(json.dumps(message))

    def next(self, kind=None, timeout=60):
        """The next message of a type, or the next picture; all others are kept."""
        from longlive_jax.serving import messages

        while True:
            message = self.socket.recv(timeout)
            if isinstance(message, str):
                message = json.loads(message)
                self.texts.append(message)
                if message["type"] == kind:
                    return message
            else:
                header, payload = messages.unpack(message)
                self.pictures.append((header, payload))
                if header.frame % 8 == 0:
                    self.say(type="seen", frame=header.frame)
                if kind is None:
                    return header, payload

    def chunk(self, number):
        """Reads until a chunk begins; its first picture."""
        while True:
            header, payload = self.next()
            if header.chunk >= number:
                return header, payload


def until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)
