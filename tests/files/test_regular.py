"""Pipes, devices and files past a limit are refused, wherever a small file is read whole."""

import os
import pathlib

import numpy as np
import pytest

from longlive_jax.data import clips
from longlive_jax.errors import InputError
from longlive_jax.files import regular, versioned
from longlive_jax.files.arrays import load_npz
from longlive_jax.prompts import layouts, shots


def prompts(path):
    return shots.read(path, chunks=1, chunk_frames=8, scene_cut_prefix="")


READERS = {
    "prompts.txt": prompts, "prompts.json": prompts, "prompts": prompts, "arrays.npz": load_npz,
    "benchmark.txt": lambda path: layouts.items("vbench", path, 1),
    "run.json": versioned.read_json, "caption.json": lambda path: clips._caption(pathlib.Path(path)),
}  # fmt: skip


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_never_ends_is_refused(tmp_path, name, kind):
    """A pipe without a writer would be waited for; a device gives zeros for ever."""
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=f"{name}.*is a pipe or a device, not a file; save"):
        READERS[name](path)


@pytest.mark.parametrize("name", [name for name in READERS if name != "arrays.npz"])
def test_large_files_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(regular, "MAX_BYTES" if name == "run.json" else "MAX_TEXT", 100)
    (tmp_path / name).write_text("a" * 101)
    with pytest.raises(InputError, match=f"{name}.*has more than 100 bytes"):
        READERS[name](tmp_path / name)


def test_the_content_of_files_and_links_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert [video.chunks[0].prompt for video in prompts(tmp_path / "b.txt")] == [
        "one",
        "two",
        "three",
    ]
    np.savez(tmp_path / "a.npz", x=np.zeros(2))
    (tmp_path / "b.npz").symlink_to("a.npz")
    assert load_npz(tmp_path / "b.npz")["x"].shape == (2,)
