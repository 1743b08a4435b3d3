"""Records: files of arrays, the folder that is being written, and the source that reads it."""

import dataclasses
import errno
import itertools
import json
import os
import pickle
import shutil
import time

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_jax import config as config_lib
from longlive_jax.data import records
from longlive_jax.data.manifest import Shard, write_manifest
from longlive_jax.data.progress import Progress
from longlive_jax.data.source import batches
from longlive_jax.errors import InputError

CONFIG = config_lib.Config(
    model=config_lib.Model(in_dim=4, out_dim=4, text_dim=8, text_len=6, chunk_frames=2),
    vae=config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
    video=config_lib.Video(height=32, width=64),
    train=config_lib.Train(latent_frames=4),
)
PROMPTS = ["a red boat", "a cat", "Eine Brücke über den Fluß"]
TOKENS = [3, 1, 6]
STORED = 6  # latent frames, more than the config reads
SETTINGS = {
    "model.chunk_frames": 2, "model.in_dim": 4, "model.text_len": 6, "model.text_dim": 8,
    "video.height": 32, "video.width": 64, "train.latent_frames": STORED,
}  # fmt: skip


def config(**fields):
    """CONFIG with other values: section_name=value."""
    cfg = CONFIG
    for key, value in fields.items():
        section, _, name = key.partition("_")
        part = dataclasses.replace(getattr(cfg, section), **{name: value})
        cfg = dataclasses.replace(cfg, **{section: part})
    return cfg


def clip(i):
    """Latents, prompts and valid chunks of sample i."""
    latents = np.random.default_rng(i).standard_normal((STORED, 2, 4, 4)).astype(jnp.bfloat16)
    return latents, [PROMPTS[i % 3], PROMPTS[i % 3], PROMPTS[(i + 1) % 3]], 3 - (i == 4)


def embedding(i):
    return np.random.default_rng(9 + i).standard_normal((TOKENS[i], 8)).astype(jnp.bfloat16)


ACTED = dataclasses.replace(CONFIG.model, actions=config_lib.Actions(kind="token"))


def rows(i):
    """The actions of sample i: four keys and a mouse, of 21 pictures."""
    return np.random.default_rng(50 + i).random((4 * STORED - 3, 6)).astype(np.float32)


def make(folder, counts=(2, 0, 3), text=True, acted=False, **manifest):
    """Five samples in three files, one of them empty; three prompts in two.

    acted: with actions, in two files.
    """
    folder.mkdir()
    number, latents = itertools.count(), []
    for k, count in enumerate(counts):
        packed = []
        for i in itertools.islice(number, count):
            array, prompts, chunks = clip(i)
            packed.append(
                records.pack({"name": f"v{i}", "prompts": prompts, "chunks": chunks}, array)
            )
        latents.append(records.write_shard(folder / f"latents-{k:05d}.arrayrecord", packed))
    made = [records.pack({"prompt": p}, embedding(i)) for i, p in enumerate(PROMPTS)]
    texts = [
        records.write_shard(folder / f"text-0000{k}.arrayrecord", part)
        for k, part in enumerate((made[:2], made[2:]) if text else ())
    ]
    if acted:
        made = [records.pack({"name": f"v{i}"}, rows(i)) for i in range(5)]
        manifest["actions"] = [
            records.write_shard(folder / f"actions-0000{k}.arrayrecord", part)
            for k, part in enumerate((made[:2], made[2:]))
        ]
        manifest["settings"] = SETTINGS | records.action_settings(ACTED.actions)
    values = dict(
        samples=5, dtype="bfloat16", latent_shape=[STORED, 2, 4, 4], least_chunks=2, failures=0,
        latents=latents, text=texts, prompts=PROMPTS, settings=SETTINGS,
    )  # fmt: skip
    write_manifest(folder, **values | manifest)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make(tmp_path_factory.mktemp("records") / "r")


@pytest.mark.slow
def test_a_million_clips_are_opened_in_seconds(tmp_path):
    """Names of all files and the size of some are looked at, and a few records."""
    made = make(tmp_path / "one", counts=(20,), text=False, samples=20)
    whole, count = made / "latents-00000.arrayrecord", 50_000
    folder = tmp_path / "many"
    folder.mkdir()
    shards = [Shard(f"latents-{k:05d}.arrayrecord", 20, whole.stat().st_size) for k in range(count)]
    for shard in shards:
        os.link(whole, folder / shard.file)
    prompts = PROMPTS + [f"{k}: a scene of its own, told in a line." for k in range(10**6)]
    manifest = records.read_manifest(made) | {"prompts": prompts, "samples": 20 * count}
    write_manifest(folder, **manifest | {"latents": shards})
    start = time.monotonic()
    source = records.Records(folder, config(train_text_encoder=True))
    assert time.monotonic() - start < 10
    assert len(source) == 10**6
    assert source.sample(10**6 - 1, 0).name == "v19"
    os.remove(folder / shards[1234].file)
    with pytest.raises(InputError, match=r"latents-01234\.arrayrecord: is gone"):
        records.Records(folder, config(train_text_encoder=True))


# A record.


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from(["float32", "bfloat16", "uint8"]),
    name=st.sampled_from(["", "v1", "Brücke 橋", '"\n']),
)
@settings(deadline=None, max_examples=30)
def test_a_record_comes_back(shape, dtype, name):
    array = (np.arange(np.prod(shape, dtype=int)) / 3).reshape(shape).astype(jnp.dtype(dtype))
    fields, back = records.unpack(records.pack({"name": name}, array))
    assert fields["name"] == name
    assert back.dtype == array.dtype
    assert back.flags.aligned
    np.testing.assert_array_equal(back, array)


RECORD = records.pack({"name": "v"}, np.full((2, 5), 0x20202020, np.uint32))  # spaces, as in JSON


@given(i=st.integers(0, len(RECORD) - 1), bit=st.integers(0, 7))
def test_no_wrong_bit_goes_unseen(i, bit):
    wrong = bytearray(RECORD)
    wrong[i] ^= 1 << bit
    with pytest.raises(ValueError):
        records.unpack(bytes(wrong))


@given(st.integers(0, len(RECORD) - 1))
def test_no_missing_end_goes_unseen(length):
    with pytest.raises(ValueError):
        records.unpack(RECORD[:length])


# A file of records.


def test_equal_records_make_equal_files(tmp_path):
    files = [tmp_path / name for name in "ab"]
    shards = [records.write_shard(f, [b"one" * 1000, b"two"]) for f in files]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert shards[0] == records.Shard("a", 2, files[0].stat().st_size)


def test_a_failed_file_is_not_there(tmp_path):
    def packed():
        yield b"one"
        raise InputError("stop")

    with pytest.raises(InputError, match="stop"):
        records.write_shard(tmp_path / "a", packed())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *args):
            pass

        def write(self, record):
            raise RuntimeError("write() failed: No space left on device; writing a; at byte 0")

        def close(self):
            pass

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError) as error:
        records.write_shard(tmp_path / "a", [b"one"])
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path / "a")


# The source.


def test_samples(folder):
    source = records.Records(folder, CONFIG)
    assert len(source) == 5
    for i in range(5):
        sample = source.sample(i, key=i)
        latents, prompts, chunks = clip(i)
        assert sample.name == f"v{i}"
        assert sample.prompts == tuple(prompts[:2])
        assert sample.chunks == min(chunks, 2)
        assert sample.frames is None
        assert sample.latents.dtype == sample.text.dtype == jnp.bfloat16
        np.testing.assert_array_equal(sample.latents, latents[:4])
        assert sample.text.shape == (2, 6, 8)
        for text, prompt in zip(sample.text, prompts):
            which = PROMPTS.index(prompt)
            np.testing.assert_array_equal(text[: TOKENS[which]], embedding(which))
            assert not text[TOKENS[which] :].any()
    with pytest.raises(IndexError):
        source.sample(5, key=0)


def test_a_whole_sample(folder):
    sample = records.Records(
        folder, config(train_latent_frames=6, data_allow_padding=True, data_min_chunks=2)
    ).sample(4, 0)
    assert (sample.chunks, len(sample.prompts), sample.latents.shape[0]) == (2, 3, 6)


def test_without_embeddings(tmp_path):
    folder = make(tmp_path / "r", text=False)
    sample = records.Records(folder, config(train_text_encoder=True)).sample(0, 0)
    assert sample.text is None
    assert sample.prompts == tuple(clip(0)[1][:2])
    with pytest.raises(InputError, match=r"train.text_encoder=True"):
        records.Records(folder, CONFIG)


def test_it_travels_to_other_processes(folder):
    source = pickle.loads(pickle.dumps(records.Records(folder, CONFIG)))
    assert source.sample(3, 0).name == "v3"


def test_it_is_read_by_grain(folder):
    source = records.Records(folder, CONFIG)
    read = {w: batches(source, (0, 1), 2, 0, 0, workers=w) for w in (0, 1)}
    for _ in range(5):  # two epochs
        here, there = (next(read[w]) for w in (0, 1))
        for a, b in zip(here, there):
            assert (a.name, a.prompts, a.chunks) == (b.name, b.prompts, b.chunks)
            assert b.latents.dtype == jnp.bfloat16
            np.testing.assert_array_equal(a.latents, b.latents)
            np.testing.assert_array_equal(a.text, b.text)
    for iterator in read.values():
        iterator.close()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("video_height", 64, r"video.height=32, the config says 64; .*--config.video.height=32"),
        ("video_width", 32, r"video.width=64, the config says 32"),
        ("model_chunk_frames", 4, r"model.chunk_frames=2, the config says 4"),
        ("model_text_len", 7, r"model.text_len=6, the config says 7"),
        ("model_text_dim", 16, r"model.text_dim=8, the config says 16"),
        ("train_latent_frames", 8, r"6 latent frames a sample.*train.latent_frames=8 is more"),
        ("train_latent_frames", 6, r"padded samples of 2 valid .*least is 3.*allow_padding=True"),
    ],
)
def test_a_config_that_does_not_fit(folder, field, value, message):
    with pytest.raises(InputError, match=message):
        records.Records(folder, config(**{field: value}))


def test_a_damaged_record(tmp_path):
    folder = make(tmp_path / "r")
    file = folder / "latents-00002.arrayrecord"
    content = bytearray(file.read_bytes())
    content[content.index(clip(3)[0].tobytes()) + 100] ^= 1
    file.write_bytes(content)
    source = records.Records(folder, CONFIG)
    for i in (0, 1, 2, 4):
        source.sample(i, 0)
    with pytest.raises(InputError, match=r"latents-00002.arrayrecord: record 1 of 3 is damaged"):
        source.sample(3, 0)


def test_a_record_of_something_else(tmp_path):
    folder = make(tmp_path / "r")
    shard = records.write_shard(folder / "latents-00000.arrayrecord", [b"one", b"two"])
    assert shard.bytes == records.read_manifest(folder)["latents"][0].bytes
    with pytest.raises(InputError, match=r"record 0 of 2 is damaged \(3 bytes are too few\)"):
        records.Records(folder, CONFIG).sample(0, 0)


def test_files_that_are_not_whole(tmp_path):
    folder = make(tmp_path / "r")
    file = folder / "text-00001.arrayrecord"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"text-00001.arrayrecord: 131071 bytes, 131072 were"):
        records.Records(folder, CONFIG)
    file.unlink()
    with pytest.raises(InputError, match=r"text-00001.arrayrecord: is gone; copy the folder again"):
        records.Records(folder, CONFIG)


def test_no_folder_of_records(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        records.Records(tmp_path / "none", CONFIG)
    with pytest.raises(InputError, match=r"data.cached=False for a folder of videos"):
        records.Records(tmp_path, CONFIG)
    with Progress(tmp_path / "begun", {"settings": {}}):
        pass
    with pytest.raises(InputError, match=r"is unfinished.*again with the same flags"):
        records.Records(tmp_path / "begun", CONFIG)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "longlive_jax records", "version": 1, "latents": []}', "is damaged"),
        ('{"format": "longlive_jax records", "version": 2}', "version 2, this program reads"),
    ],
)
def test_another_manifest(tmp_path, text, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        records.Records(tmp_path, CONFIG)


# Manifests and records of other versions.


def test_a_manifest_with_settings_by_names_of_before(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "old")
    manifest = tmp_path / "old" / records.MANIFEST
    content = json.loads(manifest.read_text().replace('"video.', '"sample.'))
    del content["checksum"]  # of before there were any
    manifest.write_text(json.dumps(content))
    assert len(records.Records(tmp_path / "old", config())) == 5


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"prompts": []}, {"prompts": None}, {"prompts": ["not there"] * 3}, {"chunks": 0},
        {"chunks": 9}, {"chunks": "1"}, {"name": None},
    ],
)  # fmt: skip
def test_records_of_other_fields(folder, tmp_path, fields):
    shutil.copytree(folder, tmp_path / "new")
    array, prompts, chunks = clip(0)
    whole = {"name": "v", "prompts": prompts, "chunks": chunks}
    array = array if fields else array[:, :1]
    packed = [records.pack(whole | fields, array)] * 2
    shard = records.write_shard(tmp_path / "new" / "latents-00000.arrayrecord", packed)

    manifest = tmp_path / "new" / records.MANIFEST
    content = json.loads(manifest.read_text())
    content["latents"][0]["bytes"] = shard.bytes
    del content["checksum"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"latents-00000\.arrayrecord: record 0 of 2 is damaged"):
        records.Records(tmp_path / "new", config())


def test_actions_come_back(tmp_path):
    """Cut as the latents are; a file that is gone, or another's, is refused."""
    folder = make(tmp_path / "r", acted=True)
    cfg = dataclasses.replace(CONFIG, model=ACTED)
    source = records.Records(folder, cfg)
    for i in range(5):
        np.testing.assert_array_equal(source.sample(i, 0).actions, rows(i)[:13])
    assert records.Records(folder, CONFIG).sample(0, 0).actions is None
    first, second = (folder / f"actions-0000{k}.arrayrecord" for k in (0, 1))
    kept = first.read_bytes()
    records.write_shard(first, [records.pack({"name": f"v{i}"}, rows(i)) for i in (1, 0)])
    with pytest.raises(InputError, match=r"actions of record 0 are those of 'v1', .* of 'v0'"):
        records.Records(folder, cfg).sample(0, 0)
    first.write_bytes(kept)
    second.unlink()
    with pytest.raises(InputError, match=r"actions-00001\.arrayrecord: is gone"):
        records.Records(folder, cfg)
