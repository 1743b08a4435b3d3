"""Matrix-Game's action module in files: in and out by its names, and what is refused."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from absl import logging as absl_logging

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import from_torch, safetensors, store, to_torch
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from tests.checkpoints import tiny

ACTIONS = config_lib.Actions(
    kind="module", heads=1, head_dim=64, keyboard_embed=8, window=0, layers=2, keyboard_dim=6
)
PREFIX = "blocks.1.action_model"


@pytest.fixture(scope="module")
def config():
    cfg = tiny.config()
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, actions=ACTIONS))


@pytest.fixture(scope="module")
def params(config):
    draw = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: draw.standard_normal(s.shape).astype(np.float32),
        dit.spec(config.model), is_leaf=params_lib.is_spec,
    )  # fmt: skip


@pytest.fixture
def file(config, params, tmp_path):
    to_torch.export_tree(params, dit.spec(config.model), tmp_path / "dit.safetensors")
    return tmp_path / "dit.safetensors"


def tensors(file):
    return {key: t.read() for key, t in safetensors.read(file)[0].items()}


def write(file, arrays):
    safetensors.write(file, {k: (v.shape, v.dtype) for k, v in arrays.items()}, arrays.items())


def test_out_and_in_by_the_originals_names(file, config, params):
    dim = config.model.dim
    shapes = {
        key.removeprefix(f"{PREFIX}."): x.shape
        for key, x in tensors(file).items() if key.startswith(PREFIX)
    }  # fmt: skip
    assert shapes == {
        "keyboard_embed.0.weight": (8, 6), "keyboard_embed.0.bias": (8,),
        "keyboard_embed.2.weight": (8, 8), "keyboard_embed.2.bias": (8,),
        "mouse_mlp.0.weight": (64, dim + 24), "mouse_mlp.0.bias": (64,),
        "mouse_mlp.2.weight": (64, 64), "mouse_mlp.2.bias": (64,),
        "mouse_mlp.3.weight": (64,), "mouse_mlp.3.bias": (64,),
        "t_qkv.weight": (192, 64), "proj_mouse.weight": (dim, 64),
        "mouse_attn_q.weight": (64, dim), "keyboard_attn_kv.weight": (128, 96),
        "proj_keyboard.weight": (dim, 64),
        "img_attn_q_norm.weight": (64,), "img_attn_k_norm.weight": (64,),
        "key_attn_q_norm.weight": (64,), "key_attn_k_norm.weight": (64,),
    }  # fmt: skip
    source = from_torch.open_part("dit", str(file), config)
    found = {}
    for path, start, array in source.pieces():
        found.setdefault(path, {})[start] = array
    for path, expected in params_lib.flatten(params).items():
        rows = [found[path][i] for i in sorted(found[path])]
        np.testing.assert_array_equal(np.concatenate(rows), expected, err_msg="/".join(path))


def test_camera_inputs_are_left_out_with_a_warning(file, config, caplog, monkeypatch):
    monkeypatch.setattr(absl_logging.get_absl_logger(), "propagate", True)
    camera = {
        "patch_embedding_wancamctrl.weight": np.zeros((4, 4), np.float32),
        "blocks.0.cam_injector_layer1.weight": np.zeros((4, 4), np.float32),
    }
    write(file, tensors(file) | camera)
    with caplog.at_level(logging.WARNING):
        from_torch.open_part("dit", str(file), config)
    assert "2 tensors of camera and memory inputs are left out" in caplog.text


def test_what_is_refused(file, config):
    arrays, key = tensors(file), f"{PREFIX}.key_attn_k_norm.weight"
    write(file, arrays | {key: np.full(64, 1.5, np.float32)})
    with pytest.raises(InputError, match=f"{key} must be 1 everywhere.*64 of its 64"):
        from_torch.open_part("dit", str(file), config)
    key = f"{PREFIX}.proj_mouse.weight"
    write(file, arrays | {key: np.zeros((3, 64), np.float32)})
    with pytest.raises(InputError, match=rf"{key}: expected \(48, 64\), found \(3, 64\)"):
        from_torch.open_part("dit", str(file), config)
    write(file, arrays)
    with pytest.raises(InputError, match=r"--config.actions.kind=module.*keyboard_dim=6.*heads=1"):
        from_torch.open_part("dit", str(file), tiny.config())
    four = dataclasses.replace(ACTIONS, keyboard_dim=4)
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, actions=four)
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"action module is that of --config.actions.keyboard_dim=6"
    ):
        from_torch.open_part("dit", str(file), other)


def test_a_checkpoint_keeps_the_settings_and_a_plain_one_is_a_start(config, params, tmp_path):
    spec = dit.spec(config.model)
    store.save_tree(tmp_path / "grown", "dit", params, spec, section=config.model)
    stored = store.Stored(tmp_path / "grown", "dit")
    made = stored.info["config"]["model"]
    assert made["actions.kind"] == "module" and made["actions.keyboard_dim"] == 6
    np.testing.assert_array_equal(
        store.load(tmp_path / "grown", "dit", spec)["blocks"]["action_model"]["t_qkv"]["weight"],
        params["blocks"]["action_model"]["t_qkv"]["weight"],
    )
    plain = tiny.config().model
    without = {k: v for k, v in params["blocks"].items() if k != "action_model"}
    tree = {**params, "blocks": without}
    store.save_tree(tmp_path / "plain", "dit", tree, dit.spec(plain), section=plain)
    assert not [key for key in store.Stored(tmp_path / "plain", "dit").info["config"]["model"]
                if key.startswith("actions")]  # fmt: skip
    grown, absent = store.load_or_init(tmp_path / "plain", "dit", spec, jax.random.key(0))
    assert all("action_model" in path for path in absent) and absent
    assert not np.asarray(grown["blocks"]["action_model"]["proj_mouse"]["weight"]).any()
