"""Programs compiled for slices of TPUs, without a TPU: by libtpu, which `make tpu` installs."""

import collections
import functools
import math
import re

import jax
import pytest

from longlive_jax import config as config_lib
from longlive_jax import topology
from longlive_jax.errors import InputError
from longlive_jax.sampling import programs, stream
from longlive_jax.scaling import memory, traffic
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.step import Step
from tests import hlo
from tests.launch.commands import run

pytestmark = pytest.mark.tpu

# Heads of the 5B's size, 2 layers, a chunk of 768 tokens.
NETWORK = config_lib.Model(
    dim=256, ffn_dim=512, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=32, text_len=16,
    freq_dim=16,
)  # fmt: skip
HEIGHT, WIDTH = 16, 24  # of the latents
TOKENS = 8 * HEIGHT * WIDTH // 4


def config(mesh, **sections):
    vae = config_lib.VAE(z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    video = config_lib.Video(height=16 * HEIGHT, width=16 * WIDTH)
    return config_lib.Config(model=NETWORK, vae=vae, video=video, mesh=mesh, **sections)


@functools.cache
def step():
    """A training step of 4 chunks and its objective, compiled for four chips."""
    mesh = config_lib.Mesh(fsdp=2, seq=2)
    train = config_lib.Train(latent_frames=32, batch_size=2)
    objective = TeacherForcing(config(mesh, train=train), topology.mesh(mesh, "v5e:2x2"))
    return objective, Step(objective).lower((MODEL,)).compile()


@functools.cache
def chunk():
    """A sampler's chunk, its state, and what it is compiled to for four chips."""
    mesh = config_lib.Mesh(seq=2, data=2)
    cfg = config(mesh)
    slice_ = topology.mesh(mesh, "v6e:2x2")
    arguments = programs.step_arguments(cfg, slice_, 2, HEIGHT, WIDTH)
    return arguments[1], stream.Sampler(cfg, slice_).step.lower(*arguments).compile()


def shapes(compiled):
    """(shape, name of the operation) of all that a program makes."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* ([\w-]+)\(", compiled.as_text())
    return [(tuple(map(int, shape.split(","))), name) for shape, name in found]


@pytest.mark.parametrize("compiled", [lambda: step()[1], lambda: chunk()[1]], ids=["step", "chunk"])
def test_attention_is_the_kernel_and_holds_no_logits(compiled):
    program = compiled()
    assert 'custom_call_target="tpu_custom_call"' in program.as_text()
    logits = [s for s, _ in shapes(program) if sum(n % TOKENS == 0 for n in s) >= 2]
    assert not logits


def test_a_chunk_writes_its_cache_in_place():
    state, program = chunk()
    held = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )
    # Chips round small arrays up to whole tiles.
    assert held <= program.memory_analysis().alias_size_in_bytes < 1.1 * held
    cache = math.prod(state.cache.k.sharding.shard_shape(state.cache.k.shape))
    large = {name for shape, name in shapes(program) if math.prod(shape) >= cache}
    assert "copy" not in large and "transpose" not in large


def test_formulas_of_a_step_hold_of_what_is_compiled():
    objective, compiled = step()
    cfg = objective.cfg
    held = sum(memory.arguments(cfg).values())
    # Chips round small arrays up to whole tiles.
    assert held <= compiled.memory_analysis().argument_size_in_bytes < 1.2 * held
    found = hlo.sent(compiled.as_text(), loops=cfg.model.num_layers)
    expected = collections.Counter()
    for kind, (_, sent) in traffic.step(cfg).items():
        expected[kind.name] += sent
    assert found["all-to-all"] == expected["all_to_all"]
    # Two small ones are all-reduces. The text repeats all-gathers that run beside other work.
    assert found["reduce-scatter"] == pytest.approx(expected["reduce_scatter"], rel=0.01)
    assert found["all-gather"] >= expected["all_gather"]


def test_the_compiler_adds_no_communication():
    names = re.findall(
        r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)(?:-start)?\(",
        chunk()[1].as_text(),
    )
    assert set(names) == {"all-to-all"}


@pytest.mark.parametrize("name, words", [("v5e:4x4", "has 16 chips"), ("v1:2x2", "TPU v1")])
def test_slices_that_do_not_fit(name, words):
    with pytest.raises(InputError, match=words):
        topology.mesh(config_lib.Mesh(seq=4), name)


def test_the_commands():
    tiny = ("--config=configs/tiny.py", "--config.mesh.seq=2", "--config.mesh.data=2")
    done = run("compile", *tiny, "--batch=2", "--topology=v6e:2x2", "--only=commit_chunk")
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any(line.startswith("commit_chunk ") and " compiled " in line for line in lines)
    assert any(line.startswith("all_to_all over seq ") for line in lines)
    words = ("--config=configs/train_ar_tiny.py", "--config.mesh.seq=2", "--config.mesh.fsdp=2")
    done = run("train", *words, "--dry_run", "--topology=v5e:2x2")
    assert "the compiled step, GiB a device" in done.stdout
    assert "reduce_scatter over fsdp+seq" in done.stdout
    done = run("compile", *tiny, "--batch=2", "--topology=v6e:2x2", "--only=x", check=False)
    assert done.code == 2 and "begins none of" in done.stderr
