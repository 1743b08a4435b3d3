"""safetensors files and folders of them, and finding the right file in a folder or on the hub."""

import json
import struct
import sys
import types

import ml_dtypes
import numpy as np
import pytest

from longlive_jax.checkpoints import safetensors, sources
from longlive_jax.errors import InputError
from tests.checkpoints import tiny, torch_file

W = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("name", sorted(safetensors.DTYPES))
def test_every_dtype_round_trips(tmp_path, name):
    array = np.arange(6).reshape(2, 3).astype(safetensors.DTYPES[name])
    file = tiny.write_safetensors(tmp_path / "f.safetensors", {"a": array, "b": array.T})
    found, _ = safetensors.read(file)
    assert found["a"].dtype == array.dtype
    np.testing.assert_array_equal(found["a"].read(), array)
    np.testing.assert_array_equal(found["b"].read(1, 3), array.T[1:3])


def test_layout_of_the_file(tmp_path):
    """Byte for byte what the format's description says."""
    file = tmp_path / "f.safetensors"
    safetensors.write(file, {"w": ((2, 3), W.dtype)}, [("w", W)], {"format": "pt"})
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    assert size % 8 == 0
    assert json.loads(data[8 : 8 + size]) == {
        "__metadata__": {"format": "pt"},
        "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    }
    assert data[8 + size :] == W.tobytes()


def test_an_unfinished_file_does_not_appear(tmp_path):
    def fail():
        yield "a", W
        raise KeyboardInterrupt

    entries = {"a": (W.shape, W.dtype), "b": (W.shape, W.dtype)}
    with pytest.raises(KeyboardInterrupt):
        safetensors.write(tmp_path / "f", entries, fail())
    assert not list(tmp_path.iterdir())


def _with_header(header):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(24)


_GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345678{",
        struct.pack("<Q", 1 << 60) + b"{}",
        _with_header({"w": _GOOD})[:-1],
        _with_header(b"{not json"),
        _with_header(b"[1]"),
        _with_header(b'{"\xff": 1}'),
        _with_header({"w": _GOOD | {"dtype": "F3"}}),
        _with_header({"w": _GOOD | {"shape": [2, 4]}}),
        _with_header({"w": _GOOD | {"shape": [-2, -3]}}),
        _with_header({"w": _GOOD | {"data_offsets": [4, 28]}}),
        _with_header({"w": _GOOD | {"data_offsets": "04"}}),
        _with_header({"w": 3}),
        _with_header({"w": {}}),
    ],
)
def test_damaged_files(tmp_path, data):
    file = tmp_path / "f.safetensors"
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"f\.safetensors"):
        sources.read(str(file))


def test_kind_is_told_by_content(tmp_path):
    tiny.write_safetensors(tmp_path / "weights.pt", {"w": W})
    torch_file.save(tmp_path / "weights.safetensors", {"w": W})
    for name in ("weights.pt", "weights.safetensors"):
        np.testing.assert_array_equal(sources.read(str(tmp_path / name))["w"].read(), W)


def _shards(folder, index=True):
    folder.mkdir(exist_ok=True)
    tiny.write_safetensors(folder / "m-00001-of-00002.safetensors", {"a": W})
    tiny.write_safetensors(folder / "m-00002-of-00002.safetensors", {"b": W})
    if index:
        where = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}
        (folder / "m.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("index", [True, False])
def test_sharded_folder(tmp_path, index):
    _shards(tmp_path, index)
    assert sorted(sources.read(sources.locate(str(tmp_path), "dit"))) == ["a", "b"]


def test_folder_errors(tmp_path):
    _shards(tmp_path)
    (tmp_path / "m-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"1 of 2 files of its index are not there: m-00002"):
        sources.read(str(tmp_path))
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../m.safetensors"}}))
    with pytest.raises(InputError, match="not there"):
        sources.read(str(tmp_path))
    for text in ("{", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(InputError, match="copy or download"):
            sources.read(str(tmp_path))
    index.unlink()
    tiny.write_safetensors(tmp_path / "again.safetensors", {"a": W})
    with pytest.raises(InputError, match=r"a is in .*again\.safetensors and in m-00001"):
        sources.read(str(tmp_path))


def test_locate_in_the_released_folder(tmp_path):
    _shards(tmp_path)
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    for name in (
        "Wan2.2_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
        "google/umt5-xxl/tokenizer.json",
    ):
        (tmp_path / name).touch()
    found = {p: sources.locate(str(tmp_path), p) for p in ("dit", "vae", "umt5", "tokenizer")}
    assert found == {
        "dit": str(tmp_path),
        "vae": str(tmp_path / "Wan2.2_VAE.pth"),
        "umt5": str(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"),
        "tokenizer": str(tmp_path / "google/umt5-xxl/tokenizer.json"),
    }
    (tmp_path / "google/umt5-xxl/tokenizer.json").rename(tmp_path / "google/umt5-xxl/spiece.model")
    found = sources.locate(str(tmp_path), "tokenizer")
    assert found == str(tmp_path / "google/umt5-xxl/spiece.model")


def test_locate_errors(tmp_path):
    with pytest.raises(InputError, match=r"--dit=.*none.pt: there is no such file"):
        sources.locate(str(tmp_path / "none.pt"), "dit")
    with pytest.raises(InputError, match=r"--tokenizer=.*none of tokenizer.json"):
        sources.locate(str(tmp_path), "tokenizer")


COMMIT = "0123456789abcdef0123456789abcdef01234567"
BRANCHES = {None: COMMIT, "main": COMMIT, "v1.0": "f" * 40}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives what lies in tmp_path, and writes down what it is asked for."""
    hub = types.ModuleType("huggingface_hub")
    hub.asked = []
    hub.model_info = lambda repo, revision: types.SimpleNamespace(sha=BRANCHES[revision])
    hub.hf_hub_download = lambda repo, name, revision: (
        hub.asked.append((repo, name, revision)) or str(tmp_path / name.split("/")[-1])
    )
    hub.list_repo_files = lambda repo, revision: [
        "README.md", "config.json", "a-1.safetensors", "a.safetensors.index.json",
        "vae/b.safetensors", "assets/x.safetensors", "models_t5_umt5-xxl-enc-bf16.pth",
    ]  # fmt: skip
    hub.snapshot_download = lambda repo, revision, allow_patterns: (
        hub.asked.append((repo, allow_patterns, revision)) or str(tmp_path)
    )
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for name in ("model.safetensors", "vae/b.safetensors", "models_t5_umt5-xxl-enc-bf16.pth"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        tiny.write_safetensors(tmp_path / name, {"w": W})
    return hub


def test_hub(hub, tmp_path):
    for source, part, place in (
        ("hf://Wan-AI/Wan2.2/sub/model.safetensors", "dit", "model.safetensors"),
        ("hf://Wan-AI/Wan2.2", "dit", ""),
        ("hf://Wan-AI/Wan2.2", "vae", "vae"),
    ):
        assert sources.locate(source, part) == str(tmp_path / place)
    assert hub.asked == [
        ("Wan-AI/Wan2.2", "sub/model.safetensors", COMMIT),
        ("Wan-AI/Wan2.2", ["config.json", "a-1.safetensors", "a.safetensors.index.json"], COMMIT),
        ("Wan-AI/Wan2.2", ["vae/b.safetensors"], COMMIT),
    ]
    with pytest.raises(InputError, match="add /FILE"):
        sources.locate("hf://Wan-AI/Wan2.2", "tokenizer")
    for wrong in ("hf://Wan2.2", "hf://a/b@", "hf://a/b@v1@v2", "hf://a/@v1", "hf://a/b@../x"):
        with pytest.raises(InputError, match="must be hf://owner/name"):
            sources.locate(wrong, "dit")


@pytest.mark.parametrize(
    "source, part, origin",
    [
        ("hf://a/b", "dit", f"hf://a/b@{COMMIT}"),
        ("hf://a/b@v1.0", "vae", f"hf://a/b@{'f' * 40}/vae"),
        ("hf://a/b@main", "umt5", f"hf://a/b@{COMMIT}/models_t5_umt5-xxl-enc-bf16.pth"),
        ("hf://a/b@v1.0/model.safetensors", "dit", f"hf://a/b@{'f' * 40}/model.safetensors"),
        (
            f"hf://a/b@{'9' * 40}/x/model.safetensors",
            "dit",
            f"hf://a/b@{'9' * 40}/x/model.safetensors",
        ),
    ],
)
def test_what_comes_from_the_hub_is_known_by_its_commit(hub, source, part, origin):
    """A branch or tag is looked up once; then all is asked for by the commit."""
    if "9" * 40 in source:
        del hub.model_info
    found = sources.locate(source, part)
    assert found.origin == origin
    assert {revision for *_, revision in hub.asked} == {origin.split("@")[1][:40]}
    assert sources.locate(found, part).origin == found.split("/")[-1]  # a path has no commit


def test_hub_that_is_not_there(hub, monkeypatch):
    def offline(repo, revision):
        raise OSError("no route to host\nmore")

    hub.model_info = offline
    with pytest.raises(InputError, match=r"no route to host$"):
        sources.locate("hf://Wan-AI/Wan2.2", "dit")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        sources.locate("hf://Wan-AI/Wan2.2", "dit")


def test_bfloat16_bits(tmp_path):
    bits = np.array([0x3F80, 0x8000, 0x0001], np.uint16).view(ml_dtypes.bfloat16)
    found, _ = safetensors.read(tiny.write_safetensors(tmp_path / "f", {"w": bits}))
    assert found["w"].read().view(np.uint16).tolist() == [0x3F80, 0x8000, 0x0001]
