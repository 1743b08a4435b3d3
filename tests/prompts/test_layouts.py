"""File names of benchmarks, read back by their own rules."""

import pathlib
import re

import pytest

from longlive_jax.errors import InputError
from longlive_jax.prompts import layouts

PROMPTS = ["a person is eating, 3-d style", 'A "red" boat; on a lake…', "x" * 200]


@pytest.fixture
def texts(tmp_path):
    for name in ("Camera_Motion", "Diversity"):
        (tmp_path / f"{name}.txt").write_text("\n".join(PROMPTS) + "\n\n")
    (tmp_path / "README.md").write_text("not prompts")
    return tmp_path


@pytest.mark.parametrize("layout", ["vbench", "vbench_long"])
def test_names_are_the_prompts_verbatim(texts, layout):
    """The benchmark finds `<prompt>-<i>.mp4`, and a video's prompt by cutting off `-<number>`."""
    items = layouts.items(layout, texts / "Diversity.txt", 5)
    assert len(items) == 15
    assert [item.sample for item in items[:6]] == [0, 1, 2, 3, 4, 0]
    for item in items:
        assert re.sub(r"-\d+$", "", pathlib.Path(item.file).stem) == item.prompt
        assert f"{item.prompt}-{item.sample}.mp4" == item.file
    assert list(dict.fromkeys(item.prompt for item in items)) == PROMPTS


def test_vbench2_has_a_folder_a_dimension_and_short_names(texts):
    items = layouts.items("vbench2", texts, 3)
    assert len(items) == 18
    for item in items:
        folder, name = item.file.split("/")
        assert folder in ("Camera_Motion", "Diversity")
        assert name == f"{item.prompt[:180]}-{item.sample}.mp4"
    assert layouts.items("vbench2", texts / "Diversity.txt", 3) == items[9:]


def test_the_same_line_is_made_once(texts):
    (texts / "a.txt").write_text("a boat\na boat\n")
    assert [item.file for item in layouts.items("vbench", texts / "a.txt", 1)] == ["a boat-0.mp4"]


@pytest.mark.parametrize(
    ("layout", "text", "message"),
    [
        ("vbench", "a boat\n" + "x" * 240, "prompt 2, .*: would have a file name of 246 bytes"),
        ("vbench", "ü" * 120, "would have a file name of 246 bytes"),
        ("vbench", "a boat\nan and/or boat", "prompt 2, 'an and/or boat': has '/'"),
        ("vbench2", "x" * 180 + "a\n" + "x" * 180 + "b", "prompt 2, .*: another prompt has its"),
        ("vbench", "\n", "is empty"),
        ("vbench", None, "does not exist"),
    ],
)
def test_what_cannot_be_a_file_is_refused_by_its_number(tmp_path, layout, text, message):
    if text is not None:
        (tmp_path / "p.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        layouts.items(layout, tmp_path / "p.txt", 2)


def test_a_folder_is_for_vbench2_alone(texts, tmp_path):
    with pytest.raises(InputError, match=r"is a folder; vbench needs a \.txt"):
        layouts.items("vbench", texts, 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no \.txt"):
        layouts.items("vbench2", tmp_path / "empty", 1)
