"""A run's folder and its states: whose they are, what is kept, and what faults leave."""

import resource
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import mesh as mesh_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.models import dit
from longlive_jax.training import checkpoint, state
from longlive_jax.training.checkpoint import Checkpoints
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing, settings
from longlive_jax.training.plan import Plan
from tests.training import tiny_run

RINGS = dict(train__error_recycling__enabled=True, train__error_recycling__slots=2)


def made(**overrides):
    """The objective, the plan, and a state none of whose arrays is zero."""
    cfg = tiny_run.config(**overrides)
    objective = TeacherForcing(cfg, mesh_lib.make_mesh(cfg.mesh))
    return objective, plan(cfg), more(state.init(objective))


def plan(cfg):
    return Plan.of(cfg.train)


@jax.jit
def _more(tree):
    return jax.tree.map(lambda x: x + jnp.ones((), x.dtype), tree)


def more(tree):
    return _more(tree)


def write(root, steps, now, **overrides):
    """Saves the state after each of `steps`; a state is its predecessor plus one."""
    states = Checkpoints(root, plan(tiny_run.config(**overrides)))
    for step in steps:
        states.save(step, now)
        now = more(now)
    states.close()


def kept(root):
    return sorted(int(p.name) for p in (root / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.mark.parametrize("rings", [{}, RINGS], ids=["plain", "error recycling"])
def test_a_state_comes_back_on_another_mesh(tmp_path, rings):
    _, its_plan, now = made(mesh__fsdp=2, mesh__seq=2, **rings)
    states = Checkpoints(tmp_path, its_plan)
    assert states.latest is None
    before = jax.tree.map(lambda x: np.array(x), now)
    states.save(7, now)
    # Once `save` returns, the trainer gives the memory to the next step.
    jax.tree.map(lambda x: x.delete(), now)
    states.close()
    other = tiny_run.config(mesh__data=2, mesh__seq=2, **rings)
    again = Checkpoints(tmp_path, plan(other))
    assert again.latest == 7
    template = state.abstract(TeacherForcing(other, mesh_lib.make_mesh(other.mesh)))
    back = again.restore(template)
    assert tiny_run.equal(back, before)
    jax.tree.map(
        lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or 1 / 0, back, template
    )


def test_the_last_are_kept_and_every_so_many(tmp_path):
    _, _, now = made()
    write(tmp_path, range(1, 8), now, train__keep_last=2, train__keep_every=3)
    assert kept(tmp_path) == [3, 6, 7]


def test_what_a_killed_save_left_is_no_state(tmp_path):
    objective, its_plan, now = made()
    with claim(tmp_path):
        write(tmp_path, [2], now)
    whole = tmp_path / "checkpoints" / "2"
    for name in ("4.orbax-checkpoint-tmp", "4.orbax-checkpoint-tmp-1"):
        shutil.copytree(whole, whole.with_name(name))
    states = Checkpoints(tmp_path, its_plan)
    assert states.latest == 2 and workdir.State(tmp_path).step == 2
    assert tiny_run.equal(states.restore(state.abstract(objective)), now)
    states.close()
    write(tmp_path, [4], now)
    assert kept(tmp_path) == [2, 4]


@pytest.mark.parametrize(
    "what", ["torn", *(pytest.param(what, marks=pytest.mark.slow) for what in ("empty", "file"))]
)
def test_a_damaged_state_is_named(tmp_path, what):
    objective, its_plan, now = made()
    write(tmp_path, [2, 4], now)
    newest = tmp_path / "checkpoints" / "4"
    if what == "empty":
        shutil.rmtree(newest)
        newest.mkdir()
    else:
        files = sorted((newest / "state" / "d").iterdir())
        files[0].write_bytes(files[0].read_bytes()[:100] if what == "torn" else b"")
    with pytest.raises(InputError, match=r"checkpoints/4: is damaged .*remove it, and the one bef"):
        Checkpoints(tmp_path, its_plan).restore(state.abstract(objective))
    shutil.rmtree(newest)
    assert Checkpoints(tmp_path, its_plan).latest == 2


def test_a_full_disk_leaves_the_state_before(tmp_path):
    objective, its_plan, now = made()
    write(tmp_path, [2], now)
    states = Checkpoints(tmp_path, its_plan)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, limits[1]))
    try:
        with pytest.raises(InputError, match=r"no space for the state of step 4 .*step 2 is whole"):
            states.save(4, more(now))
            states.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    states = Checkpoints(tmp_path, its_plan)
    assert states.latest == 2
    assert tiny_run.equal(states.restore(state.abstract(objective)), now)


# Whose folder it is.


def claim(root, checkpoint_=None, data="some data", **overrides):
    wanted = settings(tiny_run.config(**overrides), data)
    return checkpoint.acquire(root, wanted, MODEL, checkpoint_)


def test_a_part_that_fails_is_known_while_it_waits_for_the_others(tmp_path, monkeypatch):
    """Orbax has the error in its result only after all processes are there."""
    others = threading.Event()

    def fail(manager):
        raise OSError("this part is lost")

    manager = "orbax.checkpoint.checkpoint_manager.CheckpointManager"
    monkeypatch.setattr(f"{manager}._wait_for_checkpointers", fail)
    monkeypatch.setattr(f"{manager}._finalize_checkpoint", lambda *_: None)
    _, its_plan, now = made()
    states = Checkpoints(tmp_path, its_plan)
    tracker = states._saved._manager._save_progress_tracker
    monkeypatch.setattr(tracker, "set", lambda saving: saving or others.wait(60))
    try:
        states.save(1, now)
        with pytest.raises(OSError, match="this part is lost"):
            states.wait()
    finally:
        others.set()


def test_a_folder_is_one_runs(tmp_path):
    root = tmp_path / "new" / "run"
    busy = pytest.raises(InputError, match="another process trains in it")
    with claim(root, "ckpt"), busy, claim(root):
        pass
    assert workdir.read(root).checkpoint.endswith("/ckpt")
    free = dict(mesh__fsdp=2, train__steps=9, train__learning_rate=1.0, data__workers=3,
                data__path="moved", train__keep_last=1, train__remat="block")  # fmt: skip
    with claim(root, **free):
        assert workdir.read(root).checkpoint.endswith("/ckpt")
    for name, value in (
        ("train.accumulation", 1), ("train.latent_frames", 8), ("video.height", 64),
        ("model.num_layers", 3), ("dtype", "bfloat16"),
    ):  # fmt: skip
        overrides = {name.replace(".", "__"): value}
        words = rf"was begun with {name}=.* now it is {value!r}"
        with pytest.raises(InputError, match=words), claim(root, **overrides):
            pass
    with pytest.raises(InputError, match=r"train.beta1 == 0=True"), claim(root, train__beta1=0.9):
        pass
    with pytest.raises(InputError, match="the training data='some data'"), claim(root, data="b"):
        pass


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with (
        pytest.raises(InputError, match=r"holds 'thesis.tex' and no training run"),
        claim(tmp_path),
    ):
        pass
    with pytest.raises(InputError, match="Not a directory"), claim(tmp_path / "thesis.tex" / "run"):
        pass
    run = tmp_path / "run"
    with claim(run):
        pass
    (run / "run.json").write_text("{")
    with pytest.raises(InputError, match=r"run.json: is damaged"), claim(run):
        pass


# Reading weights from it.


def test_weights_of_a_run(tmp_path):
    objective, _, now = made(mesh__seq=2)
    network = now.networks[MODEL]
    network = network.replace(ema=more(network.params))
    now, cfg, mesh = now.replace(networks={MODEL: network}), objective.cfg, objective.mesh
    with claim(tmp_path, mesh__seq=2):
        pass
    with pytest.raises(InputError, match="has saved nothing yet"):
        workdir.State(tmp_path)
    write(tmp_path, [1], now)
    found, spec = workdir.State(tmp_path), dit.spec(cfg.model)
    assert found.step == 1 and found.trained == ("dit",)
    found.check("dit", spec, cfg.model)
    for weights, tree in (("average", network.ema), ("latest", network.params)):
        read = found.load("dit", spec, mesh, jnp.bfloat16, mesh_lib.SAMPLING_RULES, weights)
        assert tiny_run.equal(read, jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree["dit"]))
    wide = tiny_run.config(model__ffn_dim=64).model
    with pytest.raises(InputError, match=r"dit/blocks/ffn/0/weight is \(2, 64, 64\) by the config"):
        found.check("dit", dit.spec(wide), wide)
    heads = tiny_run.config(model__num_heads=4).model
    with pytest.raises(InputError, match="num_heads is 4 by the config, 8 in the run"):
        found.check("dit", dit.spec(heads), heads)
    with pytest.raises(InputError, match="was given no --checkpoint"):
        workdir.parts(tmp_path)
