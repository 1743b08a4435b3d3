"""Directs a stream of a running `python -m launch.serve`, and saves it as mp4.

python -m examples.live_client live.mp4 [http://127.0.0.1:8000]
"""

import json
import os
import sys
import urllib.request

from websockets.sync.client import connect

from longlive_jax.serving import messages

TOKEN = os.environ.get("LONGLIVE_TOKEN", "")
FIRST = "A red circle moves to the right over a grey background."
# By the chunk before: what is asked for when its first picture is here.
THEN = {
    0: {"text": "A red circle gets smaller over a grey background.", "mode": "continue"},
    1: {"text": "A blue star falls over a black background.", "mode": "cut"},
}


def ask(url, body=None, method=None):
    headers = {"Authorization": f"Bearer {TOKEN}"} if TOKEN else {}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method)) as done:
        return done.read()


def main(path, url="http://127.0.0.1:8000", chunks=4):
    id = json.loads(ask(f"{url}/streams", {"prompt": FIRST, "seed": 0}))["id"]
    stream, applied = f"{url}/streams/{id}", []
    address = f"{stream.replace('http', 'ws', 1)}?token={TOKEN}"
    with connect(address, compression=None, close_timeout=1) as socket:
        for message in socket:
            if isinstance(message, str):
                if (news := json.loads(message))["type"] == "applied":
                    applied.append((news["event_id"], news["chunk"], news["frame"]))
                continue
            picture, _ = messages.unpack(message)  # and an access unit for a decoder of H.264
            if picture.frame % 8 == 0:
                socket.send(json.dumps({"type": "seen", "frame": picture.frame}))
            if picture.flags & messages.FIRST and picture.chunk in THEN:
                then = {"type": "prompt", "event_id": picture.chunk + 1, **THEN[picture.chunk]}
                socket.send(json.dumps(then))
            if picture.chunk == chunks:
                break
    ask(stream, method="DELETE")
    with open(path, "wb") as file:
        file.write(ask(f"{stream}/video.mp4"))
    print(f"{path}: (event, chunk, frame) of the prompts: {applied}")
    return applied


if __name__ == "__main__":
    main(*sys.argv[1:])
