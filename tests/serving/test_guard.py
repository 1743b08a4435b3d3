"""Who may ask: tokens, origins and names of the server."""

import asyncio

import pytest

from longlive_jax.serving.guard import LOOPBACK, Guard

TOKEN = "a long secret"


def ask(guard, path="/streams", kind="http", query=b"", **headers):
    """The status of an answer; 0: refused before a WebSocket was accepted."""
    sent = []

    async def receive():
        return {"type": "http.request"}

    async def send(message):
        sent.append(message)

    headers = {"host": "example.org"} | headers
    scope = {
        "type": kind, "path": path, "query_string": query, "method": "GET",
        "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()],
    }  # fmt: skip
    asyncio.run(guard(scope, receive, send))
    if kind == "websocket":
        return 0 if sent and sent[0]["type"] == "websocket.close" else 101
    if sent[0]["status"] == 200:
        assert b"x-content-type-options" in dict(sent[0]["headers"])
    return sent[0]["status"]


async def app(scope, receive, send):
    if scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def closed():
    return Guard(app, TOKEN, ["https://friend.org"], [])


def test_a_token(closed):
    assert ask(closed) == 401
    assert ask(closed, authorization="Bearer wrong") == 401
    assert ask(closed, authorization=f"Bearer {TOKEN}") == 200
    assert ask(closed, query=b"token=a+long+secret") == 401  # in a WebSocket's address alone
    assert ask(closed, kind="websocket") == 0
    assert ask(closed, kind="websocket", query=b"token=wrong") == 0
    assert ask(closed, kind="websocket", query=b"token=a+long+secret") == 101
    assert ask(closed, path="/metrics") == 401
    for path in ("/", "/static/app.js", "/info", "/healthz", "/readyz"):
        assert ask(closed, path=path) == 200


def test_origins(closed):
    good = {"authorization": f"Bearer {TOKEN}"}
    for kind, refused, fine in (("http", 403, 200), ("websocket", 0, 101)):
        assert ask(closed, kind=kind, origin="https://evil.org", **good) == refused
        assert ask(closed, kind=kind, origin="null", **good) == refused
        assert ask(closed, kind=kind, origin="https://example.org", **good) == fine
        assert ask(closed, kind=kind, origin="https://friend.org", **good) == fine
    assert ask(closed, sec_fetch_site="cross-site", **good) == 403


def test_names_of_the_server():
    local = Guard(app, "", [], LOOPBACK)
    assert ask(local, host="127.0.0.1:8000") == ask(local, host="localhost") == 200
    assert ask(local, host="[::1]:8000") == 200
    assert ask(local, host="evil.org") == 421
    assert ask(local, kind="websocket", host="evil.org:8000") == 0
