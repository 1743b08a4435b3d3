"""A real browser on the mock server. Runs by `make browser` (pytest -m browser)."""

import asyncio
import dataclasses
import os
import pathlib
import shutil
import threading

import pytest
import uvicorn
from playwright import sync_api

from tests.serving.browser import mock

TIMEOUT = 60_000  # ms: two cores, shared
HERE = pathlib.Path(__file__).parent


def pytest_configure(config):
    config.addinivalue_line("markers", "browser: needs Chromium and Playwright; `make browser`")


def pytest_collection_modifyitems(config, items):
    mine = [item for item in items if HERE in item.path.parents]
    for item in mine:
        item.add_marker(pytest.mark.browser)
    if "browser" not in config.option.markexpr:
        config.hook.pytest_deselected(items=mine)
        items[:] = [item for item in items if item not in mine]


@dataclasses.dataclass
class Served:
    url: str
    streams: dict
    loop: asyncio.AbstractEventLoop

    @property
    def newest(self):
        return list(self.streams.values())[-1]

    def disconnect(self, stream):
        """Closes a stream's socket as a broken line would."""
        asyncio.run_coroutine_threadsafe(stream.socket.close(), self.loop).result(30)


def serve(**options):
    """The mock server in a thread; a generator with its address, then its end."""
    built = mock.app(**{"size": (320, 176), **options})
    server = uvicorn.Server(uvicorn.Config(built, port=0, log_level="warning"))
    loops, ready = [], threading.Event()

    async def run():
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert ready.wait(60)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield Served(f"http://127.0.0.1:{port}/", built.state.streams, loops[0])
    server.should_exit = server.force_exit = True
    thread.join(30)


@pytest.fixture(scope="session")
def server():
    yield from serve()


@pytest.fixture(scope="session")
def browser():
    found = os.environ.get("LONGLIVE_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if found is None:
        pytest.fail("Chromium is missing: make chromium, or set LONGLIVE_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        started = playwright.chromium.launch(executable_path=found, headless=True, args=flags)
        yield started
        started.close()


@pytest.fixture
def visit(browser, server):
    """`visit(url, **context options)`: the page, ready. What it complains of fails the test."""
    contexts, complaints = [], []

    def go(url=server.url, ready=True, script=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(f"thrown: {error}"))
        page.on("console", lambda m: m.type == "error" and complaints.append(f"logged: {m.text}"))
        page.on(
            "request",
            lambda r: (
                r.url.startswith((url.split("?")[0].split("#")[0], "blob:", "data:", "ws:"))
                or complaints.append(f"outside request: {r.url}")
            ),
        )
        page.on("dialog", lambda dialog: dialog.accept())
        if script:
            page.add_init_script(script)
        page.goto(url)
        if ready:
            page.wait_for_selector("[data-ready]", state="attached")
        return page

    go.complaints = complaints
    yield go
    for context in contexts:
        context.close()
    assert not complaints
