import os

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


@pytest.fixture(params=["s3", "gs"])
def server(request, monkeypatch):
    """Each of them in turn."""
    found = request.getfixturevalue(request.param)
    for key, value in found.environment.items():
        monkeypatch.setenv(key, value)
    return found
