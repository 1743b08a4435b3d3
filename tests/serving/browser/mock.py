"""A server that speaks the page's protocol and draws test pictures: no model, no device.

python -m tests.serving.browser.mock --port=8765
"""

import argparse
import asyncio
import fractions
import io
import itertools
import json
import pathlib
import struct
import time

import av
import numpy as np
import uvicorn
from PIL import Image
from starlette import applications, responses, routing, staticfiles, websockets

from tests.serving.browser import scenes

PAGE = pathlib.Path(__file__).parents[3] / "longlive_jax/serving/page"
HEADER = struct.Struct("<HBBIIIIId")
KEY, FIRST, JPEG, CUT = 1, 2, 4, 8
SETTINGS, CHOICES = {"steps": 4, "guidance": 3.0}, [2, 4, 8]
MODELS = {
    "film": {
        "title": "Landscapes",
        "kind": "film",
        "chunk_frames": 32,
        "actions": None,
        "prompts": [
            "A lighthouse at dusk, waves below, the first light sweeping the sea.",
            "Slow drift over dunes at sunrise, long shadows, fine sand in the wind.",
            "A night train crosses a valley; its windows are the only light.",
        ],
    },
    "world": {
        "title": "Walk to the beacon",
        "kind": "world",
        "chunk_frames": 8,
        "actions": {"keys": ["KeyW", "KeyA", "KeyS", "KeyD"], "mouse": True},
        "prompts": ["First person. A wide plain before the hills, a pink beacon ahead."],
    },
}


class Encoder:
    """H.264 access units in Annex B, no reordering."""

    def __init__(self, width, height):
        self.context = av.CodecContext.create("libx264", "w")
        self.context.width, self.context.height = width, height
        self.context.pix_fmt = "yuv420p"
        self.context.time_base = fractions.Fraction(1, 24)
        self.context.gop_size = 240
        self.context.options = {"preset": "ultrafast", "tune": "zerolatency", "crf": "18"}
        self.index = 0

    def __call__(self, picture: np.ndarray, key: bool) -> tuple[bytes, bool]:
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
        frame.pts, self.index = self.index, self.index + 1
        if key:
            frame.pict_type = av.video.frame.PictureType.I
        (packet,) = self.context.encode(frame)
        return bytes(packet), packet.is_keyframe


def codec(annex_b: bytes) -> str:
    """avc1.PPCCLL of the SPS in an access unit."""
    for at in range(len(annex_b) - 6):
        if annex_b[at : at + 3] == b"\0\0\1" and annex_b[at + 3] & 31 == 7:
            return "avc1." + annex_b[at + 4 : at + 7].hex().upper()
    raise ValueError("no SPS")


class Stream:
    def __init__(self, number, name, body, options):
        self.number, self.name, self.body = number, name, body
        self.model = MODELS[name]
        self.width, self.height = options["size"]
        self.speed = options["speed"]  # making time over playing time
        kind = scenes.Film if self.model["kind"] == "film" else scenes.World
        self.scene = kind(self.width, self.height)
        self.colours = scenes.palette(body["prompt"])
        self.blend = []  # palettes of the chunks to come
        self.events, self.keys = [], ((), 0.0, 0.0)
        self.chunk = self.frame = self.event = 0
        self.script = [{"chunk": 0, "prompt": body["prompt"], "mode": "cut"}]
        self.kept = []
        self.paused, self.seen, self.socket = False, -1, None
        self.want_key, self.jpeg, self.cut = True, False, True
        self.encoder = Encoder(self.width, self.height)
        self.image = body.get("image")
        self.settings = {k: body.get(k, of) for k, of in SETTINGS.items()}

    async def say(self, **message):
        if self.socket is not None:
            try:
                await self.socket.send_text(json.dumps(message))
            except (RuntimeError, websockets.WebSocketDisconnect):
                self.socket = None

    async def hear(self, message):
        kind = message.get("type")
        if kind == "seen":
            self.seen = message["frame"]
        elif kind == "keyframe":
            self.want_key = True
        elif kind == "settings" and message.get("steps", CHOICES[0]) not in CHOICES:
            await self.say(
                type="error", message="steps must be one of 2, 4, 8", event_id=message["event_id"]
            )
        elif kind in ("prompt", "keys", "settings"):
            self.events.append(message)
            await self.say(type="accepted", event_id=message["event_id"])
        elif kind == "pause":
            self.paused = message["paused"]
            await self.say(type="accepted", event_id=message["event_id"])
        else:
            await self.say(type="error", message=f"type {kind!r} is none of the messages")

    async def apply(self):
        """What has come and is due acts on the next chunk."""
        if self.blend:
            self.colours = self.blend.pop(0)
        due = [e for e in self.events if e.get("at", 0) <= self.chunk]
        self.events = [e for e in self.events if e not in due]
        codes, dx, dy = self.keys[0], 0.0, 0.0
        for event in due:
            if event["type"] == "keys":
                codes, dx, dy = tuple(event["codes"]), dx + event["dx"], dy + event["dy"]
            elif event["type"] == "prompt":
                self.direct(event)
            else:
                self.settings |= {k: event[k] for k in self.settings if k in event}
            self.event = event["event_id"]
            await self.say(type="applied", event_id=self.event, chunk=self.chunk, frame=self.frame)
        per = self.model["chunk_frames"]
        self.keys = (codes, dx / per, dy / per)

    def direct(self, event):
        new, mode = scenes.palette(event["text"]), event["mode"]
        self.script.append({"chunk": self.chunk, "prompt": event["text"], "mode": mode})
        if mode == "blend":
            n = event["chunks"]
            parts = [(k + 1) / n for k in range(n)]
            self.blend = [self.colours * (1 - p) + new * p for p in parts]
            self.colours = self.blend.pop(0)
        else:
            self.colours = new
        if mode == "cut":
            self.cut = self.want_key = True
            self.image = None
            if isinstance(self.scene, scenes.Film):
                self.scene.shot = 0

    def make(self, first):
        """Header and payload of the next picture."""
        picture = self.scene.draw(self.colours, self.keys)
        if self.image is not None:
            picture = (0.5 * picture + 0.5 * self.image).astype(np.uint8)
        flags = FIRST * first | CUT * self.cut
        self.cut = False
        if self.jpeg:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=85)
            payload, flags = file.getvalue(), flags | JPEG | KEY
        else:
            payload, is_key = self.encoder(picture, self.want_key)
            flags |= KEY * is_key
            self.want_key = False
        self.kept = [*self.kept[-239:], picture]
        header = HEADER.pack(0x4C4C, 1, flags, self.number, self.chunk, self.frame, self.event,
                             len(payload), time.time() * 1000)  # fmt: skip
        self.frame += 1
        return header + payload

    def latent(self, first, count):
        return [self.make(k == 0) for k in range(first, first + count)]

    async def run(self):
        per = self.model["chunk_frames"]
        while True:
            start = time.monotonic()
            unseen = self.frame - 1 - self.seen
            if self.socket is None or self.paused or unseen > 2 * per:
                await asyncio.sleep(0.02)
                continue
            await self.apply()
            burst = min(4, per)  # pictures of one latent
            for first in range(0, per, burst):
                wait = start + first / 24 * self.speed - time.monotonic()
                await asyncio.sleep(max(wait, 0))
                pictures = await asyncio.to_thread(self.latent, first, burst)
                for data in pictures:
                    if self.socket is not None:
                        try:
                            await self.socket.send_bytes(data)
                        except (RuntimeError, websockets.WebSocketDisconnect):
                            self.socket = None
            self.chunk += 1
            await asyncio.sleep(max(start + per / 24 * self.speed - time.monotonic(), 0))
            took = time.monotonic() - start
            await self.say(type="stats", chunk_s=took, playing_s=per / 24, denoised_fps=per / took * 1.4,
                           delivered_fps=per / took, action_to_picture_s=took * 1.5, memory_gb=17.3,
                           viewers=1)  # fmt: skip

    def video(self) -> bytes:
        file = io.BytesIO()
        with av.open(
            file, "w", format="mp4", options={"movflags": "frag_keyframe+empty_moov"}
        ) as out:
            track = out.add_stream("libx264", rate=24, options={"preset": "ultrafast"})
            track.width, track.height, track.pix_fmt = self.width, self.height, "yuv420p"
            for picture in self.kept:
                out.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(track.encode())
        return file.getvalue()


def app(size=(640, 352), speed=0.7, token="", page=PAGE):
    """The application; `token` is required where it is not empty. `app.state.streams` by id."""
    streams, uploads, tasks = {}, {}, set()
    numbers = itertools.count(1)
    options = {"size": size, "speed": speed}

    def refused(message, status=400):
        return responses.JSONResponse({"error": message}, status)

    def allowed(request):
        return not token or request.headers.get("authorization") == f"Bearer {token}"

    async def info(request):
        models = [{"name": n, "width": size[0], "height": size[1], "fps": 24, **SETTINGS,
                   "steps_choices": CHOICES, "guided": True, **m}
                  for n, m in MODELS.items()]  # fmt: skip
        limits = {"prompt": 2000, "upload": 20_000_000, "pixels": 8_000_000, "streams": 8}
        return responses.JSONResponse(
            {"models": models, "token_required": bool(token), "limits": limits}
        )

    async def create(request):
        if not allowed(request):
            return refused("a token is required", 401)
        body = await request.json()
        if "script" in body:
            body = {**body["script"]["start"], **{k: v for k, v in body.items() if k != "script"}}
        if body.get("model") not in MODELS or not body.get("prompt", "").strip():
            return refused("model or prompt is missing")
        if "image" in body:
            body["image"] = uploads[body["image"]]
        stream = Stream(next(numbers), body["model"], body, options)
        name = f"s{stream.number}"
        streams[name] = stream
        task = asyncio.create_task(stream.run())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return responses.JSONResponse({"id": name, "position": 0}, 201)

    async def upload(request):
        if not allowed(request):
            return refused("a token is required", 401)
        data = await request.body()
        name, chunks = f"u{len(uploads)}", 0
        try:
            if data[4:8] == b"ftyp":
                with av.open(io.BytesIO(data)) as file:
                    picture = [frame.to_image() for frame in file.decode(video=0)][-1]
                chunks = 2
            else:
                picture = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            return refused("the file is neither a picture nor a clip")
        uploads[name] = np.asarray(picture.resize(size))
        kind = "clip" if chunks else "image"
        return responses.JSONResponse({"upload": name, "kind": kind, "chunks": chunks}, 201)

    async def one(request):
        if not allowed(request):
            return refused("a token is required", 401)
        stream = streams.get(request.path_params["id"])
        if stream is None:
            return refused("no such stream", 404)
        if request.method == "DELETE":
            del streams[request.path_params["id"]]
            return responses.Response(status_code=204)
        what = request.url.path.rsplit("/", 1)[-1]
        if what == "video.mp4":
            return responses.Response(await asyncio.to_thread(stream.video), media_type="video/mp4")
        start = {k: v for k, v in stream.body.items() if k != "image"}
        if what == "script.json":
            return responses.JSONResponse({"start": start, "events": stream.script})
        return responses.JSONResponse(
            {"id": request.path_params["id"], "model": stream.name, "prompt": stream.body["prompt"]}
            | stream.settings
        )

    async def live(socket):
        stream = streams.get(socket.path_params["id"])
        if stream is None or (token and socket.query_params.get("token") != token):
            await socket.close(4404 if stream is None else 4401)
            return
        await socket.accept()
        stream.jpeg = socket.query_params.get("format") == "jpeg"
        first, _ = Encoder(*size)(np.zeros((size[1], size[0], 3), np.uint8), True)
        stream.want_key, stream.seen = True, stream.frame - 1
        await socket.send_text(json.dumps(
            {"type": "hello", "codec": codec(first), "width": size[0], "height": size[1], "fps": 24,
             "model": stream.name, "frame": stream.frame}))  # fmt: skip
        stream.socket = socket
        try:
            while True:
                await stream.hear(json.loads(await socket.receive_text()))
        except (websockets.WebSocketDisconnect, RuntimeError):
            if stream.socket is socket:
                stream.socket = None

    built = applications.Starlette(
        routes=[
            routing.Route("/info", info),
            routing.Route("/readyz", lambda request: responses.JSONResponse({"ready": True})),
            routing.Route("/streams", create, methods=["POST"]),
            routing.Route("/uploads", upload, methods=["POST"]),
            routing.Route("/streams/{id}", one, methods=["GET", "DELETE"]),
            routing.Route("/streams/{id}/video.mp4", one),
            routing.Route("/streams/{id}/script.json", one),
            routing.WebSocketRoute("/streams/{id}", live),
            routing.Route("/", lambda request: responses.FileResponse(page / "index.html")),
            routing.Mount("/static", staticfiles.StaticFiles(directory=page)),
        ]
    )
    built.state.streams = streams
    return built


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--speed", type=float, default=0.7)
    parser.add_argument("--token", default="")
    given = parser.parse_args()
    uvicorn.run(app(speed=given.speed, token=given.token), port=given.port, log_level="warning")
