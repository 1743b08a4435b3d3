"""The server's routes; docs/live.md, openapi.json and asyncapi.json describe them."""

import asyncio
import contextlib
import json
import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from longlive_jax.serving import metrics as metrics_lib
from longlive_jax.serving import video_out
from longlive_jax.serving.guard import Guard
from longlive_jax.serving.limits import Limits, Refused
from longlive_jax.serving.live import Live
from longlive_jax.serving.models import Model
from longlive_jax.serving.scheduler import Scheduler
from longlive_jax.serving.streams import ENDED, Stream, read_request
from longlive_jax.serving.uploads import Uploads

_COMPLETE_S = 5.0  # an ended stream's video is waited for
PAGE = pathlib.Path(__file__).parent / "page"


class Server:
    """Routes over a scheduler.

    token: required of all that is not the page or a health check; "": none.
    origins: of other pages that may use it. hosts: names it answers to; empty: any.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        folder: pathlib.Path,
        limits: Limits = Limits(),  # noqa: B008
        *,
        token: str = "",
        origins: Collection[str] = (),
        hosts: Collection[str] = (),
        observe: Callable | None = None,
    ):
        self.models, self.limits, self.token = dict(models), limits, token
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.scheduler = Scheduler(models, limits, folder, observe)
        self.uploads = Uploads(folder, limits)
        self.app = Starlette(
            routes=[*self._routes(), *_page()],
            middleware=[Middleware(Guard, token=token, origins=origins, hosts=hosts)],
            exception_handlers={Refused: self._refused, 404: _missing, 405: _missing},
            lifespan=self._lifespan,
        )

    def _routes(self):
        return [
            Route("/info", self.info),
            Route("/streams", self.create, methods=["POST"]),
            Route("/uploads", self.upload, methods=["POST"]),
            Route("/streams/{id}", self.state, methods=["GET"]),
            Route("/streams/{id}", self.delete, methods=["DELETE"]),
            Route("/streams/{id}/video.mp4", self.video),
            Route("/streams/{id}/script.json", self.script),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            WebSocketRoute("/streams/{id}", self.live),
        ]

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        del app
        self.scheduler.start()
        yield
        await asyncio.to_thread(self.scheduler.stop)

    async def _refused(self, request, error):
        del request
        self.scheduler.metrics.refused.labels(str(error.status)).inc()
        return JSONResponse({"error": error.message}, error.status)

    async def info(self, request: Request) -> Response:
        del request
        limits = self.limits
        return JSONResponse(
            {
                "models": [model.info() for model in self.models.values()],
                "token_required": bool(self.token),
                "limits": {
                    "prompt": limits.prompt, "upload": limits.upload_bytes,
                    "pixels": limits.pixels, "streams": limits.streams, "chunks": limits.chunks,
                },
            }
        )  # fmt: skip

    async def create(self, request: Request) -> Response:
        self._check_ready()
        body = await _json(request, self.limits.body_bytes)
        upload = body.get("image") if isinstance(body, dict) else None
        given = self.uploads.get(upload) if upload else None
        # In a thread: the actions of a long walk take a while to check, and to write below.
        wanted = await asyncio.to_thread(read_request, body, self.models, self.limits, given)
        stream = self.scheduler.create(wanted, self.uploads.take(upload) if upload else None)
        return JSONResponse({"id": stream.id, "position": self.scheduler.position(stream)}, 201)

    def _check_ready(self):
        if not self.scheduler.ready.is_set():
            raise Refused(503, self.scheduler.failed or "the server still compiles; see /readyz")

    async def upload(self, request: Request) -> Response:
        model = self.models.get(request.query_params.get("model", "")) or next(
            iter(self.models.values())
        )
        id, upload = await self.uploads.add(request.stream(), model)
        return JSONResponse({"upload": id, "kind": upload.kind, "chunks": upload.chunks}, 201)

    def _stream(self, request: Request | WebSocket) -> Stream:
        return self.scheduler.get(request.path_params["id"])

    async def state(self, request: Request) -> Response:
        return JSONResponse(self.scheduler.describe(self._stream(request)))

    async def delete(self, request: Request) -> Response:
        stream = self._stream(request)
        self.scheduler.end(stream, "deleted")
        return JSONResponse(self.scheduler.describe(stream))

    async def video(self, request: Request) -> Response:
        stream = self._stream(request)
        path, encoder = stream.video, stream.encoder
        if stream.state == ENDED and encoder is not None:
            await asyncio.to_thread(encoder.close, _COMPLETE_S)
        size = video_out.playable(path) if path.exists() else 0
        if not size:
            raise Refused(409, "no picture has been made yet")
        name = {"content-disposition": f'attachment; filename="longlive-{stream.number}.mp4"'}
        if stream.state == ENDED and size == path.stat().st_size:
            return FileResponse(path, media_type="video/mp4", headers=name)
        headers = name | {"content-length": str(size)}
        return StreamingResponse(_first(path, size), media_type="video/mp4", headers=headers)

    async def script(self, request: Request) -> Response:
        stream = self._stream(request)
        if not stream.recorded:
            raise Refused(409, "no chunk has been made yet")
        return await asyncio.to_thread(lambda: JSONResponse(stream.script()))

    async def healthz(self, request: Request) -> Response:
        del request
        return JSONResponse({"ok": True})

    async def readyz(self, request: Request) -> Response:
        del request
        scheduler = self.scheduler
        ready = scheduler.ready.is_set()
        return JSONResponse({"ready": ready, "failed": scheduler.failed}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        del request
        return Response(self.scheduler.metrics.text(), media_type=metrics_lib.CONTENT_TYPE)

    async def live(self, socket: WebSocket) -> None:
        await socket.accept()
        try:
            await Live(self.scheduler, self._stream(socket), socket).run()
        except Refused as error:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await socket.send_json({"type": "error", "message": error.message})
                await socket.close(1008)


def _page():
    if not PAGE.is_dir():
        return []

    async def index(request: Request) -> Response:
        del request
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    return [Route("/", index), Mount("/static", StaticFiles(directory=PAGE))]


async def _missing(request: Request, error: Exception) -> Response:
    del request
    status = getattr(error, "status_code", 404)
    return JSONResponse({"error": "nothing is served there"}, status)


async def _json(request: Request, limit: int) -> Any:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(413, f"a request of over {limit} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error


async def _first(path: pathlib.Path, size: int):
    """The first `size` bytes of a file that grows."""
    with path.open("rb") as file:
        while size and (block := await asyncio.to_thread(file.read, min(size, 2**18))):
            size -= len(block)
            yield block
