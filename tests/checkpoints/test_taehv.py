"""A published TAEHV file: its decoder is taken, and decodes what our sampler makes."""

import dataclasses

import numpy as np
import pytest

from configs import tiny as tiny_config
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import from_torch, layout, networks, store
from longlive_jax.errors import InputError
from longlive_jax.models import vae
from tests.checkpoints import tiny
from tests.launch import commands
from tests.models.test_taehv import TINY, drawn

CFG = dataclasses.replace(
    config_lib.from_config_dict(tiny_config.get_config()), vae=TINY, dtype="float32"
)


def published(root, changes=()):
    """The file, with an encoder, and a growth in time of two frames where one is used."""
    tensors = {"encoder.0.weight": np.zeros((64, 12, 3, 3), np.float32)}
    for w in layout.weights(vae.spec(TINY)):
        leaf = drawn(TINY)
        for name in w.path:
            leaf = leaf[name]
        tensors |= dict(zip(w.keys, w.to_torch(np.asarray(leaf)), strict=True))
    grow = tensors["decoder.7.conv.weight"]
    tensors["decoder.7.conv.weight"] = np.concatenate([np.full_like(grow, 9), grow])
    tensors |= dict(changes)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    return tiny.write_safetensors(root / "taew2_2.safetensors", tensors)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("taehv")
    source = from_torch.open_part("vae", str(published(root)), CFG)
    store.save(root / "ckpt", "vae", source.pieces(), source.spec, section=CFG.vae)
    return root / "ckpt"


def test_it_decodes_as_it_did(checkpoint):
    mesh = mesh_lib.make_mesh(config_lib.Mesh())
    params = networks.load(str(checkpoint), "vae", CFG, mesh, networks.DECODER)
    x = np.random.default_rng(3).standard_normal((1, 2, 1, 2, TINY.z_dim), np.float32)
    expected = vae.decode_video(drawn(TINY), TINY, x, 1)
    np.testing.assert_allclose(vae.decode_video(params, TINY, x, 1), expected, atol=1e-6)


def test_an_encoder_is_asked_for_by_name(checkpoint):
    with pytest.raises(InputError, match=r"vae\.kind='taehv': only decodes"):
        networks.check(str(checkpoint), "vae", CFG, networks.ENCODER)


def test_the_file_says_which_flags_it_needs(tmp_path):
    path = str(published(tmp_path))
    for kind, dec_dim in (("wan", 4), ("taehv", 8)):
        cfg = dataclasses.replace(CFG, vae=dataclasses.replace(TINY, kind=kind, dec_dim=dec_dim))
        changed = "kind=taehv" if kind == "wan" else "dec_dim=4"
        with pytest.raises(InputError, match=f"--config.vae.{changed}"):
            from_torch.open_part("vae", path, cfg)


def test_a_file_of_another_kind_is_refused(tmp_path):
    file = tiny.write_safetensors(tmp_path / "vae.safetensors", tiny.weights("vae"))
    with pytest.raises(InputError, match=r"--config\.vae\.kind=wan"):
        from_torch.open_part("vae", str(file), CFG)
    lacks = published(tmp_path, {"decoder.22.bias": np.zeros(11, np.float32)})
    with pytest.raises(InputError, match=r"decoder\.22\.bias: expected \(12,\), found \(11,\)"):
        from_torch.open_part("vae", str(lacks), CFG)


@pytest.mark.slow
def test_a_prompt_becomes_a_preview(checkpoint, tmp_path):
    """The command: the transformer's latents through the small decoder."""
    z = config_lib.from_config_dict(tiny_config.get_config()).model.in_dim
    assert z == TINY.z_dim
    commands.save_tiny(checkpoint, ("dit", "umt5"))
    (tmp_path / "prompts.txt").write_text(commands.PROMPTS[0])
    done = commands.run(
        "sample", "--config=configs/tiny.py", "--config.vae.kind=taehv", "--config.vae.dec_dim=4",
        f"--config.vae.latent_mean={TINY.latent_mean}", f"--config.vae.latent_std={TINY.latent_std}",
        f"--checkpoint={checkpoint}", f"--prompts={tmp_path}/prompts.txt",
        f"--output={tmp_path}/out.mp4", "--config.sample.chunks=2", "--config.sample.steps=2",
    )  # fmt: skip
    assert done.code == 0 and (tmp_path / "out.mp4").stat().st_size
