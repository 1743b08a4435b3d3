"""Folders that a command fills: made, refused, locked, and begun with the same settings."""

import pytest

from longlive_jax.errors import InputError
from longlive_jax.files import folders, versioned


def make(folder, ours=False):
    folders.make(folder, "--output", "checkpoint", lambda files: ours)


def test_make(tmp_path):
    make(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / ".hidden").write_text("")
    make(tmp_path / "a" / "b")
    (tmp_path / "a" / "b" / "thesis.tex").write_text("")
    make(tmp_path / "a" / "b", ours=True)
    with pytest.raises(InputError, match=r"--output=.*b: holds 'thesis.tex' and no checkpoint; gi"):
        make(tmp_path / "a" / "b")
    with pytest.raises(InputError, match=r"thesis.tex: is a file; give a folder"):
        make(tmp_path / "a" / "b" / "thesis.tex")
    with pytest.raises(InputError, match="Not a directory; give a folder to write"):
        make(tmp_path / "a" / "b" / "thesis.tex" / "c")


def test_one_process_has_the_lock(tmp_path):
    with (
        folders.locked(tmp_path, "first"),
        pytest.raises(InputError, match=r"^second; wait for it, or give another$"),
        folders.locked(tmp_path, "second"),
    ):
        pytest.fail("both have it")
    with folders.locked(tmp_path, "third"):
        pass
    with pytest.raises(InputError, match="cannot be written: No such file"):
        folders.open_locked(tmp_path / "none" / "file", "fourth")


def test_check_settings():
    folders.check_settings("--output=DIR", {"size": [1, 2]}, {"size": (1, 2)})
    with pytest.raises(
        InputError, match=r"^--output=DIR: was begun with b=None, now it is 2; .*another --output$"
    ):
        folders.check_settings("--output=DIR", {"a": 1}, {"a": 1, "b": 2})


def test_versioned_files(tmp_path):
    file = tmp_path / "a.json"
    versioned.write(file, "ours", 2, {"x": [1]})
    assert versioned.read(file, "ours", 2, "try again") == {
        "format": "ours",
        "version": 2,
        "x": [1],
    }
    with pytest.raises(InputError, match=r"'ours' version 2, .* reads 'ours' version 3; try again"):
        versioned.read(file, "ours", 3, "try again")
    for text in ("{", "[]", "{}", "1"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"a\.json: is damaged \(.*; try again"):
            versioned.read(file, "ours", 2, "try again")
    assert versioned.read_json(file) == 1
    with pytest.raises(InputError, match="No such file"):
        versioned.read_json(tmp_path / "b.json")
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="is not JSON"):
        versioned.read_json(file)
    with pytest.raises(TypeError):
        versioned.write_json(file, {"x": object()})
    assert file.read_bytes() == b"\xff" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["run[lr=1e-5]", "[", "a/[b]/c"])
def test_a_path_in_which_weights_would_be_lost(tmp_path, name):
    with pytest.raises(InputError, match=r"--workdir=.*has a \[ in it"):
        folders.check_no_pattern(tmp_path / name, "--workdir")
    for good in ("a*b", "q?", "run]", "run{1}", "a b"):
        folders.check_no_pattern(tmp_path / good, "--workdir")
