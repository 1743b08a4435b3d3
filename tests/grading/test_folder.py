import pathlib

import pytest

from longlive_jax.errors import InputError
from longlive_jax.grading import folder

SCRIPTS = [("boats", "a boat"), ("cats", "a cat"), ("dogs", "a dog " * 60)]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("cats.mp4", 1), ("out-000.mp4", 0), ("out-002.mp4", 2), ("a cat-4.mp4", 1),
        (f"{('a dog ' * 60)[:180]}-0.mp4", 2),
    ],
)  # fmt: skip
def test_a_name_says_which_script(name, number):
    file = pathlib.Path(name)
    assert folder.matched([file], SCRIPTS) == {file: number}


@pytest.mark.parametrize("name", ["other.mp4", "out-003.mp4"])
def test_a_name_that_says_nothing_is_refused_unless_there_is_one_script(name):
    file = pathlib.Path(name)
    with pytest.raises(InputError, match=f"{name}: its name does not say which of 3 prompts"):
        folder.matched([file], SCRIPTS)
    assert folder.matched([file], SCRIPTS[:1]) == {file: 0}


def test_a_folder_without_videos_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no \.mp4"):
        folder.videos(tmp_path)
    with pytest.raises(InputError, match="is no folder"):
        folder.videos(tmp_path / "none")
    for name in ("b.mp4", "a.mp4", ".hidden.mp4", "dim/c.mp4", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(p.relative_to(tmp_path)) for p in folder.videos(tmp_path)]
    assert found == ["a.mp4", "b.mp4", "dim/c.mp4"]
