"""A manifest that lies about its records is refused when the dataset is opened."""

import json
import re

import numpy as np
import pytest

from longlive_jax.data import manifest as manifest_lib
from longlive_jax.data import records
from longlive_jax.data.manifest import write_manifest
from longlive_jax.errors import InputError
from tests.data.test_records import CONFIG, PROMPTS, SETTINGS, TOKENS, clip, config, embedding, make

TRAINS_TEXT = config(train_text_encoder=True)


def rewritten(folder, change):
    """Its manifest with other content, as a hand or another program would write it."""
    file = folder / records.MANIFEST
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return folder


def changed(**values):
    return lambda manifest: manifest.update(values)


def shard(kind, number, **values):
    return lambda manifest: manifest[kind][number].update(values)


def empty(manifest):
    manifest.update(latents=[], samples=0)


def of_before(manifest):
    """As it was written before there were checksums."""
    del manifest["checksum"]


def counts(manifest):
    """Two files whose numbers of records are exchanged: the sum is right."""
    a, b = manifest["latents"][0], manifest["latents"][2]
    a["count"], b["count"] = b["count"], a["count"]


LIES = {
    "no latents": (empty, "it has no samples"),
    "no files, some samples": (changed(latents=[]), "has 5 samples, its files of latents have 0"),
    "fewer samples": (changed(samples=4), "has 4 samples, its files of latents have 5"),
    "more samples": (changed(samples=6), "has 6 samples, its files of latents have 5"),
    "a file without records": (shard("latents", 0, count=0), "has 5 samples, its files .* have 3"),
    "reordered": (changed(prompts=PROMPTS[::-1]), "is of the prompt 'a red boat'"),
    "two exchanged": (changed(prompts=[PROMPTS[1], PROMPTS[0], PROMPTS[2]]), "is of the prompt"),
    "another prompt": (
        changed(prompts=["a dog", *PROMPTS[1:]]), "has the prompt 'a red boat', which the manifest"
    ),
    "a prompt missing": (changed(prompts=PROMPTS[:2]), "has 2 prompts, its files of text have 3"),
    "a prompt twice": (changed(prompts=[*PROMPTS, PROMPTS[0]]), "1 of its prompts are there twice"),
    "no prompts": (changed(prompts=[], text=[]), "it has no prompts"),
    "a text of prompts": (changed(prompts="abc"), "prompts is 'abc', not a list"),
    "counts": (counts, r"latents-00000.arrayrecord: has 2 records, by the manifest 3"),
    "a count": (lambda m: [shard("latents", 0, count=3)(m), m.update(samples=6)], "has 2 records"),
    "a text count": (
        lambda m: [shard("text", 0, count=1)(m), shard("text", 1, count=2)(m)],
        "text-00000.arrayrecord: has 2 records, by the manifest 1",
    ),
    "negative": (
        lambda m: [shard("latents", 0, count=-2)(m), shard("latents", 2, count=7)(m)], "less than no"
    ),
    "a file twice": (shard("latents", 1, file="latents-00000.arrayrecord"), "named twice"),
    "a file elsewhere": (shard("latents", 1, file="../x"), "is no file of the folder"),
    "a name too long": (shard("latents", 1, file="x" * 300), "is no file of the folder"),
    "dtype": (changed(dtype="float32"), r"record 0 .*is \[6, 2, 4, 4\] bfloat16, by the manifest .* float32"),
    "unknown dtype": (changed(dtype="int7"), "dtype is 'int7'"),
    "shape": (changed(latent_shape=[6, 4, 4, 4]), r"by its settings \[6, 2, 4, 4\]"),
    "empty latents": (changed(latent_shape=[0, 2, 4, 4]), r"by its settings \[6, 2, 4, 4\]"),
    "latents of three axes": (changed(latent_shape=[6, 2, 4]), r"by its settings \[6, 2, 4, 4\]"),
    "shape and settings": (
        lambda m: [m.update(latent_shape=[4, 2, 4, 4]), m["settings"].update({"train.latent_frames": 4})],
        r"is \[6, 2, 4, 4\] bfloat16, by the manifest \[4, 2, 4, 4\]",
    ),
    "larger than its files": (
        lambda m: [
            m.update(latent_shape=[60000, 2, 4, 4]), m["settings"].update({"train.latent_frames": 60000})
        ],
        "has 131072 bytes, 2 samples of .* are 7680000",
    ),
    "least_chunks": (changed(least_chunks=3), "has 3 prompts and 2 valid chunks, by the manifest 3 and 3 to 3"),
    "least_chunks past": (changed(least_chunks=4), "least_chunks is 4 of 3"),
    "settings": (changed(settings={}), "setting train.latent_frames is None"),
    "a setting": (lambda m: m["settings"].pop("model.in_dim"), "setting model.in_dim is None"),
    "kinds": (changed(samples="5"), "samples is '5', not a whole number"),
    "shards": (changed(latents=[{"file": "a"}]), r"latents\[0\] has no 'count'"),
    "bytes": (shard("text", 0, bytes="1"), r"text\[0\].bytes is '1', not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
@pytest.mark.parametrize("checksum", [True, False], ids=["", "of before"])
def test_a_lie_is_found_when_the_dataset_is_opened(tmp_path, name, checksum):
    change, message = LIES[name]
    # The padded sample is the first of a file.
    folder = make(tmp_path / "r", counts=(4, 1) if name == "least_chunks" else (2, 0, 3))
    rewritten(folder, change)
    if not checksum:
        rewritten(folder, of_before)
    message = f"{message}|it has the checksum" if checksum else message
    with pytest.raises(InputError, match=message) as caught:
        records.Records(folder, CONFIG)
    assert str(folder) in str(caught.value) and "launch.encode_dataset" in str(caught.value)


def test_a_manifest_of_before_still_opens(tmp_path):
    folder = rewritten(make(tmp_path / "r"), of_before)
    assert records.Records(folder, CONFIG).sample(3, 0).name == "v3"


def test_a_dataset_without_embeddings_is_checked_too(tmp_path):
    folder = make(tmp_path / "r", text=False)
    assert len(records.Records(folder, TRAINS_TEXT)) == 5
    rewritten(folder, changed(prompts=PROMPTS[::-1]))
    with pytest.raises(InputError, match="has the checksum"):
        records.Records(folder, TRAINS_TEXT)


def many(folder, files, odd=None):
    """A dataset of a sample a file; sample `odd` has another shape, in a file as large."""
    folder.mkdir()
    array, prompts, _ = clip(0)
    fields = {"name": "v", "prompts": prompts, "chunks": 3}
    good, bad = (records.pack(fields, a) for a in (array, array[:5]))
    latents = [
        records.write_shard(folder / f"latents-{i:05d}.arrayrecord", [bad if i == odd else good])
        for i in range(files)
    ]
    rows = [records.pack({"prompt": p}, embedding(i)) for i, p in enumerate(PROMPTS)]
    write_manifest(
        folder, samples=files, dtype="bfloat16", latent_shape=[6, 2, 4, 4], least_chunks=3, failures=0,
        latents=latents, text=[records.write_shard(folder / "text-00000.arrayrecord", rows)],
        prompts=PROMPTS, settings=SETTINGS,
    )  # fmt: skip
    return folder


def test_few_records_of_a_large_dataset_are_read(tmp_path, monkeypatch):
    folder, read = many(tmp_path / "r", 50), []
    real = records.Shards.read
    monkeypatch.setattr(
        records.Shards, "read", lambda self, i, check: read.append(i) or real(self, i, check)
    )
    records.Records(folder, CONFIG)
    assert len(read) == 16 + 2 and {0, 49} < set(read)


@pytest.mark.parametrize("odd", [0, 1, 49])
def test_what_is_not_read_then_is_refused_by_name_later(tmp_path, odd):
    folder = many(tmp_path / "r", 50, odd)
    if odd == 1:  # none of those that are looked at
        source = records.Records(folder, CONFIG)
        source.sample(0, 0)
        with pytest.raises(InputError, match=r"record 0 of 1 .*is \[5, 2, 4, 4\] bfloat16, by the"):
            source.sample(1, 0)
        return
    with pytest.raises(InputError, match=rf"latents-{odd:05d}.arrayrecord: record 0 .*is \[5, 2"):
        records.Records(folder, CONFIG)


@pytest.mark.parametrize(
    "fields, text, message",
    [
        ({"prompt": PROMPTS[0]}, np.zeros((7, 8)), "has 7 tokens, model.text_len is 6"),
        ({"prompt": PROMPTS[0]}, np.zeros((3, 4)), r"is \[3, 4\]"),
        ({"prompt": PROMPTS[0]}, np.zeros(()), r"is \[\]"),
        ({}, np.zeros((3, 8)), "has no 'prompt'"),
        ({"prompt": PROMPTS[1]}, np.zeros((3, 8)), "is of the prompt 'a cat', by the manifest of"),
        ({"prompt": PROMPTS[0]}, np.zeros((3, 8), np.float32), r"is \[3, 8\] float32, by the"),
    ],
)
def test_embeddings_of_other_shapes(tmp_path, fields, text, message):
    manifest = records.read_manifest(make(tmp_path / "r"))
    right = manifest_lib.Expected(manifest)
    assert right.text(0, {"prompt": PROMPTS[0]}, embedding(0)) == ""
    assert len(embedding(0)) == TOKENS[0]
    wrong = manifest_lib.Expected(manifest | {"dtype": "float64"})
    assert re.search(message, wrong.text(0, fields, text))
