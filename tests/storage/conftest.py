import os
import pathlib

import pytest

from tests.storage import servers


@pytest.fixture(scope="package")
def s3():
    with servers.s3() as server:
        yield server


@pytest.fixture(scope="package")
def gs():
    with servers.gs() as server:
        yield server


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
