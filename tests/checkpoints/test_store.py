"""Our checkpoint: what is saved is loaded, anywhere, in any dtype; writes are all or nothing."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import from_torch, safetensors, store, to_torch
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from tests.checkpoints import tiny, torch_file


def _convert(directory, part, file, **kwargs):
    source = from_torch.open_part(part, str(file), tiny.config(), **kwargs)
    return store.save(
        directory, part, source.pieces(), source.spec, section=source.section, sources=source.files
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The three golden networks, the transformer from a .pt file; tests do not change it."""
    root = tmp_path_factory.mktemp("store")
    torch_file.save(root / "dit.pt", {"generator": tiny.weights("dit"), "step": 3})
    _convert(root / "ckpt", "dit", root / "dit.pt")
    for part in ("vae", "umt5"):
        tiny.write_safetensors(root / f"{part}.safetensors", tiny.weights(part))
        _convert(root / "ckpt", part, root / f"{part}.safetensors")
    return root / "ckpt"


def _check(tree, part, dtype=np.float32):
    found = {"/".join(p): a for p, a in params_lib.flatten(tree).items()}
    expected = tiny.ours(part)
    assert sorted(found) == sorted(expected)
    for key, array in expected.items():
        assert isinstance(found[key], jax.Array)
        assert found[key].dtype == dtype
        np.testing.assert_array_equal(found[key], array.astype(dtype), err_msg=key)


@pytest.mark.parametrize("part", tiny.SPECS)
def test_loads_what_the_original_had(checkpoint, part):
    tree = store.load(checkpoint, part, tiny.spec(part), config=tiny.section(part))
    _check(tree, part)
    assert {a.sharding.device_set == {jax.devices()[0]} for a in jax.tree.leaves(tree)} == {True}


@pytest.mark.parametrize("rules", [mesh_lib.RULES, mesh_lib.SAMPLING_RULES])
@pytest.mark.parametrize("part", tiny.SPECS)
def test_loads_sharded_and_cast(checkpoint, part, rules):
    spec = tiny.spec(part)
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=2, seq=4))
    tree = store.load(checkpoint, part, spec, mesh, "bfloat16", rules)
    _check(tree, part, ml_dtypes.bfloat16)
    shardings = params_lib.flatten(params_lib.shardings(spec, mesh, rules))
    leaves = params_lib.flatten(tree)
    for path, wanted in shardings.items():
        assert leaves[path].sharding.is_equivalent_to(wanted, leaves[path].ndim), path
        assert leaves[path].sharding.mesh == mesh
    if part == "dit" and rules is mesh_lib.RULES:
        shard = leaves["blocks", "ffn", "0", "weight"].addressable_shards[0].data
        assert shard.shape == (2, 48 // 8, 64)


@pytest.mark.parametrize("part", tiny.SPECS)
def test_back_to_safetensors_bit_for_bit(checkpoint, part, tmp_path):
    file = tmp_path / "f.safetensors"
    assert to_torch.export_store(checkpoint, part, file) == len(tiny.weights(part))
    _same_file(file, tiny.weights(part))


def _same_file(file, expected):
    found, metadata = safetensors.read(file)
    assert metadata == {"format": "pt"}
    assert sorted(found) == sorted(expected)
    for key, array in expected.items():
        got = found[key].read()
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert got.tobytes() == array.tobytes(), key


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn])
def test_round_trip_of_small_dtypes(tmp_path, dtype):
    tensors = {k: v.astype(dtype) for k, v in tiny.weights("umt5").items()}
    file = tiny.write_safetensors(tmp_path / "f.safetensors", tensors)
    summary = _convert(tmp_path / "ckpt", "umt5", file)
    assert summary == (112064, 112064 * np.dtype(dtype).itemsize, (np.dtype(dtype).name,))
    to_torch.export_store(tmp_path / "ckpt", "umt5", tmp_path / "back.safetensors")
    _same_file(tmp_path / "back.safetensors", tensors)


def test_a_tree_is_exported_and_saved(checkpoint, tmp_path):
    """A trainer's stacked, sharded tree."""
    spec = tiny.spec("dit")
    mesh = mesh_lib.make_mesh(config_lib.Mesh(fsdp=8))
    tree = store.load(checkpoint, "dit", spec, mesh)
    to_torch.export_tree(tree, spec, tmp_path / "f.safetensors")
    _same_file(tmp_path / "f.safetensors", tiny.weights("dit"))
    pieces = store.tree_pieces(tree, spec)
    store.save(tmp_path / "ckpt", "dit", pieces, spec, section=tiny.section("dit"))
    _check(store.load(tmp_path / "ckpt", "dit", spec), "dit")


def test_stacked_groups_load_and_export_too(tmp_path):
    """A checkpoint whose groups hold whole stacked arrays, or any rows in any order."""
    spec = tiny.spec("dit")
    whole = [
        store.Piece(tuple(k.split("/")), 0, np.ascontiguousarray(v))
        for k, v in tiny.ours("dit").items()
    ]
    stacked = [p for p in whole if p.path[0] == "blocks"]
    pieces = [p for p in whole if p.path[0] != "blocks"] + stacked[5:]
    pieces += [store.Piece(p, i, a[i : i + 1]) for p, _, a in stacked[:5] for i in (0, 1)]
    store.save(tmp_path / "ckpt", "dit", reversed(pieces), spec, section=tiny.section("dit"))
    _check(store.load(tmp_path / "ckpt", "dit", spec), "dit")
    to_torch.export_store(tmp_path / "ckpt", "dit", tmp_path / "f.safetensors")
    _same_file(tmp_path / "f.safetensors", tiny.weights("dit"))


def test_groups_are_split_by_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store.writer, "_GROUP_BYTES", 30_000)
    monkeypatch.setattr(from_torch, "_ROWS_BYTES", 5_000)
    file = tiny.write_safetensors(tmp_path / "f.safetensors", tiny.weights("umt5"))
    _convert(tmp_path / "ckpt", "umt5", file)
    names = sorted(p.name for p in (tmp_path / "ckpt/umt5").iterdir())
    assert {"blocks_00", "blocks_00_1", "blocks_02_3", "rest", "rest_1", "rest_2"} <= set(names)
    _check(store.load(tmp_path / "ckpt", "umt5", tiny.spec("umt5")), "umt5")
    to_torch.export_store(tmp_path / "ckpt", "umt5", tmp_path / "back.safetensors")
    _same_file(tmp_path / "back.safetensors", tiny.weights("umt5"))


def test_decoder_alone(checkpoint, tmp_path):
    """Of a whole VAE, the decoder can be loaded alone; of a decoder, nothing else."""
    spec = tiny.spec("vae")
    decoder = {k: spec[k] for k in ("decoder", "conv2")}
    tree = store.load(checkpoint, "vae", decoder)
    assert sorted(tree) == ["conv2", "decoder"]
    kept = {k: v for k, v in tiny.weights("vae").items() if k.split(".")[0] in decoder}
    file = tiny.write_safetensors(tmp_path / "light.safetensors", kept)
    _convert(tmp_path / "ckpt", "vae", file)
    again = store.load(tmp_path / "ckpt", "vae", decoder)
    jax.tree.map(np.testing.assert_array_equal, tree, again)
    with pytest.raises(InputError, match=r"its vae has no conv1, encoder, as light.safetensors"):
        store.load(tmp_path / "ckpt", "vae", spec)


def _golden_file(tmp_path, part="umt5", change=0):
    tensors = {k: v + np.float32(change) for k, v in tiny.weights(part).items()}
    return tiny.write_safetensors(tmp_path / f"{part}_{change}.safetensors", tensors)


def test_a_part_is_replaced_and_others_stay(checkpoint, tmp_path):
    root = tmp_path / "ckpt"
    shutil.copytree(checkpoint, root)
    file = _golden_file(tmp_path, change=1)
    for _ in range(3):
        _convert(root, "umt5", file)
    assert len(list(root.glob("umt5*"))) == 1
    assert sorted(store.parts(root)) == ["dit", "umt5", "vae"]
    tree = store.load(root, "umt5", tiny.spec("umt5"))
    np.testing.assert_array_equal(tree["norm"]["weight"], tiny.weights("umt5")["norm.weight"] + 1)
    _check(store.load(root, "dit", tiny.spec("dit")), "dit")


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("when", ["pieces", "index", "metadata"])
@pytest.mark.parametrize("first", [True, False])
def test_an_unfinished_write_changes_nothing(tmp_path, monkeypatch, when, first):
    root = tmp_path / "ckpt"
    if not first:
        _convert(root, "umt5", _golden_file(tmp_path))
    source = from_torch.open_part("umt5", _golden_file(tmp_path, change=1), tiny.config())

    def pieces():
        for i, piece in enumerate(source.pieces()):
            if i == 15 and when == "pieces":
                raise _Killed
            yield piece

    write_json = versioned.write_json

    def killed(file, value):
        if when in file.name:
            raise _Killed
        write_json(file, value)

    monkeypatch.setattr(versioned, "write_json", killed)
    with pytest.raises(_Killed):
        store.save(root, "umt5", pieces(), source.spec, section=source.section)
    monkeypatch.undo()
    if first:
        with pytest.raises(InputError, match="is no checkpoint"):
            store.load(root, "umt5", tiny.spec("umt5"))
    else:
        _check(store.load(root, "umt5", tiny.spec("umt5")), "umt5")
    # The next attempt is not in the way of what the first one left.
    (root / ".umt5.partial").mkdir(exist_ok=True)
    _convert(root, "umt5", _golden_file(tmp_path))
    _check(store.load(root, "umt5", tiny.spec("umt5")), "umt5")
    names = sorted(p.name for p in root.iterdir() if p.name[0] != ".")
    assert names[0] == "metadata.json"
    assert names[1:] == (["umt5"] if first else ["umt5_1"])


def test_two_writers(tmp_path):
    with (
        store.directory.writing(tmp_path / "ckpt"),
        pytest.raises(InputError, match="another process is writing"),
    ):
        _convert(tmp_path / "ckpt", "umt5", _golden_file(tmp_path))


def test_output_that_is_something_else(tmp_path):
    file = _golden_file(tmp_path)
    with pytest.raises(InputError, match=r"holds 'umt5_0.safetensors' and no checkpoint"):
        _convert(tmp_path, "umt5", file)
    with pytest.raises(InputError, match="is a file"):
        _convert(file, "umt5", file)
    with pytest.raises(InputError, match="Not a directory"):
        _convert(file + "/ckpt", "umt5", file)


# Loading what does not fit.


def test_missing_part_and_checkpoint(tmp_path):
    _convert(tmp_path / "ckpt", "umt5", _golden_file(tmp_path))
    with pytest.raises(
        InputError, match=r"ckpt: holds no vae \(it holds umt5\); add it with .*--vae=FILE"
    ):
        store.load(tmp_path / "ckpt", "vae", tiny.spec("vae"))
    with pytest.raises(InputError, match="is no checkpoint"):
        store.load(tmp_path / "none", "vae", tiny.spec("vae"))


@pytest.mark.parametrize(
    ("part", "change", "flags"),
    [
        (
            "dit",
            {"ffn_dim": 128, "num_layers": 3},
            "--config.model.ffn_dim=64 --config.model.num_layers=2",
        ),
        ("dit", {"dim": 96}, "--config.model.dim=48"),
        ("vae", {"dec_dim": 16}, "--config.vae.dec_dim=8"),
        ("umt5", {"num_heads": 4}, "--config.umt5.num_heads=8"),
    ],
)
def test_other_sizes(checkpoint, part, change, flags):
    section = tiny.section(part)
    other = dataclasses.replace(section, **change)
    with pytest.raises(InputError) as error:
        store.load(checkpoint, part, tiny.SPECS[part](other), config=other)
    assert "other sizes than the config" in str(error.value)
    assert str(error.value).endswith(f"It fits with {flags}")


def test_heads_that_no_shape_tells(checkpoint):
    section = tiny.section("dit")
    other = dataclasses.replace(section, num_heads=8)
    with pytest.raises(InputError, match=r"num_heads is 8 by the config, 4 in .*model.num_heads=4"):
        store.load(checkpoint, "dit", tiny.SPECS["dit"](other), config=other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "metadata.json").write_text("{"), "metadata.json: is damaged"),
        (lambda root: (root / "metadata.json").write_text("[]"), "metadata.json: is damaged"),
        (lambda root: (root / "umt5/index.json").write_text("{}"), "index.json is damaged"),
        (lambda root: shutil.rmtree(root / "umt5/blocks_01"), "blocks_01: is damaged"),
        (lambda root: shutil.rmtree(root / "umt5/blocks_01/state"), "blocks_01: is damaged"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    root = tmp_path / "ckpt"
    _convert(root, "umt5", _golden_file(tmp_path))
    damage(root)
    with pytest.raises(InputError, match=message):
        store.load(root, "umt5", tiny.spec("umt5"))


def test_other_versions(tmp_path):
    _convert(tmp_path / "ckpt", "umt5", _golden_file(tmp_path))
    file = tmp_path / "ckpt/metadata.json"
    metadata = json.loads(file.read_text())
    file.write_text(json.dumps(metadata | {"version": 2}))
    with pytest.raises(
        InputError, match="version 2, this program reads 'longlive_jax weights' version 1"
    ):
        store.parts(tmp_path / "ckpt")
    file.write_text(json.dumps(metadata | {"format": "x"}))
    with pytest.raises(InputError, match="format 'x'"):
        store.parts(tmp_path / "ckpt")


def test_metadata(checkpoint):
    metadata = json.loads((checkpoint / "metadata.json").read_text())
    dit = metadata["parts"]["dit"]
    assert (metadata["version"], dit["sources"], dit["dtypes"]) == (1, ["dit.pt"], ["float32"])
    assert dit["config"]["model"]["num_heads"] == 4
    assert jnp.dtype(dit["dtypes"][0]).itemsize * dit["parameters"] == dit["bytes"]
