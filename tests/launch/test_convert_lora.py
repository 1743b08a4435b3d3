"""Adapters of a file or of a training run, merged into a checkpoint for launch.sample."""

import json

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import names, peft, store, workdir
from longlive_jax.errors import InputError
from longlive_jax.models import dit, lora
from tests.launch.commands import run, tiny_config

CONFIG = "--config=configs/tiny.py"
SETTINGS = config_lib.LoRA(rank=2, alpha=4.0)
SPEC = dit.spec(tiny_config().model)


def drawn(seed):
    draw = np.random.default_rng(seed)
    specs = lora.specs(SPEC, SETTINGS)
    return jax.tree.map(
        lambda s: draw.standard_normal(s.shape).astype(np.float32),
        specs,
        is_leaf=params_lib.is_spec,
    )


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """As a distillation leaves it: the student's network has adapters alone."""
    folder = tmp_path_factory.mktemp("run")
    workdir.write(folder, workdir.Run({"distill.lora.alpha": 4.0}, None, "student"))
    networks = {
        "student": {"params": {peft.PART: drawn(1)}, "ema": {peft.PART: drawn(2)}},
        "critic": {"params": {peft.PART: drawn(3)}},
    }
    ocp.save(folder / workdir.STATES / "5", {"networks": networks, "step": jax.numpy.int32(5)})
    return folder


def check(folder, checkpoint, adapters):
    got, base = (store.load(c, "dit", SPEC) for c in (folder, checkpoint))
    expected = jax.jit(lora.merge, static_argnums=2)(base, adapters, SETTINGS.scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)
    assert sorted(store.parts(folder)) == sorted(store.parts(checkpoint))


@pytest.mark.slow
def test_a_file_and_a_run_are_merged(checkpoint, run_folder, tmp_path):
    file = tmp_path / "lora.safetensors"
    peft.save(file, drawn(0), SETTINGS)
    cases = {
        "file": ([f"--lora={file}"], drawn(0), file.name),
        "run": ([f"--lora={run_folder}/"], drawn(2), run_folder.name),
        "latest": ([f"--lora={run_folder}", "--weights=latest"], drawn(1), run_folder.name),
    }
    for name, (flags, adapters, source) in cases.items():
        output = tmp_path / name
        done = run("convert", CONFIG, f"--checkpoint={checkpoint}", *flags, f"--output={output}")
        assert done.stdout.startswith("dit: ") and "vae: copied" in done.stdout
        check(output, checkpoint, adapters)
        parts = json.loads((output / "metadata.json").read_text())["parts"]
        assert parts["dit"]["sources"] == ["dit.pt", source]


def test_what_cannot_be_merged_is_refused_by_name(checkpoint, run_folder, tmp_path):
    critic, output = tmp_path / "critic.safetensors", tmp_path / "out"
    peft.save(critic, drawn(0), SETTINGS, names.CRITIC)
    cases = {
        f"--lora={critic}": "holds the adapters of the critic, not those of the generator",
        "--lora_alpha=3": "--lora_alpha needs --lora",
        f"--lora={critic} --config.model.num_layers=1": "has other sizes than the config",
        f"--lora={checkpoint}": "the folder has none of adapter_model.safetensors",
    }
    for flags, words in cases.items():
        done = run(
            "convert", CONFIG, f"--checkpoint={checkpoint}", *flags.split(), f"--output={output}",
            check=False,
        )  # fmt: skip
        assert done.code == 2 and words in done.stderr, done.stderr
        assert not output.exists()


def test_a_run_without_adapters_or_alpha_is_refused(run_folder, tmp_path):
    workdir.write(tmp_path, workdir.Run({}, None, "model"))
    state = {"networks": {"model": {"params": {"dit": {"w": np.zeros(2)}}}}}
    ocp.save(tmp_path / workdir.STATES / "5", state)
    with pytest.raises(InputError, match="its run trains dit and no adapters; give its folder"):
        peft.read(str(tmp_path))
    workdir.write(run_folder, workdir.Run({}, None, "student"))
    with pytest.raises(InputError, match=r"has no distill\.lora\.alpha; give --lora_alpha"):
        peft.read(str(run_folder))


def test_a_runs_networks_as_a_start(run_folder):
    """The student's average; the critic has none, and gives its weights."""
    workdir.write(run_folder, workdir.Run({"distill.lora.alpha": 4.0}, None, "student"))
    specs = lora.specs(SPEC, SETTINGS)
    for network, seed in {"student": 2, "critic": 3}.items():
        found = peft.of_run(str(run_folder), specs, SETTINGS, network)
        jax.tree.map(np.testing.assert_array_equal, found, drawn(seed))
    with pytest.raises(InputError, match=r"alpha is 4\.0, distill\.lora\.alpha is 2; set"):
        peft.of_run(str(run_folder), specs, config_lib.LoRA(rank=2, alpha=2.0), "student")
    other = lora.specs(SPEC, config_lib.LoRA(rank=3, alpha=4.0))
    with pytest.raises(InputError, match=r"has rank 2, expected 3; set --config"):
        peft.of_run(str(run_folder), other, config_lib.LoRA(rank=3, alpha=4.0), "critic")
