"""Paths on object storage against real servers, with a dict of names as the oracle."""

import fnmatch
import pathlib
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longlive_jax.errors import InputError, StorageError
from longlive_jax.files import remote
from tests.storage import servers

FILES = {
    "a": b"1",
    "folder/b.txt": "zwei \u2013 2".encode(),
    "folder/deep/c": b"",
    "folder2/d": b"4",
}


@pytest.fixture
def folder(server, request):
    where = server.path(request.node.name)
    for name, content in FILES.items():
        (where / name).write_bytes(content)
    return where


def names(paths, below):
    return sorted(str(path).removeprefix(f"{below}/") for path in paths)


def test_has_what_was_written(folder):
    for name, content in FILES.items():
        path = folder / name
        assert path.read_bytes() == content and path.is_file() and not path.is_dir()
        assert path.stat().st_size == len(content)
    assert (folder / "folder/b.txt").read_text() == "zwei \u2013 2"
    assert names(folder.iterdir(), folder) == ["a", "folder", "folder2"]
    assert names(folder.glob("*/b*"), folder) == ["folder/b.txt"]
    assert names(folder.rglob("*"), folder) == sorted(FILES)
    assert (folder / "folder").is_dir() and not (folder / "folder").is_file()
    assert not (folder / "fold").exists() and not (folder / "missing").exists()


def test_walks_as_a_local_folder(folder, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def walked(root):
        return {
            (str(pathlib.PurePath(str(p)).relative_to(str(root))), *map(tuple, map(sorted, rest)))
            for p, *rest in root.walk()
        }

    assert walked(folder) == walked(tmp_path)


def test_files_are_written_when_they_are_closed(folder):
    with (folder / "text").open("w") as file:
        file.write("one\ntwo\n")
        assert not (folder / "text").exists()
    assert (folder / "text").read_text() == "one\ntwo\n"
    for mode, content in (("wb", b"lost"), ("w", "lost")):
        with pytest.raises(KeyError), (folder / "text").open(mode) as file:
            file.write(content)
            raise KeyError
    assert (folder / "text").read_text() == "one\ntwo\n"
    with pytest.raises(ValueError, match="written whole"):
        (folder / "text").open("a")


def test_removes(folder):
    (folder / "folder").rmtree()
    assert names(folder.rglob("*"), folder) == ["a", "folder2/d"]
    (folder / "a").unlink()
    for path in (folder / "a", folder / "folder"):
        assert not path.exists()
    for call in (folder.joinpath("a").unlink, folder.joinpath("folder").rmtree):
        with pytest.raises(FileNotFoundError):
            call()
        call(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (folder / "a").read_bytes()
    with pytest.raises(IsADirectoryError):
        (folder / "folder2").read_bytes()


def test_is_a_value(folder):
    again = pickle.loads(pickle.dumps(folder / "a"))
    assert again == folder / "a" and again.read_bytes() == b"1" and {again: 1}[folder / "a"]
    assert str(folder / "a").endswith("/a") and (folder / "a").parent == folder


_NAME = st.text("ab.-_ \u00e4+%[*", min_size=1, max_size=5).filter(
    lambda name: name not in (".", "..") and name.strip() == name
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sets(st.lists(_NAME, min_size=1, max_size=3).map("/".join), min_size=1, max_size=6))
def test_any_names(s3, found):
    where = s3.path("names")
    where.rmtree(missing_ok=True)
    for name in found:
        (where / name).write_bytes(name.encode())
    assert names(where.rglob("*"), where) == sorted(found)
    assert {path.name for path in where.iterdir()} == {name.split("/")[0] for name in found}
    two = {name for name in found if len(name.split("/")) == 2 and fnmatch.fnmatch(name, "a*/*")}
    shallow = {n for n in names(where.glob("a*/*"), where) if (where / n).is_file()}
    assert shallow == {n for n in two if n.split("/")[0].startswith("a")}
    for name in found:
        assert (where / name).read_bytes() == name.encode()


def test_conditions(s3):
    path = s3.path("conditions")
    content, missing = path.read_generation()
    assert content is None
    first = path.compare_and_write(b"1", missing)
    assert first is not None
    assert path.compare_and_write(b"2", missing) is None
    assert path.compare_and_write(b"3", first) is not None
    assert path.compare_and_write(b"4", first) is None
    assert path.read_bytes() == b"3"


# What is refused by name, before anything starts.


@pytest.mark.parametrize(
    "given, words",
    [
        ("hdfs://name/run", "nothing serves hdfs://"),
        ("file:///tmp/run", "nothing serves file://"),
        ("S3://bucket/run", "nothing serves S3://"),
        ("gs:/bucket/run", "give gs://bucket/run"),
        ("gs://", "cannot be the name of a bucket"),
        ("s3://Bucket_/x", "cannot be the name of a bucket"),
        ("s3://bucket/../other", "'..'"),
    ],
)
def test_addresses_that_nothing_serves(given, words):
    with pytest.raises(InputError, match=r"--workdir=.*") as error:
        remote.path(given, "--workdir")
    assert words in str(error.value) and given in str(error.value)


@pytest.mark.parametrize("given", ["run", "/a/b", "a:b", "./gs:/x", "C:/x", "hf.co/x"])
def test_local_paths_are_local(given):
    assert remote.path(given) == pathlib.Path(given)


def test_a_bucket_that_is_not_there(server):
    for write in (False, True) if server.scheme == "s3" else (True,):  # fake-gcs-server lists any
        with pytest.raises(InputError, match="there is no bucket of this name"):
            remote.reach(f"{server.scheme}://nobodys-bucket/run", "--workdir", write=write)
    remote.reach(str(server.path("probed")), "--workdir", write=True)
    assert not server.path("probed").exists()


def test_no_credentials_and_read_only_ones(s3, monkeypatch):
    s3.path("there/x").write_bytes(b"1")
    only_reads = servers.reader(s3)
    with servers.asking_for_permission(s3):
        remote._opened.cache_clear()
        with pytest.raises(InputError, match="no credentials, or wrong ones"):
            remote.reach(str(s3.path("there")), "--workdir")
        for key, value in only_reads.items():
            monkeypatch.setenv(key, value)
        remote._opened.cache_clear()
        remote.reach(str(s3.path("there")), "--checkpoint")
        assert s3.path("there/x").read_bytes() == b"1"
        with pytest.raises(InputError, match="read-only for these credentials"):
            remote.reach(str(s3.path("there")), "--workdir", write=True)
        with pytest.raises(StorageError, match="read-only for these credentials"):
            s3.path("there/x").write_bytes(b"2")
    remote._opened.cache_clear()


def test_a_server_that_does_not_answer(monkeypatch):
    for key, value in servers._ALONE.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{servers._free_port()}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    with pytest.raises(InputError, match=r"does not answer .*Could not connect"):
        remote.reach("s3://bucket/run", "--workdir")


def test_tries_are_a_number(monkeypatch):
    monkeypatch.setenv(remote.TRIES_VARIABLE, "many")
    with pytest.raises(InputError, match="LONGLIVE_STORAGE_TRIES=many: must be a number"):
        remote.spec("s3://bucket/x")
