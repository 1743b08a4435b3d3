import os
import pathlib

import pytest

# TensorStore reads it once, with the first request: a server that says nothing is given up so soon.
os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"] = "4"

from longlive_jax.files import remote
from tests.storage import faults, servers


@pytest.fixture(scope="package")
def s3():
    with servers.s3() as server:
        yield server


@pytest.fixture(scope="package")
def gs():
    with servers.gs() as server:
        yield server


@pytest.fixture
def faulty(s3, monkeypatch):
    """The s3 server behind a proxy, whose `fault` the test sets."""
    with faults.proxy(s3) as made:
        for key, value in made.environment.items():
            monkeypatch.setenv(key, value)
        remote._opened.cache_clear()
        yield made
    remote._opened.cache_clear()


@pytest.fixture(autouse=True)
def environment(request, monkeypatch, tmp_path):
    """Of a test that uses a server, and of the commands that it starts."""
    monkeypatch.setenv("LONGLIVE_CACHE_DIR", str(tmp_path / "copies"))
    for name in ("s3", "gs"):
        if name in request.fixturenames:
            for key, value in request.getfixturevalue(name).environment.items():
                monkeypatch.setenv(key, value)
    return os.environ


@pytest.fixture(autouse=True)
def nothing_is_taken_for_a_local_path():
    """pathlib.Path makes /s3/BUCKET/KEY of an etils path, without a word."""
    places = [
        pathlib.Path(root, name) for root in ("/", ".") for name in ("s3", "gs", "s3:", "gs:")
    ]
    before = {path for path in places if path.exists()}
    yield
    assert {path for path in places if path.exists()} == before


@pytest.fixture(params=["s3", "gs"])
def server(request, monkeypatch):
    """Each of them in turn."""
    found = request.getfixturevalue(request.param)
    for key, value in found.environment.items():
        monkeypatch.setenv(key, value)
    return found
