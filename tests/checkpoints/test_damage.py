"""Our checkpoint, damaged: refused in one line that names the place, never other weights."""

import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import store, to_torch, workdir
from longlive_jax.checkpoints.store import checksums
from longlive_jax.errors import InputError
from tests.fuzz.checkpoint import seal

SPEC = {
    "blocks": {
        "weight": params_lib.ParamSpec((3, 4, 8), ("layer", None, None)),
        "bias": params_lib.ParamSpec((3, 8), ("layer", None)),
    },
    "table": {"weight": params_lib.ParamSpec((6, 8), (None, None))},
}
LAYERS = [f"blocks_{i:02d}" for i in range(3)]


def _pieces(change=0):
    rng = np.random.default_rng(change)
    for i in range(3):
        yield store.Piece(("blocks", "weight"), i, rng.normal(size=(1, 4, 8)).astype(np.float32))
        yield store.Piece(("blocks", "bias"), i, rng.normal(size=(1, 8)).astype(np.float32))
    yield store.Piece(("table", "weight"), 0, rng.normal(size=(6, 8)).astype(np.float32))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good") / "ckpt"
    store.save(root, "net", _pieces(), SPEC)
    return root


@pytest.fixture(params=["with checksums", "of before they were written"])
def root(good, tmp_path, request):
    """A copy to damage."""
    root = tmp_path / "ckpt"
    shutil.copytree(good, root)
    if request.param != "with checksums":
        _edit(root / "net/index.json", lambda index: index.pop("checksums"))
        _edit(root / "metadata.json", lambda m: m["parts"]["net"].pop("index_checksum"))
    return root


def _edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _values(root):
    tree = params_lib.flatten(store.load(root, "net", SPEC))
    return {path: np.asarray(array) for path, array in tree.items()}


def _equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_both_ages_load_the_same(good, root):
    assert _equal(_values(root), _values(good))
    store.copy(store.Stored(root, "net"), root.parent / "copy")
    assert _equal(_values(root.parent / "copy"), _values(good))


def _group(name, change):
    return lambda index: change(index["groups"][name])


INDEX = {
    "a layer less": lambda x: x["groups"].pop("blocks_01"),
    "an array of a layer less": _group("blocks_01", lambda g: g.pop("blocks/bias")),
    "a layer twice": _group("blocks_01", lambda g: g.update({"blocks/weight": [0, 1]})),
    "layers swapped": lambda x: x["groups"].update(
        {
            a: {k: [int(b[-1]), 1] for k in x["groups"][a]}
            for a, b in (("blocks_00", "blocks_01"), ("blocks_01", "blocks_00"))
        }
    ),
    "past the end": _group("blocks_02", lambda g: g.update({"blocks/weight": [3, 1]})),
    "before the start": _group("blocks_00", lambda g: g.update({"blocks/weight": [-1, 1]})),
    "too many rows": _group("rest", lambda g: g.update({"table/weight": [0, 7]})),
    "too few rows": _group("rest", lambda g: g.update({"table/weight": [0, 5]})),
    "no rows": _group("rest", lambda g: g.update({"table/weight": []})),
    "half a row": _group("rest", lambda g: g.update({"table/weight": [0, 5.5]})),
    "an array that is none": _group("rest", lambda g: g.update({"other": [0, 1]})),
    "another dtype": lambda x: x["leaves"]["table/weight"].update(dtype="bfloat16"),
    "an unknown dtype": lambda x: x["leaves"]["table/weight"].update(dtype="float33"),
    "a dtype that is no number": lambda x: x["leaves"]["table/weight"].update(dtype="V8"),
    "another shape": lambda x: x["leaves"]["table/weight"].update(shape=[6, 4]),
    "a huge shape": lambda x: x["leaves"]["table/weight"].update(shape=[10**30, 4]),
    "no axes": lambda x: x["leaves"]["table/weight"].update(shape=[]),
    "no groups": lambda x: x.pop("groups"),
    "groups of another kind": lambda x: x.update(groups=[1]),
    "a group of another kind": lambda x: x["groups"].update(rest=None),
    "leaves of another kind": lambda x: x.update(leaves={"table/weight": 1}),
    "an array in an array": lambda x: x["leaves"].update(
        {"table/weight/x": x["leaves"]["table/weight"]}
    ),
}


@pytest.mark.parametrize("change", INDEX.values(), ids=INDEX)
def test_indices_that_lie(root, change):
    _edit(root / "net/index.json", change)
    for use in (_values, lambda root: to_torch.export_store(root, "net", root / "out")):
        with pytest.raises(InputError, match=r"is damaged|other sizes") as error:
            use(root)
        assert str(root) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "null", "1", "{", "[" * 200_000, '{"a": 1, "a": 1}'])
@pytest.mark.parametrize("file", ["net/index.json", "metadata.json"])
def test_json_of_the_wrong_kind(root, file, text):
    (root / file).write_text(text)
    with pytest.raises(InputError, match=r"(index|metadata)\.json:? is damaged"):
        _values(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(parts=None),
        lambda m: m.update(parts=[]),
        lambda m: m["parts"].update(net=None),
        lambda m: m["parts"]["net"].pop("directory"),
        lambda m: m["parts"]["net"].pop("sources"),
        lambda m: m["parts"]["net"].update(sources="a"),
        lambda m: m["parts"]["net"].update(config=[]),
        lambda m: m["parts"]["net"].update(config={"model": 1}),
        lambda m: m["parts"]["net"].update(recipe=[]),
        lambda m: m["parts"]["net"].update(network={}),
        lambda m: m.update(version=[1]),
        lambda m: m.update(version=10**400),
    ],
)
def test_metadata_of_the_wrong_kind(root, change):
    _edit(root / "metadata.json", change)
    with pytest.raises(InputError, match=r"metadata\.json: is damaged"):
        _values(root)


@pytest.mark.parametrize(
    "name", ["../ckpt/net", "/etc", ".", "..", "", ".hidden", "a/b", "x" * 300]
)
def test_folders_elsewhere(root, name):
    _edit(root / "metadata.json", lambda m: m["parts"]["net"].update(directory=name))
    with pytest.raises(InputError, match=r"is not the name of a folder in it|damaged"):
        store.Stored(root, "net")


@pytest.mark.parametrize("name", ["../net/rest", "/tmp", "..", ".hidden", "x" * 300, "a\0b"])
def test_groups_elsewhere(root, name):
    _edit(root / "net/index.json", lambda x: x["groups"].update({name: x["groups"].pop("rest")}))
    with pytest.raises(InputError, match=r"index\.json is damaged"):
        store.Stored(root, "net")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "d/../../x", ""])
def test_checksums_of_files_elsewhere(good, tmp_path, name):
    root = tmp_path / "ckpt"
    shutil.copytree(good, root)
    _edit(root / "net/index.json", lambda x: x["checksums"]["rest"].update({name: "0" * 8}))
    _edit(root / "metadata.json", lambda m: m["parts"]["net"].pop("index_checksum"))
    with pytest.raises(InputError, match="is not the name of a file in rest"):
        store.Stored(root, "net")


def test_links_out_of_the_part(root, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not for others")
    os.symlink(secret, root / "net/rest/state/mine")
    for use in (_values, lambda root: store.copy(store.Stored(root, "net"), tmp_path / "copy")):
        with pytest.raises(InputError, match=r"mine: is a link out of its checkpoint, to .*secret"):
            use(root)
    assert not list((tmp_path / "copy").glob("net*"))
    (root / "net/rest/state/mine").unlink()
    os.mkfifo(root / "net/rest/state/mine")
    with pytest.raises(InputError, match="neither a file nor a folder"):
        _values(root)


def test_only_the_parts_files_are_copied(root, tmp_path):
    (root / "net/notes.txt").write_text("x")
    store.copy(store.Stored(root, "net"), tmp_path / "copy")
    names = sorted(path.name for path in (tmp_path / "copy/net").iterdir())
    assert names == [*LAYERS, "index.json", "rest"]


def _files(root):
    return sorted(p for p in (root / "net").rglob("*") if p.is_file())


def test_files_that_are_cut_short_or_missing(root):
    """Whatever the library raises, and whatever it reads without them."""
    expected = _values(root)
    for file in _files(root)[::4]:
        content = file.read_bytes()
        for size in {len(content) // 2, None}:
            file.unlink() if size is None else file.write_bytes(content[:size])
            try:
                assert _equal(_values(root), expected), (file, size)
            except InputError as error:
                assert str(root) in str(error)
            file.write_bytes(content)


def test_flipped_bits_are_never_other_weights(good, tmp_path):
    """Each file of a checkpoint with checksums, metadata.json and index.json included."""
    root, expected = tmp_path / "ckpt", _values(good)
    shutil.copytree(good, root)
    rng = np.random.default_rng(0)
    refused = 0
    for file in [root / "metadata.json", *_files(root)]:
        content = file.read_bytes()
        for at in rng.integers(len(content), size=2 * bool(content)):
            damaged = bytearray(content)
            damaged[at] ^= 1 << rng.integers(8)
            file.write_bytes(damaged)
            try:
                assert _equal(_values(root), expected), (file, at)
            except InputError as error:
                assert str(root) in str(error)
                refused += 1
        file.write_bytes(content)
    assert refused > 50
    assert _equal(_values(root), expected)


def test_checksums_are_those_of_zip(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    assert checksums.of_file(tmp_path / "a") == "cbf43926"  # the check value of CRC-32
    (tmp_path / "b").write_bytes(bytes(9 << 20))
    assert checksums.of_folder(tmp_path).keys() == {"a", "b"}


def test_stray_files_are_no_damage(root, good):
    (root / "net/rest/.DS_Store").write_bytes(b"x")
    (root / "net/._rest").write_bytes(b"x")
    assert _equal(_values(root), _values(good))


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["key_metadata"].pop(0),
        lambda entry: entry["key_metadata"].reverse(),
        lambda entry: entry["value_metadata"].update(skip_deserialize=True),
        lambda entry: entry.clear(),
    ],
)
def test_metadata_of_arrays_that_lies(root, good, change):
    def edit(metadata):
        change(next(iter(metadata["tree_metadata"].values())))

    _edit(root / "net/blocks_01/state/_METADATA", edit)
    seal(root, index_changed=False)
    try:  # some of it says nothing about the values
        assert _equal(_values(root), _values(good))
    except InputError as error:
        assert "blocks_01: is damaged" in str(error)


def test_dtypes_by_the_recipe(tmp_path):
    """An array of a quantised weight is never cast from another dtype."""
    spec = {"codes": params_lib.ParamSpec((2, 4), (None, None), dtype=jnp.uint8)}
    piece = store.Piece(("codes",), 0, np.ones((2, 4), np.float32))
    store.save(tmp_path / "ckpt", "net", [piece], spec)
    with pytest.raises(InputError, match="codes is uint8 by the recipe, float32 in the checkpoint"):
        store.load(tmp_path / "ckpt", "net", spec)


@pytest.mark.parametrize("name", ["x" * 300, "\0", "a\0b"])
def test_names_that_no_file_has(tmp_path, name):
    with pytest.raises(InputError, match="is no checkpoint"):
        store.parts(f"{tmp_path}/{name}")
    assert not workdir.is_run(f"{tmp_path}/{name}")
    with pytest.raises(InputError, match="cannot be the name of a network"):
        store.save(tmp_path / "ckpt", name, _pieces(), SPEC)


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None},
        {"settings": [1]},
        {"checkpoint": 3},
        {"checkpoint": ["a"]},
        {"network": {}},
    ],
)
def test_run_json_of_the_wrong_kind(tmp_path, change):
    workdir.write(tmp_path, workdir.Run({}, None, None))
    assert workdir.read(tmp_path) == workdir.Run({}, None, None)
    _edit(pathlib.Path(tmp_path, "run.json"), lambda run: run.update(change))
    with pytest.raises(InputError, match=r"run\.json: is damaged"):
        workdir.read(tmp_path)
