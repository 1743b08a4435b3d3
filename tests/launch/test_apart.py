"""Outputs are never inputs, by whatever name."""

import os

import pytest

from launch import command
from longlive_jax.checkpoints import networks, workdir
from longlive_jax.errors import InputError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """An input, a folder that is read, and other names of both."""
    (tmp_path / "ckpt" / "dit").mkdir(parents=True)
    (tmp_path / "in.mp4").write_text("")
    (tmp_path / "soft.mp4").symlink_to("in.mp4")
    os.link(tmp_path / "in.mp4", tmp_path / "hard.mp4")
    (tmp_path / "other").symlink_to("ckpt", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "given", ["in.mp4", "./ckpt/../in.mp4", "soft.mp4", "hard.mp4", "{}/in.mp4"]
)
@pytest.mark.parametrize("output", ["in.mp4", "other/../in.mp4", "soft.mp4", "{}/hard.mp4"])
def test_an_input(files, given, output):
    output, given = output.format(files), given.format(files)
    with pytest.raises(InputError, match="is read as"):
        command.check_apart([None, "v.mp4", output], [None, "prompts.txt", given])


@pytest.mark.parametrize(
    "output", ["ckpt/v.mp4", "ckpt", "ckpt/dit/new/folder/v.mp4", "other/v.mp4", "{}/other/dit/v"]
)
@pytest.mark.parametrize("folder", ["ckpt", "other/", "{}/ckpt/."])
def test_inside_of_what_is_read(files, output, folder):
    output, folder = output.format(files), folder.format(files)
    with pytest.raises(InputError, match="which is read; give an output outside of it"):
        command.check_apart([output], [], [None, folder])


@pytest.mark.parametrize("output", ["v.mp4", "ckpt2/v.mp4", "in.mp4.mp4", "ckpt.mp4", "new/in.mp4"])
def test_beside_it(files, output):
    command.check_apart([output], ["in.mp4", "missing.mp4"], ["ckpt", "missing"])


def test_a_name_of_an_input_that_is_not_there_yet(files):
    with pytest.raises(InputError, match="is read as"):
        command.check_apart(["new/v.npz"], [files / "new" / "v.npz"])


def test_a_run_is_read_from_two_folders(tmp_path):
    assert networks.folders(None) == []
    assert networks.folders("ckpt") == ["ckpt"]
    workdir.write(tmp_path, workdir.Run({}, "parts", "model"))
    assert networks.folders(str(tmp_path)) == [str(tmp_path), "parts"]
    workdir.write(tmp_path, workdir.Run({}, None, "model"))
    assert networks.folders(str(tmp_path)) == [str(tmp_path)]
