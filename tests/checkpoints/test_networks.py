"""Networks of any name in one checkpoint, and those that grew since they were saved."""

import dataclasses
import json
import sys

import jax
import numpy as np
import pytest

from configs import tiny as tiny_config
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import networks, store, to_torch
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from tests.checkpoints import tiny
from tests.models.test_branches import SPEED

LAYER = {
    "ffn": {"0": {"weight": params_lib.ParamSpec((8, 16), (None, None), params_lib.normal(1))}}
}
SPEC = {
    "blocks": params_lib.stack(LAYER, 3),
    "head": {"bias": params_lib.ParamSpec((16,), (None,), params_lib.ones)},
}
# Adapters, a kind of network of which nothing is known.
ADAPTERS = {
    "blocks": params_lib.stack(
        {
            side: params_lib.ParamSpec(shape, (None, None), params_lib.normal(0.1))
            for side, shape in (("a", (8, 2)), ("b", (2, 16)))
        },
        3,
    )
}


def save(root, name, spec, seed, **kwargs):
    tree = params_lib.init(spec, jax.random.key(seed))
    store.save_tree(root, name, tree, spec, **kwargs)
    return tree


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_networks_have_names_of_their_own(tmp_path):
    """One is replaced, and no other changes: not even one whose folder could be its next."""
    root = tmp_path / "ckpt"
    trees = {
        name: save(root, name, SPEC, seed)
        for seed, name in enumerate(("student", "critic_1", "critic"))
    }
    trees["lora"] = save(root, "lora", ADAPTERS, 3)
    for seed in (7, 8, 9):
        trees["critic"] = save(root, "critic", SPEC, seed)
    assert set(store.parts(root)) == {"student", "critic_1", "critic", "lora"}
    for name, tree in trees.items():
        equal(store.load(root, name, ADAPTERS if name == "lora" else SPEC), tree)
    with pytest.raises(
        InputError, match=r"holds no ema \(it holds critic, .*; give another checkp"
    ):
        store.load(root, "ema", SPEC)
    with pytest.raises(InputError, match=r"its lora has no head"):
        store.load(root, "lora", SPEC)
    with pytest.raises(InputError, match=r"blocks/a \(3, 8, 2\) is not in .*fits with another con"):
        store.load(root, "lora", {"blocks": SPEC["blocks"]})
    store.copy(store.Stored(root, "critic"), tmp_path / "other")
    equal(store.load(tmp_path / "other", "critic", SPEC), trees["critic"])


@pytest.mark.parametrize("name", ["tokenizer", "metadata.json", "../dit", ".dit", "", "a/b"])
def test_names_that_no_network_has(tmp_path, name):
    with pytest.raises(InputError, match="cannot be the name of a network"):
        save(tmp_path / "ckpt", name, SPEC, 0)


def test_a_critic_may_be_a_transformer(tmp_path):
    """Then its section of the config is checked and named, and it goes to the original's keys."""
    root, spec = tmp_path / "ckpt", tiny.spec("dit")
    section = tiny.section("dit")
    save(root, "critic", spec, 1, network="dit", section=section)
    info = json.loads((root / "metadata.json").read_text())["parts"]["critic"]
    assert info["network"] == "dit" and info["config"]["model"]["num_heads"] == 4
    other = config_lib.Model(**{**info["config"]["model"], "ffn_dim": 128})
    with pytest.raises(InputError, match=r"its critic has .*with --config.model.ffn_dim=64$"):
        store.load(root, "critic", tiny.SPECS["dit"](other), config=other)
    file = tmp_path / "critic.safetensors"
    assert to_torch.export_store(root, "critic", file) == len(tiny.weights("dit"))


def grown(layers=3):
    branch = params_lib.ParamSpec((8, 4), ("embed", None), params_lib.normal(0.5))
    gate = params_lib.ParamSpec((4,), (None,))
    return {
        **SPEC,
        "blocks": {
            "ffn": SPEC["blocks"]["ffn"],
            "actions": params_lib.stack({"qkv": {"weight": branch}, "gate": gate}, layers),
        },
        "action_embedding": {"bias": params_lib.ParamSpec((8,), (None,), params_lib.ones)},
    }


@pytest.mark.parametrize("mesh", [None, config_lib.Mesh(fsdp=4)])
def test_a_network_that_grew_begins_with_what_there_is(tmp_path, mesh):
    root, spec, key = tmp_path / "ckpt", grown(layers=2), jax.random.key(5)
    before = save(root, "dit", SPEC, 0)
    mesh = mesh and mesh_lib.make_mesh(mesh)
    tree, absent = store.load_or_init(root, "dit", spec, key, mesh)
    assert absent == (
        "blocks/actions/gate", "blocks/actions/qkv/weight", "action_embedding/bias"
    )  # fmt: skip
    equal({"ffn": tree["blocks"]["ffn"]}, {"ffn": before["blocks"]["ffn"]})
    equal(tree["head"], before["head"])
    # What is new is what a network without a checkpoint would have.
    fresh = params_lib.init({"dit": spec}, key)["dit"]
    equal(tree["blocks"]["actions"], fresh["blocks"]["actions"])
    equal(tree["action_embedding"], fresh["action_embedding"])
    assert jax.tree.structure(tree) == jax.tree.structure(fresh)
    if mesh:
        wanted = params_lib.shardings(spec, mesh)
        for x, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(wanted)):
            assert x.sharding.is_equivalent_to(sharding, x.ndim)
    # Once it is saved, nothing is missing.
    store.save_tree(root, "dit", tree, spec)
    again, absent = store.load_or_init(root, "dit", spec, key, mesh)
    assert absent == ()
    equal(again, tree)


def test_what_grew_must_fit_where_it_is_not_new(tmp_path):
    root, key = tmp_path / "ckpt", jax.random.key(0)
    save(root, "dit", grown(), 0)
    with pytest.raises(InputError, match=r"blocks/actions/.* is not in the config"):
        store.load_or_init(root, "dit", SPEC, key)
    wider = {**grown(), "head": {"bias": params_lib.ParamSpec((17,), (None,))}}
    with pytest.raises(InputError, match=r"head/bias is \(17,\) by the config, \(16,\) in"):
        store.load_or_init(root, "dit", wider, key)
    with pytest.raises(InputError, match="its dit has none of the 2 arrays"):
        store.load_or_init(root, "dit", {"x": ADAPTERS["blocks"]}, key)
    # `load` takes nothing for granted.
    save(root, "dit", SPEC, 0)
    with pytest.raises(InputError, match="its dit has no action_embedding"):
        store.load(root, "dit", grown())


def test_a_transformer_that_gained_a_branch_begins_with_what_is_stored(tmp_path, monkeypatch):
    cfg = config_lib.from_config_dict(tiny_config.get_config())
    mesh = mesh_lib.make_mesh(cfg.mesh)
    plain = dit.spec(cfg.model)
    tree = params_lib.init(plain, jax.random.key(1))
    store.save_tree(tmp_path, "dit", tree, plain, section=cfg.model)
    grown = dit.insert(dit.BRANCHES, dataclasses.replace(SPEED, layers=1), before="ffn")
    # By its name: `dit.spec` is the function.
    spec_module = sys.modules["longlive_jax.models.dit.spec"]
    monkeypatch.setattr(spec_module, "branches_of", lambda cfg: grown)
    with pytest.raises(InputError, match="speed"):
        networks.check(str(tmp_path), "dit", cfg)
    networks.check(str(tmp_path), "dit", cfg, grown=True)
    begun, absent = networks.load_or_init(str(tmp_path), "dit", cfg, mesh, jax.random.key(2))
    assert set(absent) == {"blocks/speed/weight", "blocks/speed/bias"}
    assert not np.any(begun["blocks"].pop("speed")["weight"])
    equal(begun, tree)
