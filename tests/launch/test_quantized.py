"""Quantised checkpoints by the commands: made, sampled from, exported, and refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax.checkpoints import networks, safetensors, store, workdir
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from longlive_jax.pipeline import Pipeline
from longlive_jax.quant import weights as weights_lib
from tests.launch.commands import PROMPTS, TINY, run, tiny_config, write
from tests.training import tiny_run

RECIPE = "nvfp4_w4a4"
# The command of each case, and what its message must have in it.
REFUSED = {
    "bf16": ("sample {q}", "by recipe 'nvfp4_w4a4', and 'bf16'", f"--config.quant.recipe={RECIPE}"),
    "other": ("sample {q} --config.quant.recipe=fp8", "'nvfp4_w4a4', and 'fp8' is asked for"),
    "again": ("convert {q} --recipe=fp8 --output={out}/c", "'nvfp4_w4a4'", "not quantised"),
    "none": ("convert {q} --output={out}/c", "needs --recipe, one of fp8, fp8_train, nvfp4_ar"),
    "bf16 recipe": ("convert {q} --output={out}/c --recipe=bf16", "needs --recipe, one of"),
    "unknown": ("convert {p} --output={out}/c --recipe=int4", "unknown recipe 'int4'; recipes: bf1"),
    "itself": ("convert {p} --output={dir}/. --recipe=fp8", "is the checkpoint itself"),
    "run": ("convert --checkpoint={run} --output={out}/c --recipe=fp8", "launch.export first"),
    "no output": ("convert {p} --recipe=fp8", "--to_safetensors=DIR to export it", "--output=DIR"),
    "source": ("convert {p} --recipe=fp8 --output={out}/c --dit=x", "run conversions one by one"),
    "no dit": ("convert --vae=x --recipe=fp8 --output={out}/c", "--recipe needs --dit"),
    "export": ("convert {p} --to_safetensors={out}/c --recipe=fp8", "takes --checkpoint only"),
    "train": ("train {q}", "by recipe 'nvfp4_w4a4'", "is not quantised"),
}  # fmt: skip


@pytest.fixture(scope="module")
def quantized(checkpoint, tmp_path_factory):
    """`checkpoint`, and what was printed when it was quantised."""
    folder = tmp_path_factory.mktemp("quantized") / "ckpt"
    args = f"--checkpoint={checkpoint}", f"--recipe={RECIPE}", f"--output={folder}"
    return folder, run("convert", "--config=configs/tiny.py", *args)


def test_it_has_all_parts(quantized, checkpoint):
    folder, done = quantized
    assert done.stdout.startswith("dit: 69 tensors, ")
    assert "by recipe nvfp4_w4a4" in done.stdout
    assert sorted(store.parts(folder)) == sorted(store.parts(checkpoint))
    infos = [
        json.loads((root / "metadata.json").read_text())["parts"] for root in (checkpoint, folder)
    ]
    assert infos[0]["vae"] == infos[1]["vae"] and infos[0]["umt5"] == infos[1]["umt5"]
    assert infos[1]["dit"] == infos[0]["dit"] | {
        "recipe": RECIPE, "bytes": infos[1]["dit"]["bytes"], "dtypes": infos[1]["dit"]["dtypes"],
        "index_checksum": infos[1]["dit"]["index_checksum"],
    }  # fmt: skip
    assert infos[1]["dit"]["bytes"] < infos[0]["dit"]["bytes"] / 2


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", RECIPE])
def test_it_samples_what_quantising_at_load_does(recipe, checkpoint, tmp_path):
    made = f"--checkpoint={checkpoint}", f"--recipe={recipe}", f"--output={tmp_path}/ckpt"
    run("convert", "--config=configs/tiny.py", *made)
    prompt, latents = write(tmp_path / "prompt.txt", PROMPTS[0]), []
    for root in (tmp_path / "ckpt", checkpoint):
        done = run(
            "sample", *TINY, f"--config.quant.recipe={recipe}", f"--checkpoint={root}",
            f"--prompts={prompt}", f"--save_latents={tmp_path}/l.npz",
        )  # fmt: skip
        assert f"linear layers by {recipe}: " in done.stdout
        latents.append(np.load(tmp_path / "l.npz")["latents"])
    assert np.isfinite(latents[0]).all()
    np.testing.assert_array_equal(*latents)


def test_it_is_exported_and_converted_back(quantized, tmp_path):
    folder, _ = quantized
    run("convert", f"--checkpoint={folder}", f"--to_safetensors={tmp_path}")
    names = ["dit.safetensors", "umt5.safetensors", "vae.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    found, _ = safetensors.read(tmp_path / "dit.safetensors")
    assert len(found) == 69 + 20 * 3
    file = f"--dit={tmp_path}/dit.safetensors"
    run("convert", "--config=configs/tiny.py", file, f"--output={tmp_path}/ckpt")
    one, other = (
        {(path, start): rows.tobytes() for path, start, rows in store.Stored(root, "dit").pieces()}
        for root in (folder, tmp_path / "ckpt")
    )
    assert one == other


@pytest.fixture(scope="module")
def a_run(tmp_path_factory):
    """The folder of a training run: masters of random weights."""
    root, cfg = tmp_path_factory.mktemp("run"), tiny_config()
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(draw.standard_normal(s.shape), jnp.float32),
        dit.spec(cfg.model), is_leaf=params_lib.is_spec,
    )  # fmt: skip
    write_run(root, params)
    return root, params


def write_run(root, params):
    settings = {"model.num_heads": tiny_config().model.num_heads}
    workdir.write(root, workdir.Run(settings, None, "model"))
    network = {"ema": {"dit": params}, "params": {"dit": params}}
    ocp.save(root / workdir.STATES / "5", {"networks": {"model": network}})


@pytest.mark.parametrize("case", REFUSED)
def test_refused(quantized, checkpoint, a_run, case, tmp_path):
    words, *expected = REFUSED[case]
    command, *args = words.format(
        q=f"--checkpoint={quantized[0]}", p=f"--checkpoint={checkpoint}", dir=checkpoint,
        run=a_run[0], out=tmp_path,
    ).split()  # fmt: skip
    if command == "sample":
        prompt = write(tmp_path / "prompt.txt", PROMPTS[0])
        args += [f"--prompts={prompt}", f"--save_latents={tmp_path}/l.npz"]
    args.insert(0, "--config=configs/tiny.py")
    if command == "train":
        args[:1] = tiny_run.flags(tiny_run.write_cached(tmp_path / "data"), tmp_path / "run")
    before = sorted(tmp_path.iterdir())
    done = run(command, *args, check=False)
    assert done.code == 2 and done.stderr.startswith("error: "), done.stderr
    assert all(part in done.stderr for part in expected), done.stderr
    assert sorted(tmp_path.iterdir()) == before


# A training run, and weights that cannot be quantised.


def config(recipe, **mesh):
    cfg = tiny_config()
    values = config_lib.to_config_dict(cfg)
    values.quant.recipe = recipe
    values.mesh.update(mesh)
    return config_lib.from_config_dict(values)


@pytest.mark.slow
def test_a_runs_masters_are_quantised_at_load(a_run):
    root, params = a_run
    cfg = config("fp8", fsdp=2)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    networks.check(str(root), "dit", cfg, quantized=True)
    found = Pipeline(root, cfg, mesh, decodes=False).engine.params
    recipe = recipe_lib.get("fp8")
    expected = weights_lib.quantize_params(
        params, dit.spec(cfg.model), recipe, dtype=cfg.compute_dtype
    )
    expected = dit.layers(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_run_that_diverged(a_run, tmp_path):
    _, params = a_run
    bad = jax.tree.map(lambda x: x, params)
    bias = bad["blocks"]["ffn"]["0"]
    bias["weight"] = bias["weight"].at[1, 2, 3].set(jnp.nan)
    write_run(tmp_path, bad)
    cfg = config("fp8")
    with pytest.raises(
        InputError, match="dit/blocks/ffn/0/weight of its average weights are not finite"
    ):
        _ = Pipeline(tmp_path, cfg, decodes=False).engine
