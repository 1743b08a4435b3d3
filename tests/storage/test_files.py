"""What writes and reads files by an address: in one step, line by line, as a mirror, as copies."""

import pathlib

import numpy as np
import pytest

from longlive_jax.checkpoints import store
from longlive_jax.data import records
from longlive_jax.data.copies import VARIABLE
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError
from longlive_jax.files import lines, scratch, versioned
from longlive_jax.files.arrays import save_npz
from longlive_jax.files.atomic import atomic_path
from tests.launch.commands import save_tiny


def test_a_file_is_sent_when_it_is_whole(server, tmp_path):
    path = server.path("atomic/file.txt")
    with atomic_path(path) as partial:
        partial.write_text("one")
        assert not path.exists()
    assert path.read_text() == "one" and not partial.exists()
    with pytest.raises(KeyError), atomic_path(path) as partial:
        partial.write_text("two")
        raise KeyError
    assert path.read_text() == "one" and not partial.exists()
    save_npz(server.path("a.npz"), x=np.arange(3))
    (tmp_path / "a.npz").write_bytes(server.path("a.npz").read_bytes())
    assert np.array_equal(np.load(tmp_path / "a.npz")["x"], np.arange(3))
    versioned.write(server.path("v.json"), "form", 1, {"a": [1]})
    assert versioned.read(server.path("v.json"), "form", 1, "")["a"] == [1]
    with pytest.raises(InputError, match="has one slash"):
        save_npz("s3:/bucket/a.npz", x=1)


def test_a_video_is_sent_when_it_is_whole(s3, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8)
    for path in (s3.path("v/a.mp4"), tmp_path / "a.mp4"):
        with VideoWriter(path, 16, 16, frames=9) as writer:
            writer.write(frames)
            assert not path.exists()
    assert s3.path("v/a.mp4").read_bytes() == (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(KeyError), VideoWriter(s3.path("v/b.mp4"), 16, 16) as writer:
        writer.write(frames)
        raise KeyError
    assert not s3.path("v/b.mp4").exists()


def test_lines_are_added(server):
    path = server.path("log/failures.jsonl")
    lines.begin(path)
    lines.add(path, "1\n")
    lines.begin(path)
    lines.add(path, "2\n3\n")
    assert path.read_text() == "1\n2\n3\n"
    assert lines.of_process(path, 0) == path
    assert lines.of_process(path, 12).name == "failures-00012.jsonl"
    local = pathlib.Path("x/failures.jsonl")
    assert lines.of_process(local, 12) == local


def test_a_mirror_sends_what_has_changed(server, tmp_path, monkeypatch):
    root = server.path("mirror")
    (root / "had.txt").write_text("had")
    mirror = scratch.Mirror(root)
    mirror.fetch("had.txt")
    mirror.fetch("missing.txt")
    (mirror.folder / "had.txt").write_text("had, and more")
    (mirror.folder / "below").mkdir()
    (mirror.folder / "below/x").write_text("x")
    mirror.sync()
    assert (root / "had.txt").read_text() == "had, and more"
    sent = []
    monkeypatch.setattr(type(root), "write_bytes", lambda self, data: sent.append(self.name))
    (mirror.folder / "below/x").write_text("xx")
    mirror.sync()
    mirror.sync()
    assert sent == ["x"]
    own = scratch.Mirror(tmp_path)
    own.sync()
    assert own.folder == tmp_path


def test_scratch_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    scratch._root.cache_clear()
    abandoned = tmp_path / f"longlive_jax-{2**22 + 1}-abc"  # past the largest process id
    other = tmp_path / "longlive_jax-of-somebody"
    for folder in (abandoned, other):
        folder.mkdir()
    made = scratch.folder()
    assert made.is_dir() and not abandoned.exists() and other.exists()
    scratch.remove()
    assert not made.exists() and other.exists()


def test_files_of_a_dataset_are_copied_once(s3, tmp_path, monkeypatch):
    root, draw = s3.path("copies"), np.random.default_rng(0)
    arrays = draw.standard_normal((6, 4), np.float32)
    shards = [
        records.write_shard(
            root / f"x-{i}", (records.pack({}, a) for a in arrays[3 * i : 3 * i + 3])
        )
        for i in range(2)
    ]
    (root / records.MANIFEST).write_text("1")
    read = records.Shards(root, shards)
    for index in (5, 0, 5):
        assert np.array_equal(read.read(index)[1], arrays[index])
    kept = [p for p in (tmp_path / "copies").rglob("x-*") if p.suffix != ".lock"]
    assert len(kept) == 2
    (root / "x-0").unlink()
    with pytest.raises(InputError, match="x-0: is gone"):
        records.Shards(root, shards)
    # The same address with other content has copies of its own; one cut short is none.
    (root / "x-0").write_bytes(b"short")
    (root / records.MANIFEST).write_text("2")
    with pytest.raises(InputError, match=r"x-0: 5 bytes, \d+ were written"):
        records.Shards(root, shards).read(0)
    monkeypatch.setenv(VARIABLE, "/proc/nobody-writes-here")
    with pytest.raises(InputError, match="set LONGLIVE_CACHE_DIR to a folder"):
        records.Shards(root, shards).read(5)


def test_a_checkpoint_is_replaced_when_the_new_one_is_whole(s3, tmp_path):
    local = save_tiny(tmp_path / "ckpt", parts=("vae",))
    root = s3.path("replaced")
    stored = store.Stored(local, "vae")
    store.copy(stored, str(root))
    first = store.Stored(str(root), "vae")
    assert first.path.name == "vae"
    # What a killed process left: files without an entry in metadata.json.
    (root / "vae_1" / ".unfinished").write_bytes(b"")
    (root / "vae_1" / "blocks" / "x").write_bytes(b"1")
    store.copy(stored, str(root))
    second = store.Stored(str(root), "vae")
    assert second.path.name == "vae_1" and not (root / "vae").exists()
    assert not (root / "vae_1/blocks").exists() and not (root / "vae_1/.unfinished").exists()
    for ours, its in zip(second.pieces(), stored.pieces(), strict=True):
        assert ours.path == its.path and np.array_equal(ours.array, its.array)
    (s3.path("other") / "file").write_bytes(b"1")
    with pytest.raises(InputError, match="holds 'file' and no checkpoint"):
        store.copy(stored, str(s3.path("other")))
