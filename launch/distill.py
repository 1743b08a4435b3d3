"""What `launch.train` does when the config's objective is "dmd" or "consistency": distillation."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from absl import flags

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import grown, networks, peft, workdir
from longlive_jax.errors import InputError
from longlive_jax.files import lines, remote
from longlive_jax.files.remote import AnyPath
from longlive_jax.pipeline import Pipeline
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.training import checkpoint, evaluate, feed, loop, scripts, trained
from longlive_jax.training.objectives import dmd, teacher_forcing
from longlive_jax.training.objectives.consistency import Consistency
from longlive_jax.training.objectives.dmd import BASE, CRITIC, DIT, DMD, LORA, STUDENT, TEACHER
from longlive_jax.training.plan import Plan

Goal = DMD | Consistency

FLAGS = flags.FLAGS
flags.DEFINE_string("start", None, "Distillation: adapters to begin with, a run's or of a file.")
flags.DEFINE_string(
    "teacher", None, "Distillation: the teacher's checkpoint; default --checkpoint."
)


def objective(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> Goal:
    """The objective, from the config and the flags alone.

    Raises:
      InputError: flags that the config has no use for.
    """
    d = cfg.distill
    if FLAGS.start and not d.lora.enabled:
        raise InputError(
            f"--start={FLAGS.start}: adapters, but distill.lora.enabled=False trains whole "
            "networks, which begin as --checkpoint; leave --start out, or train adapters"
        )
    if d.eval_every and d.lora.enabled and "bf16" not in _recipes(cfg):
        raise InputError(
            f"config: distill.eval_every={d.eval_every} merges adapters into plain weights, and "
            "all networks are held quantised; set it to 0, or one of quant.recipe, "
            "distill.teacher_recipe and distill.critic_recipe to 'bf16'"
        )
    kind = Consistency if cfg.objective == "consistency" else DMD
    return kind(cfg, mesh, teacher=bool(FLAGS.teacher))


def run(
    goal: Goal, checkpoint_path: str | None, root: AnyPath, show: Callable[[str], None]
) -> loop.Done:
    """Trains to the last step, in the folder `root`.

    Raises:
      InputError: bad data, a checkpoint that does not fit, a folder of another run.
    """
    cfg, mesh = goal.cfg, goal.mesh
    learns = isinstance(goal, Consistency)  # from videos, and not from its own
    source, identity = (feed if learns else scripts).open_source(cfg)
    evaluating = _evaluating(cfg)
    prompts = evaluate.read_prompts(evaluating, mesh) if cfg.distill.eval_every else None
    for path in filter(None, (checkpoint_path, FLAGS.teacher)):
        networks.check(path, DIT, cfg)
    if prompts:
        networks.check(checkpoint_path, "vae", cfg, networks.DECODER)
    tokenizer = networks.read_tokenizer(checkpoint_path, cfg)
    teacher = FLAGS.teacher and remote.absolute(FLAGS.teacher)
    settings = dmd.settings(cfg, identity, teacher)
    if learns:
        settings |= teacher_forcing.settings(cfg, identity)
        settings["distill.consistency_levels"] = cfg.distill.consistency_levels
        vae = networks.ENCODER if not cfg.data.cached else ()
        if vae:
            networks.check(checkpoint_path, "vae", cfg, vae)
    others = networks.directory(checkpoint_path)
    started = functools.cache(functools.partial(_started, goal, FLAGS.start))
    if not workdir.is_run(root):
        started()  # what does not fit is refused before anything is loaded
    base = checkpoint_path if cfg.distill.lora.enabled else None
    with checkpoint.acquire(root, settings, STUDENT, others, base):
        # Each process has prompts of its own.
        here = mesh_lib.make_mesh(config_lib.Mesh(), mesh.local_devices)
        encoder = PromptEncoder(cfg, networks.load(checkpoint_path, "umt5", cfg, here), tokenizer)
        negative = jnp.asarray(encoder.embed_negative()[None])
        frozen = goal.freeze(_frozen(goal, checkpoint_path), negative)
        if cfg.data.cached:
            encoder = None
        reads, failures = scripts.Prefetcher, root / "failures.jsonl"
        failures = lines.of_process(failures, jax.process_index())
        if learns:
            own = networks.load(checkpoint_path, "vae", cfg, mesh, vae) if vae else None
            reads, encoder = feed.Prefetcher, feed.Encoders(own, encoder)
        inputs = loop.Inputs(
            batches=functools.partial(reads, cfg, mesh, source, encoder, failures),
            params=functools.partial(_initial, goal, checkpoint_path, started),
            frozen=frozen,
            evaluate=prompts and _evaluator(goal, evaluating, root, prompts, frozen),
        )
        return loop.run(goal, Plan.of(cfg.distill), root, inputs, show)[1]


def _recipes(cfg):
    """Recipes of the networks whose weights are the base's."""
    own = () if FLAGS.teacher else (cfg.distill.teacher_recipe,)
    return cfg.quant.recipe, cfg.distill.critic_recipe, *own


def _frozen(goal, path) -> dict[str, params_lib.Tree]:
    load = functools.partial(
        networks.load, part=DIT, cfg=goal.cfg, mesh=goal.mesh, rules=mesh_lib.RULES
    )
    places = {BASE: path, TEACHER: FLAGS.teacher or path}
    return {name: load(place) for name, place in places.items() if name in goal.frozen}


def _initial(goal, path, started) -> Mapping[str, params_lib.Tree]:
    """Of student and critic: the checkpoint's weights; or adapters, new ones or of --start.

    An action path beside adapters is --start's, or else the checkpoint's.
    """
    if goal.cfg.distill.lora.enabled:
        params = goal.init_params()
        for name, network in goal.networks.items():
            own = dict(started().get(name, {}))
            if DIT in network.specs and DIT not in own:
                key, spec = jax.random.key(goal.seed), network.specs[DIT]
                own[DIT], _ = networks.load_or_init(path, DIT, goal.cfg, goal.mesh, key, some=spec)
            where = params_lib.shardings(network.specs, goal.mesh)
            params[name] |= {part: jax.device_put(own[part], where[part]) for part in own}
        return params
    load = functools.partial(
        networks.load, path, DIT, goal.cfg, goal.mesh, dtype=jnp.float32, rules=mesh_lib.RULES
    )
    return {name: {DIT: load()} for name in goal.networks}


def _started(goal, source) -> Mapping[str, params_lib.Tree]:
    """Adapters of a run, its critic's too, or of a file, on the host; those it lacks are new.

    By network and part: a run's action path is there too. A run of objective "consistency" has no
    critic.
    """
    if not source:
        return {}
    settings, specs = goal.cfg.distill.lora, goal.networks[STUDENT].specs[LORA]
    if not workdir.is_run(source):
        return {STUDENT: {LORA: peft.from_file(source, specs, settings)}}
    had = (CRITIC,) if workdir.read(source).settings.get("objective") == "dmd" else ()
    names = [name for name in (STUDENT, *had) if name in goal.networks]
    return {name: _of_run(goal, source, specs, name) for name in names}


def _of_run(goal, source, specs, name) -> dict[str, params_lib.Tree]:
    parts = {LORA: peft.of_run(source, specs, goal.cfg.distill.lora, name)}
    state = workdir.State(source, name)
    weights = "average" if state.averaged else "latest"
    path = grown.path_of(source, state, weights)
    wanted = goal.networks[name].specs.get(DIT)
    if path and wanted:
        state.check(DIT, wanted, goal.cfg.model)
        parts[DIT] = params_lib.unflatten(path)
    return parts


def _evaluating(cfg: config_lib.Config) -> config_lib.Config:
    """The config as evaluations of teacher forcing read it, of the student's steps."""
    d = cfg.distill
    train = dataclasses.replace(
        cfg.train, eval_steps=cfg.sample.steps, eval_chunks=d.eval_chunks, eval_every=d.eval_every
    )
    return dataclasses.replace(cfg, train=train)


def _evaluator(goal, cfg, root, prompts, frozen):
    """Makes videos by the student's EMA, whose adapters are merged into a copy of the base."""
    vae = networks.load(FLAGS.checkpoint, "vae", cfg, goal.mesh, networks.DECODER)
    texts = Pipeline(FLAGS.checkpoint, cfg, goal.mesh).embed(prompts.texts)
    make = evaluate.Evaluator(cfg, goal.mesh, root, prompts, vae, lambda ema: texts)
    settings = goal.cfg.distill.lora
    if not settings.enabled:
        return lambda step, state: make(step, state[STUDENT].ema)
    merge = jax.jit(functools.partial(trained.merged, adapters=settings))
    return lambda step, state: make(step, {DIT: merge(frozen[BASE]["bf16"], state[STUDENT].ema)})
