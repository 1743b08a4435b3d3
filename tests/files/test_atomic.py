"""Files of killed runs, and the names in errors."""

import errno
import os
import subprocess
import time

import pytest

from longlive_jax.files import atomic
from longlive_jax.files.atomic import atomic_path, partial_file, remove_abandoned


@pytest.fixture(scope="module")
def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    "name, removed",
    [
        (".v.partial-DEAD.mp4", True),  # of earlier versions
        (".v.partial-HOST-DEAD.mp4", True),
        (".v-000.partial-HOST-DEAD.mp4", True),
        (".v-12345.partial-DEAD.mp4", True),
        (".v.partial-HOST-OWN.mp4", False),
        (".v.partial-OWN.mp4", False),
        (".v.partial-00000000-DEAD.mp4", False),  # of another machine, just written
        (".v.partial-HOST-DEAD.npz", False),
        (".vv.partial-HOST-DEAD.mp4", False),
        (".v-00.partial-HOST-DEAD.mp4", False),
        ("v.partial-HOST-DEAD.mp4", False),
        (".v.partial-HOST-DEAD.mp4.mp4", False),
        ("v.mp4", False),
    ],
)
def test_abandoned_files(tmp_path, dead, name, removed):
    for word, value in (("DEAD", dead), ("OWN", os.getpid()), ("HOST", atomic._HOST)):
        name = name.replace(word, str(value))
    (tmp_path / name).write_bytes(b"x")
    remove_abandoned(tmp_path / "v.mp4")
    assert (tmp_path / name).exists() != removed


def test_of_another_machine_after_a_day(tmp_path):
    file = tmp_path / ".v.partial-00000000-1.mp4"
    file.write_bytes(b"x")
    then = time.time() - atomic.ABANDONED_SECONDS - 60
    os.utime(file, (then, then))
    remove_abandoned(tmp_path / "v.mp4")
    assert not file.exists()


def test_glob_characters_are_letters(tmp_path, dead):
    for stem in ("a[0-9]*?", "a.b", "a+b(c)"):
        own = tmp_path / f".{stem}.partial-{dead}.mp4"
        other = tmp_path / f".a5xx.partial-{dead}.mp4"
        own.write_bytes(b"")
        other.write_bytes(b"")
        remove_abandoned(tmp_path / f"{stem}.mp4")
        assert not own.exists() and other.exists()
    remove_abandoned(tmp_path / "missing" / "v.mp4")


def test_own_partial_files_are_known(tmp_path):
    partial = partial_file(tmp_path / "v.mp4")
    remove_abandoned(tmp_path / "v.mp4")
    assert partial.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_errors_name_the_file_that_was_asked_for(tmp_path, number):
    for given in ((), ("PARTIAL",)):
        with pytest.raises(OSError) as raised, atomic_path(tmp_path / "a.txt") as partial:
            raise OSError(number, "x", *(str(partial) for _ in given))
        assert (raised.value.errno, raised.value.filename) == (number, str(tmp_path / "a.txt"))
    with pytest.raises(OSError) as raised, atomic_path(tmp_path / "a.txt"):
        raise OSError(number, "x", "/another")
    assert raised.value.filename == "/another"
    assert not list(tmp_path.iterdir())
