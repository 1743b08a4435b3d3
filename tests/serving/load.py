"""Many viewers of one server, half of them rude:

    python -m tests.serving.load --minutes=10

The server is a process of its own (`launch.serve`, the shipped world at 32 x 64, one step), with a
token. A polite viewer reads, says what it has seen, and changes the prompt now and then. A rude one
never reads, vanishes, floods, sends rubbish, or has a wrong token, again and again. Prints figures,
and fails where the server crashed, its memory grew, or a polite viewer got less than 0.8 of its fair
share: the chunks of all streams by the number of viewers.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import websockets.asyncio.client
import websockets.exceptions

from longlive_jax.serving import messages
from tests.launch.commands import ROOT
from tests.serving.running import PROMPTS, QUICK

TOKEN = "a-token-of-the-test"
GONE = (websockets.exceptions.WebSocketException, OSError, TimeoutError, EOFError)
RUDE = ("never reads", "vanishes", "floods", "sends rubbish", "has a wrong token")


@dataclasses.dataclass
class Figures:
    """made: chunks of each polite stream in the time that is measured. total: of all streams, of so
    many viewers at a time.

    memory: bytes, at equal distances. seconds: of the time that is measured. rude: how often
    something rude was done. answers: what is unexpected of the server.
    """

    made: list[int]
    total: int
    viewers: int
    memory: list[int]
    seconds: float
    rude: dict[str, int]
    refused: dict[str, int]
    ended: dict[str, int]
    answers: list[str]

    @property
    def share(self) -> float:
        """The least of the polite ones' chunks, as a part of what is fair: all chunks, by the number
        of viewers."""
        return min(self.made) / max(self.fair, 1e-9)

    @property
    def fair(self) -> float:
        return self.total / self.viewers

    @property
    def slope(self) -> float:
        """Bytes a minute, by the median of the slopes of all pairs in the last two thirds."""
        late = self.memory[len(self.memory) // 3 :]
        pairs = [(b - a) / (j - i) for (i, a), (j, b) in itertools.combinations(enumerate(late), 2)]
        return statistics.median(pairs) * 60 * len(self.memory) / self.seconds

    def check(self, grown: float = 0.02) -> None:
        """grown: the part of its memory that the server may gain in the time, by the slope."""
        assert not self.answers, self.answers
        assert min(self.made) >= 0.8 * self.fair - 1, self  # one may be under way
        assert min(self.made) >= 2
        gained = self.slope * self.seconds / 60
        assert gained < grown * statistics.mean(self.memory), (self.slope, self.memory)

    def text(self) -> str:
        memory = [size / 1e6 for size in self.memory]
        return "\n".join(
            [
                f"{self.seconds:.0f} s; chunks of the {len(self.made)} polite: {sorted(self.made)}",
                f"all streams: {self.total} chunks, fair {self.fair:.1f}; least share {self.share:.2f}",
                f"memory {memory[0]:.0f} MB first, {memory[len(memory) // 3]:.0f} after a third, "
                f"{memory[-1]:.0f} last, slope {self.slope / 1e6:+.3f} MB a minute",
                f"rude: {self.rude}; refused: {self.refused}; streams that ended: {self.ended}",
            ]
        )


class Server:
    """`launch.serve` as a process."""

    def __init__(self, folder, streams):
        flags = [
            "--config=configs/train_ar_tiny_world.py", "--checkpoint=assets/tiny_world/checkpoint",
            *(f"--config.{name}={value}" for name, value in QUICK.items()),
            "--port=0", f"--token={TOKEN}", f"--streams={streams}", "--idle=20", f"--output={folder}",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launch.serve", *flags], cwd=ROOT, text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.url = self.process.stdout.readline().split()[0]
        self.log = []
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self._reader.start()
        end = time.monotonic() + 600
        while self.ask("/readyz")[0] != 200:
            assert self.process.poll() is None and time.monotonic() < end, self.log
            time.sleep(0.5)

    def ask(self, path, body=None, method=None, token=TOKEN):
        """(status, bytes)."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def state(self, id):
        return json.loads(self.ask(f"/streams/{id}")[1])

    def begin(self, prompt):
        status, answer = self.ask("/streams", {"prompt": prompt})
        return json.loads(answer)["id"] if status == 201 else None

    def counters(self, name, label):
        text = self.ask("/metrics")[1].decode()
        found = re.findall(rf'^longlive_{name}_total{{{label}="(.*?)"}} (\S+)$', text, re.M)
        return {key: int(float(value)) for key, value in found}

    def number(self, name):
        text = self.ask("/metrics")[1].decode()
        return int(float(re.search(rf"^longlive_{name} (\S+)$", text, re.M)[1]))

    def watch(self, id, token=TOKEN):
        url = f"{self.url.replace('http', 'ws', 1)}/streams/{id}?token={token}"
        return websockets.asyncio.client.connect(url, compression=None, close_timeout=1)

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        self._reader.join(10)


async def polite(server, id, begun):
    async with server.watch(id) as socket:
        count = 0
        async for message in socket:
            if isinstance(message, str):
                continue
            begun.set()
            picture, _ = messages.unpack(message)
            if picture.frame % 8 == 0:
                await socket.send(json.dumps({"type": "seen", "frame": picture.frame}))
            if picture.frame % 200 == 0:
                count += 1
                text = PROMPTS[count % len(PROMPTS)]
                change = {"type": "prompt", "text": text, "mode": "cut", "event_id": count}
                await socket.send(json.dumps(change))


async def rude(server, kind, done):
    draw = random.Random(kind)
    while True:
        ask = asyncio.to_thread(server.begin, draw.choice(PROMPTS))
        id = await ask
        with contextlib.suppress(*GONE):
            await _misbehave(server, kind, id or "none", draw)
        done[RUDE[kind]] += 1
        if id:
            await asyncio.to_thread(server.ask, f"/streams/{id}", None, "DELETE")
        await asyncio.sleep(0.2)


async def _misbehave(server, kind, id, draw):
    if RUDE[kind] == "has a wrong token":
        for token in ("", "a-token-of-the-tesT", "x" * 500):
            status, _ = await asyncio.to_thread(server.ask, f"/streams/{id}", None, None, token)
            assert status == 401
            with contextlib.suppress(*GONE):
                async with server.watch(id, token) as socket:
                    raise AssertionError(f"let in: {await socket.recv()!r}")
        return
    async with server.watch(id) as socket:
        if RUDE[kind] == "never reads":
            await asyncio.sleep(5)
        elif RUDE[kind] == "vanishes":
            await asyncio.wait_for(socket.recv(), 5)
            socket.transport.abort()
        elif RUDE[kind] == "floods":
            for _ in range(2000):
                await socket.send('{"type": "keyframe"}')
        else:
            for _ in range(30):
                await socket.send(
                    draw.choice(["{", "[]", '{"type": 5}', "\0", "x" * 2000, b"\xff"])
                )
                await socket.send(json.dumps({"type": "prompt", "text": "x" * 5000}))
                await asyncio.sleep(0.05)


async def _run(server, streams, seconds):
    answers, done = list[str](), dict.fromkeys(RUDE, 0)
    ids = [await asyncio.to_thread(server.begin, PROMPTS[0]) for _ in range(streams // 2)]
    begun = [asyncio.Event() for _ in ids]
    tasks = [asyncio.create_task(polite(server, *pair)) for pair in zip(ids, begun)]
    tasks += [
        asyncio.create_task(rude(server, i % len(RUDE), done))
        for i in range(streams - streams // 2)
    ]
    await asyncio.wait_for(asyncio.gather(*(event.wait() for event in begun)), 300)

    def chunks():
        return [server.state(id)["chunk"] for id in ids]

    def total():
        return server.number("chunks_total")

    first, all_first, begin, memory = await asyncio.to_thread(chunks), total(), time.monotonic(), []
    period = max(0.5, seconds / 120)
    while (now := time.monotonic() - begin) < seconds:
        await asyncio.sleep(min(period, seconds - now))
        status, _ = await asyncio.to_thread(server.ask, "/healthz")
        memory.append(await asyncio.to_thread(server.number, "memory_bytes"))
        if status != 200:
            answers.append(f"/healthz: {status}")
        for task in tasks:
            if task.done():
                answers.append(f"a viewer ended: {task.exception()!r}")
        if server.process.poll() is not None or answers:
            answers.append(f"exit code {server.process.poll()}: {server.log[-5:]}")
            break
    last = await asyncio.to_thread(chunks)
    measured, all_last = time.monotonic() - begin, total()
    states = [await asyncio.to_thread(server.state, id) for id in ids]
    answers += [f"a polite stream ended: {s['reason']}" for s in states if s["state"] == "ended"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    made = np.subtract(last, first).tolist()
    return Figures(
        made, all_last - all_first, streams, memory, measured, done, server.counters("refused", "status"),
        server.counters("streams_ended", "reason"), answers,
    )  # fmt: skip


def run(streams: int, seconds: float, folder) -> Figures:
    server = Server(folder, streams)
    try:
        figures = asyncio.run(_run(server, streams, seconds))
    finally:
        server.stop()
    figures.answers += [line for line in server.log if "Traceback" in line]
    return figures


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--streams", type=int, default=50)
    given = parser.parse_args(args)
    with tempfile.TemporaryDirectory() as folder:
        figures = run(given.streams, 60 * given.minutes, folder)
    print(figures.text())
    figures.check()


if __name__ == "__main__":
    main()
