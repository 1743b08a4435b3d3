"""Many streams at once, half of their viewers rude: the polite ones are served by turns."""

import contextlib
import json
import random
import statistics
import threading
import time

import pytest
import websockets.exceptions

from longlive_jax.serving import metrics
from longlive_jax.serving.limits import Limits
from tests.serving import running
from tests.serving.running import PROMPTS, until

GONE = (websockets.exceptions.WebSocketException, OSError, TimeoutError)


def polite(server, id, end, failures):
    try:
        with server.watch(id) as viewer:
            count = 0
            while time.monotonic() < end:
                header, _ = viewer.next(timeout=120)
                viewer.pictures.clear()
                viewer.texts.clear()
                if header.frame % 200 == 0:
                    count += 1
                    prompt = PROMPTS[count % len(PROMPTS)]
                    viewer.say(type="prompt", text=prompt, mode="cut", event_id=count)
    except Exception as error:
        failures.append(repr(error))


def rude(server, kind, end):
    """Never reads, vanishes, floods, sends rubbish or a wrong id, again and again."""
    draw = random.Random(kind)
    while time.monotonic() < end:
        with contextlib.suppress(*GONE, AssertionError):
            id = server.begin(prompt=draw.choice(PROMPTS))
            with server.watch(id) as viewer:
                if kind == 0:  # never reads
                    time.sleep(5)
                elif kind == 1:  # vanishes
                    viewer.next(timeout=5)
                    viewer.socket.socket.close()
                elif kind == 2:  # floods
                    for _ in range(2000):
                        viewer.say(type="keyframe")
                elif kind == 3:
                    for _ in range(30):
                        viewer.socket.send(
                            draw.choice(["{", "[]", '{"type": 5}', "\0", "x" * 2000])
                        )
                        viewer.socket.send(json.dumps({"type": "prompt", "text": "x" * 5000}))
                        time.sleep(0.05)
            with contextlib.suppress(*GONE), server.watch("../" + id) as viewer:
                viewer.next(timeout=2)
            server.ask(f"/streams/{id}", method="DELETE")
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("streams, seconds", [(10, 60), (50, 600)])
def test_half_of_them_rude(streams, seconds, tmp_path):
    limits = Limits(streams=streams, waiting=streams, idle_s=20, total_s=10 * seconds,
                    chunks=100_000, kept=20)  # fmt: skip
    server = running.Running(running.model(), tmp_path, limits)
    server.keep = False
    until(lambda: server.ask("/readyz")[0] == 200, 600)
    end, failures = time.monotonic() + seconds, []
    ids = [server.begin() for _ in range(streams // 2)]
    threads = [threading.Thread(target=polite, args=(server, id, end, failures)) for id in ids]
    threads += [
        threading.Thread(target=rude, args=(server, i % 4, end)) for i in range(streams // 2)
    ]
    for thread in threads:
        thread.start()
    memory, made = [], []
    try:
        while time.monotonic() < end - 1:
            time.sleep(1)
            assert server.ask("/healthz")[0] == 200
            memory.append(metrics.memory())
            made = [server.state(id)["chunk"] for id in ids]
    finally:
        for thread in threads:
            thread.join(150)
        states = [server.state(id) for id in ids]
        server.stop()
    assert not failures
    assert all(state["reason"] in ("", "deleted") for state in states), states
    print(f"chunks of the polite: {sorted(made)}; memory {min(memory):.3e} to {max(memory):.3e}")
    assert min(made) >= 0.8 * statistics.mean(made) and min(made) >= 2
    third = len(memory) // 3
    middle, last = (statistics.median(part) for part in (memory[third:-third], memory[-third:]))
    assert last < 1.03 * middle + 20e6
