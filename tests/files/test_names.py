import json
import os

import pytest

from longlive_jax.data.source import Health, Sample
from longlive_jax.files.names import as_bytes, as_text, entries, is_stray, spelled
from longlive_jax.training.prefetch import _name, decode_names

STRAYS = ("._a.json", ".DS_Store", "__MACOSX", "Thumbs.db", "THUMBS.DB", "desktop.ini", ".nfs0001")


@pytest.mark.parametrize("name", STRAYS)
def test_strays(tmp_path, name):
    assert is_stray(name)
    for file in (name, "b.json", "a.JSON", "c.txt"):
        (tmp_path / file).write_text("")
    assert [p.name for p in entries(tmp_path)] == ["a.JSON", "b.json", "c.txt"]
    assert [p.name for p in entries(tmp_path, ".json")] == ["a.JSON", "b.json"]
    assert spelled(tmp_path / "a.json").name == "a.JSON"
    assert spelled(tmp_path / "d.json").name == "d.json"


@pytest.mark.parametrize("name", ["clip", "macosx", "thumbs", "a.b", "~", "[x]*?", "…"])
def test_other_names_are_read(name):
    assert not is_stray(name)


RAW = [
    b"caf\xe9",
    b"a\xe2\x80\xa8b",
    b"a\nb",
    b"\xc2\x85",
    "naïve".encode(),
    b"\xff\xfe",
    b"x" * 300,
]


@pytest.mark.parametrize("raw", RAW)
def test_names_as_text(tmp_path, raw):
    name = os.fsdecode(raw)
    text = as_text(name)
    text.encode()
    assert len(text.splitlines()) == 1 and as_bytes(name) == raw
    assert decode_names(_name(Sample(name, (), 0))[None]) == [as_text(os.fsdecode(raw[:128]))]
    health = Health(1.0, tmp_path / "failures.jsonl")
    health.add(Sample(name, (), 0, failures=((f"/data/{name}", f"{name}: bad"),)))
    lines = (tmp_path / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["path"] for line in lines] == [f"/data/{text}"]


def test_a_long_name_ends_between_characters():
    assert decode_names(_name(Sample("x" * 127 + "é", (), 0))[None]) == ["x" * 127]
    assert as_bytes("\ud800") == b"\\ud800"  # no name of a file
