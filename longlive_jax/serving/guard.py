"""Who may ask: token, origin and host of every request, before anything else reads it."""

import hmac
from collections.abc import Collection
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Without the token: the page itself, which asks for it, and what a supervisor asks.
_OPEN = ("/", "/info", "/healthz", "/readyz")
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "media-src 'self' blob:; connect-src 'self' ws: wss:; style-src 'self' 'unsafe-inline'; "
    "worker-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware. `hosts`: names that a request may be for; empty: any (a token is needed).

    origins: of pages elsewhere that may use the server, "https://example.org".
    """

    def __init__(self, app, token: str, origins: Collection[str], hosts: Collection[str]):
        self._app, self._token = app, token
        self._origins, self._hosts = frozenset(origins), frozenset(hosts)

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if refusal := self._refusal(scope):
            status, message = refusal
            if scope["type"] == "websocket":
                await receive()
                await send({"type": "websocket.close", "code": 1008, "reason": message})
            else:
                await JSONResponse({"error": message}, status)(scope, receive, send)
            return

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in _HEADERS.items()),
                ]
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refusal(self, scope) -> tuple[int, str] | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        # Against pages that let their own name point to this machine (DNS rebinding).
        if self._hosts and urlsplit(f"//{host}").hostname not in self._hosts:
            return 421, "this server is not asked by that name"
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins:
            where = urlsplit(origin)
            if where.scheme not in ("http", "https") or where.netloc != host:
                return 403, "a page of another origin may not use this server"
        elif origin is None and headers.get("sec-fetch-site") == "cross-site":
            return 403, "a page of another origin may not use this server"
        path = scope["path"]
        if not self._token or path in _OPEN or path.startswith("/static/"):
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if scope["type"] == "websocket" and not given:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if not hmac.compare_digest(given.encode(), self._token.encode()):
            return 401, "a token is needed: Authorization: Bearer TOKEN"
        return None
