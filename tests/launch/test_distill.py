"""launch.train with objective="dmd": from a checkpoint to a distilled one, and what is refused."""

import dataclasses
import json
import signal

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import names, peft, store
from longlive_jax.errors import InputError
from longlive_jax.models import dit, lora
from tests.launch.commands import PROMPTS, run, tiny_config, write
from tests.multiprocess.processes import Job, steps

SIZES = {
    "model.chunk_frames": 2, "video.height": 32, "video.width": 64, "distill.latent_frames": 8,
    "sample.window_frames": 8, "sample.sink_frames": 2, "sample.vae_latents_per_call": 1,
    "distill.steps": 3, "distill.student_every": 2, "distill.save_every": 1,
    "distill.ema_start": 1, "distill.learning_rate": 0.01, "distill.critic_learning_rate": 0.01,
    "distill.batch_size": 2, "distill.lora.rank": 4, "distill.lora.alpha": 8.0,
}  # fmt: skip
SETTINGS = lib.LoRA(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("prompts") / "prompts.txt", "\n".join([*PROMPTS, "a dog"]))


def words(**overrides):
    values = SIZES | {k.replace("__", "."): v for k, v in overrides.items()}
    return ["--config=configs/distill_tiny.py", *(f"--config.{k}={v}" for k, v in values.items())]


def flags(checkpoint, prompts, workdir, **overrides):
    own = [f"--config.data.path={prompts}", f"--checkpoint={checkpoint}", f"--workdir={workdir}"]
    return [*words(**overrides), *own]


def lines(root):
    found = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in found] == list(range(1, len(found) + 1))
    return found


def numbers(root):
    """Of each step, what must not depend on when a run was stopped."""
    own = ("loss", "grad_norm", "_g", "rollout_difference", "samples")
    return [{k: v for k, v in line.items() if k.endswith(own)} for line in lines(root)]


# ---------------------------------------------------------------------------------------------
# From a checkpoint to a distilled one.


@pytest.mark.slow
def test_distils_converts_and_samples(checkpoint, prompts, tmp_path):
    done = run("train", *flags(checkpoint, prompts, tmp_path / "run"))
    assert "step 3 of 3: done" in done.stdout
    log = lines(tmp_path / "run")
    assert [("student_loss" in line) for line in log] == [True, False, True]
    for line in log:
        assert np.isfinite(line["critic_loss"]) and len(line["samples"]) == 2
        assert line["tokens_per_second"] > 0 and line["tflops_per_device"] > 0
    assert all(line.get("student_rollout_difference", 0) < 1e-3 for line in log)
    assert "student rollout difference" in done.stdout

    settings = words(sample__steps=4)
    run(
        "convert", *settings, f"--checkpoint={checkpoint}", f"--lora={tmp_path / 'run'}",
        f"--output={tmp_path / 'distilled'}",
    )  # fmt: skip
    spec = dit.spec(tiny_config().model)
    before, after = (store.load(c, "dit", spec) for c in (checkpoint, tmp_path / "distilled"))
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, after)
    assert changed["blocks"]["ffn"]["0"]["weight"] and not changed["head"]["head"]["weight"]
    run(
        "sample", *settings, f"--checkpoint={tmp_path / 'distilled'}", f"--prompts={prompts}",
        f"--output={tmp_path / 'v.mp4'}", "--config.sample.chunks=2",
    )  # fmt: skip
    assert (tmp_path / "v-002.mp4").stat().st_size

    # Another run begins with these adapters.
    again = flags(checkpoint, prompts, tmp_path / "again", distill__steps=1)
    run("train", *again, f"--start={tmp_path / 'run'}")
    first = lines(tmp_path / "again")[0]
    assert first["student_loss"] != log[0]["student_loss"]


@pytest.mark.slow
def test_a_teacher_of_its_own_and_whole_networks(checkpoint, prompts, tmp_path):
    overrides = dict(distill__lora__enabled=False, distill__steps=1)
    run("train", *flags(checkpoint, prompts, tmp_path / "run", **overrides),
        f"--teacher={checkpoint}")  # fmt: skip
    (line,) = lines(tmp_path / "run")
    assert np.isfinite(line["student_loss"])


@pytest.mark.slow
def test_a_dry_run_has_the_memory_of_both_programs(tmp_path):
    done = run("train", *words(mesh__fsdp=2), "--dry_run", devices=2)
    for text in (
        "of student, critic, GiB a device", "of critic, GiB a device", "frozen arrays",
        "student moving average", "critic optimiser",
    ):  # fmt: skip
        assert text in done.stdout, done.stdout
    found = [line for line in done.stdout.splitlines() if line.startswith("  temporaries ")]
    assert len(found) == 2 and all(float(line.split()[-1]) > 0 for line in found)


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_with_the_same_bits(checkpoint, prompts, tmp_path):
    """SIGKILL after the second and the fifth step; and then on another mesh."""
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    run("train", *flags(checkpoint, prompts, whole, distill__steps=8))
    own = flags(checkpoint, prompts, killed, distill__steps=7)
    for number, last in enumerate((2, 5)):
        with Job(tmp_path / str(number), own, devices=1) as job:
            job.wait_for(lambda last=last: steps(killed) >= last, seconds=1200)
            job.signal(signal.SIGKILL)
            assert job.wait() == [-signal.SIGKILL]
    done = run("train", *own)
    assert f"of {killed}" in done.stdout and "on from step" in done.stdout
    assert numbers(killed) == numbers(whole)[:7]

    more = flags(checkpoint, prompts, killed, distill__steps=8, mesh__fsdp=2, mesh__seq=2)
    with Job(tmp_path / "mesh", more, devices=4) as job:
        assert job.wait(1200) == [0], job.text()
        assert "on from step 7" in job.text()
    (ours,), (theirs,) = numbers(killed)[7:], numbers(whole)[7:]
    assert ours["samples"] == theirs["samples"]
    np.testing.assert_allclose(ours["critic_loss"], theirs["critic_loss"], rtol=1e-4)


# ---------------------------------------------------------------------------------------------
# What is refused.


def refused(*arguments, devices=1):
    done = run("train", *arguments, devices=devices, check=False)
    assert done.code == 2, (done.code, done.stderr)
    assert "Traceback" not in done.stderr
    last = done.stderr.rstrip().splitlines()[-1]
    assert last.startswith("error: "), done.stderr
    # Nothing was computed, and no program compiled.
    assert "compiled" not in done.stdout and "embedded" not in done.stdout
    return last


BAD_SETTINGS = {
    "student_every": (dict(student_every=0), r"distill\.student_every=0"),
    "exit": (dict(exit="first"), r"distill\.exit='first'.*'?shared'?"),
    "context": (dict(context="last"), r"distill\.context='last'"),
    "gradient": (dict(gradient="some"), r"distill\.gradient='some'"),
    "recipe": (dict(teacher_recipe="int4"), r"distill\.teacher_recipe='int4'"),
    "timesteps": (
        dict(least_timestep=900.0, most_timestep=100.0),
        r"least_timestep=900\.0 must be at most distill\.most_timestep=100\.0",
    ),
    "least length": (dict(least_frames=24), r"least_frames=24 must be at most .*latent_frames=16"),
    "length": (dict(latent_frames=18), r"distill\.latent_frames=18 must be a multiple of"),
    "half chunk": (dict(least_frames=6), r"distill\.least_frames=6 must be a multiple of"),
    "batch": (dict(batch_size=3), r"distill\.batch_size=3 must be a multiple of"),
    "chunks": (dict(latent_frames=12), r"model\.chunk_frames=3 must be a multiple of mesh\.seq=2"),
    "rank": (
        dict(lora=lib.LoRA(rank=64)), r"distill\.lora\.rank=64 must be at most model\.dim=32",
    ),
    "transplant": (
        dict(init="base_then_transplant", lora=lib.LoRA(enabled=False)),
        r"distill\.init='base_then_transplant' with distill\.lora\.enabled=False",
    ),
    "critic": (dict(critic_recipe="fp8"), r"distill\.critic_recipe='fp8' is for sampling"),
    "guidance": (
        dict(sample=dict(guidance_scale=3.0)),
        r"sample\.guidance_scale=3\.0 must be 1\.0: .*distill\.guidance=3\.0",
    ),
    "window": (
        dict(sample=dict(window_frames=12)),
        r"sample\.window_frames=12 with sample\.sink_frames=4 .* must be at least 16",
    ),
    "recipe of the student": (dict(quant=dict(recipe="fp8")), r"quant\.recipe='fp8' is for samp"),
    "cache": (
        dict(gradient="through", quant=dict(kv="fp8")),
        r"distill\.gradient='through' with quant\.kv='fp8'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_cannot_work_are_refused_by_name(case):
    from tests.training import tiny_distill

    overrides, message = BAD_SETTINGS[case]
    mesh = lib.Mesh(data=2, seq=2)
    with pytest.raises(InputError, match=message):
        tiny_distill.config(mesh, **overrides)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Adapters of the tiny model: good ones, and ones of others."""
    folder, model = tmp_path_factory.mktemp("adapters"), tiny_config().model
    cases = {
        "good": {},
        "rank": dict(settings=lib.LoRA(rank=2, alpha=8.0)),
        "alpha": dict(settings=lib.LoRA(rank=4, alpha=4.0)),
        "names": dict(settings=lib.LoRA(rank=4, alpha=8.0, targets="ffn.0")),
        "base": dict(model=dataclasses.replace(model, dim=96)),
        "layers": dict(model=dataclasses.replace(model, num_layers=3)),
        "critic": dict(network=names.CRITIC),
    }
    draw = np.random.default_rng(0)

    def write_one(name, settings=SETTINGS, model=model, network=names.GENERATOR):
        def one(spec):
            return draw.standard_normal(spec.shape).astype(np.float32)

        specs = lora.specs(dit.spec(model), settings)
        tree = jax.tree.map(one, specs, is_leaf=params_lib.is_spec)
        path = folder / f"{name}.safetensors"
        peft.save(path, tree, settings, network)
        return path

    return {name: write_one(name, **kwargs) for name, kwargs in cases.items()}


BAD_STARTS = {
    "rank": "has rank 2, expected 4; set --config.distill.lora.rank=2",
    "alpha": "distill.lora.alpha is 8; set --config.distill.lora.alpha=4",
    "names": "has no base_model.model.blocks.0.self_attn.q.lora_A.weight",
    "base": "lora_A.weight is (4, 96), expected (4, 64); is it for this network?",
    "layers": "the network has no adapter there",
    "critic": "holds the adapters of the critic, not those of the generator",
}


@pytest.mark.parametrize("case", BAD_STARTS)
def test_adapters_that_do_not_fit_are_refused(case, files, checkpoint, prompts, tmp_path):
    """Before the text encoder or the base is read; with the message that says what to do."""
    own = flags(checkpoint, prompts, tmp_path / "run")
    assert BAD_STARTS[case] in refused(*own, f"--start={files[case]}")
    assert not (tmp_path / "run").exists()


def test_flags_that_do_not_fit_the_config_are_refused(files, checkpoint, prompts, tmp_path):
    own = flags(checkpoint, prompts, tmp_path / "run", distill__lora__enabled=False)
    text = refused(*own, f"--start={files['good']}")
    assert "distill.lora.enabled=False trains whole networks" in text
    tiny = ["--config=configs/train_ar_tiny.py", f"--workdir={tmp_path / 'run'}"]
    text = refused(*tiny, f"--teacher={checkpoint}")
    assert f"--teacher={checkpoint}: is for distillation" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_teacher_of_another_size_is_refused(checkpoint, prompts, tmp_path):
    """As is anything that is no checkpoint, and prompts that are not there."""
    spec = dit.spec(model := dataclasses.replace(tiny_config().model, ffn_dim=96))
    mesh = mesh_lib.make_mesh(lib.Mesh(), jax.devices()[:1])
    tree = params_lib.init(spec, jax.random.key(0), np.float32, mesh)
    store.save(
        tmp_path / "other", "dit", store.tree_pieces(tree, spec), spec, section=model,
        sources=["x"],
    )  # fmt: skip
    own = flags(checkpoint, prompts, tmp_path / "run")
    text = refused(*own, f"--teacher={tmp_path / 'other'}")
    assert f"{tmp_path / 'other'}: its dit has other sizes than the config" in text
    assert "is no checkpoint" in refused(*own, f"--teacher={tmp_path / 'none'}")
    for overrides, message in {
        ("data.path", tmp_path / "none"): "none",
        ("data.path", ""): "data.path is missing",
        ("video.image_to_video", True): "image_to_video=True distils from first frames",
        ("mesh.seq", 2): "needs 2 devices, 1 found",
        ("distill.eval_every", 1): "needs data.eval_path",
    }.items():  # fmt: skip
        text = refused(*own, "--config.{}={}".format(*overrides))
        assert message in text, text
    assert not (tmp_path / "run").exists()


def test_a_transplant_between_different_trees_is_refused(files, checkpoint, tmp_path):
    output = tmp_path / "out"
    for name in ("base", "layers"):
        done = run(
            "convert", *words(), f"--checkpoint={checkpoint}", f"--lora={files[name]}",
            f"--output={output}", check=False,
        )  # fmt: skip
        assert done.code == 2 and str(files[name]) in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not output.exists()
