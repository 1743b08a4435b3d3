"""An S3 server behind a proxy that refuses requests, lets them wait, or loses them."""

import contextlib
import http.client
import http.server
import threading
import urllib.parse
from collections.abc import Callable, Iterator

from tests.storage import servers

REFUSE, STALL, LOSE, LOSE_ANSWER = "refuse", "stall", "lose", "lose the answer"
Fault = Callable[[str, str, int], str | None]


class Proxy:
    """What a test decides of each request.

    Attributes:
      fault: called with a request's method, path and number; one of the above, or None.
      server: to be used in the place of the server behind, which it has the environment of.
      met: requests that met a fault.
    """

    def __init__(self, behind: servers.Server):
        self.fault: Fault = lambda method, path, number: None
        self.behind, self.met, self._count = behind, 0, 0
        self._lock, self._released = threading.Lock(), threading.Event()
        handler = type("_Handler", (_Handler,), {"proxy": self})
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self.environment = behind.environment | {"AWS_ENDPOINT_URL": self.url}
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def path(self, name: str):
        return self.behind.path(name)

    def decide(self, method: str, path: str) -> str | None:
        with self._lock:
            self._count += 1
            found = self.fault(method, urllib.parse.unquote(path), self._count)
            self.met += found is not None
            return found

    def wait(self) -> None:
        self._released.wait()

    def close(self) -> None:
        self._released.set()
        self._http.shutdown()
        self._http.server_close()


@contextlib.contextmanager
def proxy(behind: servers.Server) -> Iterator[Proxy]:
    made = Proxy(behind)
    try:
        yield made
    finally:
        made.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.proxy.decide(self.command, self.path)
        if fault == STALL:
            self.proxy.wait()
        if fault in (STALL, LOSE):
            self.close_connection = True
            return
        if fault == REFUSE:
            self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
            return
        there = urllib.parse.urlsplit(self.proxy.behind.environment["AWS_ENDPOINT_URL"])
        behind = http.client.HTTPConnection(str(there.hostname), there.port)
        try:
            behind.request(self.command, self.path, body, dict(self.headers))
            answer = behind.getresponse()
            content = answer.read()
        finally:
            behind.close()
        if fault == LOSE_ANSWER:
            self.close_connection = True
            return
        self._answer(answer.status, answer.getheaders(), content)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        length = dict((n.lower(), v) for n, v in headers).get("content-length")
        self.send_header(
            "Content-Length", length if self.command == "HEAD" and length else str(len(content))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def log_message(self, *args) -> None:
        pass
