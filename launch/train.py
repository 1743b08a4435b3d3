"""Trains the transformer by teacher forcing, on one host or many: the same command on each.

    python -m launch.train --config=configs/train_ar_5b.py --workdir=DIR --checkpoint=CKPT

The same command goes on where it stopped, on any mesh and any number of hosts. DIR gets
  checkpoints/        the states; launch.sample --checkpoint=DIR samples from the newest
  metrics.jsonl       a line a step; tensorboard/ has the same
  evaluation/         videos of data.eval_path, every train.eval_every steps
  best/               with train.eval_grade: the weights whose videos have the best grade so far;
                      launch.sample --checkpoint=DIR/best samples from them
  failures.jsonl      training files that could not be read, and why
  run.json            settings of the run, and the path of its --checkpoint
CKPT gives the initial weights, the VAE and the text encoder. With data.cached=True and no
evaluation it may be left out: then the weights are random.

Where no cluster lets the hosts find each other, add --coordinator=HOST:PORT --num_processes=N
--process_id=I. On SIGTERM or Ctrl-C to one host all save and end; a second Ctrl-C ends at once.
--dry_run compiles the step, prints its memory and what a device sends, and ends: no array is made,
no data read. With --topology=v5p:2x2x4 it does so for a slice of TPUs that is not here.

Exit codes: 0 done, or saved after a signal; 2 bad config or data, or a full disk; 1 anything else,
also a run whose last step was not finite.
"""

import functools
import os
import sys
import traceback

import jax
import jax.numpy as jnp
from absl import flags

from launch import command, distill
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax import recipes as recipe_lib
from longlive_jax import topology as topology_lib
from longlive_jax.checkpoints import networks
from longlive_jax.errors import InputError, NotFiniteError, StorageError
from longlive_jax.files import lines, remote, scratch
from longlive_jax.pipeline import Pipeline
from longlive_jax.prompts.encoder import PromptEncoder
from longlive_jax.quant import matmul
from longlive_jax.training import best, checkpoint, dry_run, evaluate, feed, loop, trained, watch
from longlive_jax.training.objectives import teacher_forcing
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.plan import Plan

# cuDNN's attention backward cannot be captured in a CUDA graph at small sizes ("capturing stream
# has unjoined work": H200, jax 0.11.2, 2026-11-21).
if "xla_gpu_enable_command_buffer" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " --xla_gpu_enable_command_buffer="

FLAGS = flags.FLAGS
flags.DEFINE_string("workdir", None, "Folder of the run, on a disk that all hosts share.")
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert.")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster is found.")
flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "With --coordinator: this one's.", lower_bound=0)
flags.DEFINE_bool("dry_run", False, "Compile the step, print its memory, and end.")
flags.DEFINE_string("topology", None, "With --dry_run: TPUs to compile for, like v5p:2x2x4.")


def main() -> None:
    try:
        _train()
    except InputError:
        raise
    except NotFiniteError as error:
        _end(f"error: {error}")
    except StorageError as error:
        _end(f"error: {command.lost(error)}")
    except Exception as error:
        if command.refused_by_disk(error):
            raise
        _end(traceback.format_exc())


def _train() -> None:
    cfg = command.config()
    distils = cfg.objective != "teacher_forcing"
    for name in () if distils else ("start", "teacher"):
        if FLAGS[name].value:
            raise InputError(
                f"--{name}={FLAGS[name].value}: is for distillation; leave it out, or give a "
                "config with objective='dmd'"
            )
    (config_lib.validate_distillation if distils else config_lib.validate_training)(cfg)
    if FLAGS.topology and not FLAGS.dry_run:
        raise InputError(
            f"--topology={FLAGS.topology}: is for --dry_run; a run uses the devices that are here"
        )
    if not FLAGS.topology:
        mesh_lib.start(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    mesh = topology_lib.mesh(cfg.mesh, FLAGS.topology)
    if not FLAGS.topology and not mesh.local_devices:
        raise InputError(
            f"config: mesh of {mesh.size} devices, which leaves none to process "
            f"{jax.process_index()} of {jax.process_count()}; {jax.device_count()} are there: "
            "raise mesh.data, mesh.fsdp or mesh.seq, or start fewer processes"
        )
    objective = distill.objective(cfg, mesh) if distils else TeacherForcing(cfg, mesh)
    if FLAGS.dry_run:
        _show(dry_run.report(objective))
        return
    if not FLAGS.workdir:
        raise InputError("--workdir is missing; give the folder of the run")
    with watch.watched((cfg.distill if distils else cfg.train).hang_seconds, _code):
        _run(cfg, objective)


def _run(cfg: config_lib.Config, objective) -> None:
    command.check_apart([FLAGS.workdir], [], networks.folders(FLAGS.checkpoint))
    root = remote.path(remote.absolute(FLAGS.workdir))
    if recipe := recipe_lib.get(cfg.quant.recipe):
        _show(f"linear layers by {matmul.backend(recipe)}")
    if isinstance(objective, TeacherForcing):
        steps, done = cfg.train.steps, _teacher_forcing(cfg, objective, root)
    else:
        steps, done = cfg.distill.steps, distill.run(objective, FLAGS.checkpoint, root, _show)
    how = "stopped by a signal; the same command goes on" if done.stopped else "done"
    _show(f"step {done.step} of {steps}: {how}: {root}")


def _teacher_forcing(cfg, objective, root) -> loop.Done:
    mesh = objective.mesh
    source, identity = feed.open_source(cfg)
    prompts = evaluate.read_prompts(cfg, mesh) if cfg.train.eval_every else None
    _check_parts(cfg, prompts)
    # Weights may come from another run; the other parts then come from that run's --checkpoint.
    others = networks.directory(FLAGS.checkpoint) if FLAGS.checkpoint else None
    settings, base = teacher_forcing.settings(cfg, identity), None
    if cfg.train.trainable != "all":
        base = FLAGS.checkpoint
        settings["the frozen weights"] = networks.identity(base, "dit")
    with checkpoint.acquire(root, settings, MODEL, others, base):
        frozen = _frozen(objective) if base else ()
        evaluator, encoders = _models(cfg, mesh, root, prompts)
        kept = best.Best(root, MODEL) if cfg.train.eval_grade else None
        failures = lines.of_process(root / "failures.jsonl", jax.process_index())
        inputs = loop.Inputs(
            batches=functools.partial(feed.Prefetcher, cfg, mesh, source, encoders, failures),
            params=lambda: {MODEL: _initial(cfg, mesh)},
            frozen=frozen,
            evaluate=evaluator and functools.partial(_evaluate, evaluator, kept, objective, frozen),
        )
        return loop.run(objective, Plan.of(cfg.train), root, inputs, _show)[1]


def _evaluate(evaluator, kept, objective, frozen, step, networks_of_run) -> str:
    """An evaluation, of which the best checkpoint is kept; what to show of it."""
    ema = objective.whole(networks_of_run[MODEL].ema, frozen)
    made = evaluator(step, ema)
    if made.grade is None:
        return str(made.folder)
    kept.offer(step, made.grade, ema)
    return f"{made.folder}, grade {made.grade:.4f}, best {kept.grade:.4f} of step {kept.step}"


def _check_parts(cfg: config_lib.Config, prompts: evaluate.Prompts | None) -> None:
    """Refuses a --checkpoint with which the run would fail later."""
    parts = teacher_forcing.specs(cfg)
    if cfg.train.trainable != "all":
        if not FLAGS.checkpoint:
            raise InputError(
                f"config: train.trainable={cfg.train.trainable!r} keeps a transformer's weights as "
                "they are, and --checkpoint is missing; give one, or set train.trainable='all'"
            )
        if prompts and cfg.quant.recipe != "bf16":
            raise InputError(
                f"config: train.eval_every={cfg.train.eval_every} samples from plain weights, and "
                f"train.trainable={cfg.train.trainable!r} holds them by quant.recipe="
                f"{cfg.quant.recipe!r}; set one of them to 0, 'all' or 'bf16'"
            )
        networks.check(FLAGS.checkpoint, "dit", cfg, grown=True)
    for part in parts:
        if FLAGS.checkpoint and part in networks.parts(FLAGS.checkpoint):
            networks.check(FLAGS.checkpoint, part, cfg, grown=True)
    subtrees = _vae_subtrees(cfg, prompts)
    if subtrees:
        networks.check(FLAGS.checkpoint, "vae", cfg, subtrees)
        if cfg.vae.z_dim != cfg.model.in_dim:
            raise InputError(
                f"config: vae.z_dim={cfg.vae.z_dim} must equal model.in_dim={cfg.model.in_dim}: "
                "the transformer works on the VAE's latents"
            )
    if prompts or "umt5" in parts or not cfg.data.cached:
        networks.read_tokenizer(FLAGS.checkpoint, cfg)


def _vae_subtrees(cfg, prompts) -> tuple[str, ...]:
    """The subtrees of the VAE that the run needs, to encode videos or to decode evaluations."""
    encodes = not cfg.data.cached or (prompts and prompts.batch.pictured)
    return (networks.ENCODER if encodes else ()) + (networks.DECODER if prompts else ())


def _models(cfg, mesh, root, prompts) -> tuple[evaluate.Evaluator | None, feed.Encoders]:
    """The networks that are not trained, as far as they are needed."""
    trains_text = cfg.train.text_encoder
    subtrees = _vae_subtrees(cfg, prompts)
    vae = networks.load(FLAGS.checkpoint, "vae", cfg, mesh, subtrees) if subtrees else None
    evaluator = None
    if prompts:
        embed = _embed_by_ema(cfg, mesh, prompts) if trains_text else _embed(cfg, mesh, prompts)
        evaluator = evaluate.Evaluator(cfg, mesh, root, prompts, vae, embed)
    read = texts = None
    if trains_text:
        read = networks.read_tokenizer(FLAGS.checkpoint, cfg)
    elif not cfg.data.cached:
        # Each process has prompts of its own.
        here = mesh_lib.make_mesh(config_lib.Mesh(), mesh.local_devices)
        weights = networks.load(FLAGS.checkpoint, "umt5", cfg, here)
        texts = PromptEncoder(cfg, weights, networks.read_tokenizer(FLAGS.checkpoint, cfg))
    return evaluator, feed.Encoders(None if cfg.data.cached else vae, texts, read)


def _embed(cfg, mesh, prompts):
    """Embeddings of the evaluations' prompts, made once."""
    texts = Pipeline(FLAGS.checkpoint, cfg, mesh).embed(prompts.texts)
    return lambda ema: texts


def _embed_by_ema(cfg, mesh, prompts):
    """As `_embed`, by the text encoder that is trained."""
    read = networks.read_tokenizer(FLAGS.checkpoint, cfg)
    whole = jax.jit(
        lambda tree: jax.tree.map(lambda w: w.astype(cfg.compute_dtype), tree),
        out_shardings=jax.NamedSharding(mesh, jax.P()),
    )

    def embed(ema):
        encoder = PromptEncoder(cfg, whole(ema["umt5"]), read)
        return encoder.all(prompts.texts, cfg.sample.guided)

    return embed


def _initial(cfg: config_lib.Config, mesh: jax.sharding.Mesh) -> params_lib.Tree:
    """Weights to begin with: the checkpoint's where it has them, else random."""
    has = networks.parts(FLAGS.checkpoint) if FLAGS.checkpoint else ()
    params, key = {}, jax.random.key(cfg.train.seed)
    for part, spec in teacher_forcing.specs(cfg).items():
        if part == trained.LORA:  # they change nothing yet
            params |= params_lib.init({part: spec}, key, jnp.float32, mesh)
        elif part in has:
            params[part], absent = networks.load_or_init(
                FLAGS.checkpoint, part, cfg, mesh, key, some=spec
            )
            for path in absent:
                _show(f"{part}: {path} begins at its initial value, as --checkpoint has none")
        else:
            _show(f"{part}: the weights begin at random, as --checkpoint gives none")
            params |= params_lib.init({part: spec}, key, jnp.float32, mesh)
    return params


def _frozen(objective: TeacherForcing):
    """The weights below what is trained, as the objective holds them."""
    cfg, mesh = objective.cfg, objective.mesh
    backbone, absent = networks.load_or_init(
        FLAGS.checkpoint, trained.DIT, cfg, mesh, jax.random.key(0), some=objective.backbone,
        dtype=cfg.compute_dtype,
    )  # fmt: skip
    if absent:
        raise InputError(
            f"--checkpoint={FLAGS.checkpoint}: its dit has no {absent[0]}, and "
            f"train.trainable={cfg.train.trainable!r} does not train it; give another"
        )
    return objective.freeze(backbone)


def _show(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def _code(error: Exception) -> int:
    """The exit code of a run that ends with this error."""
    return 2 if isinstance(error, InputError) or command.refused_by_disk(error) else 1


def _end(text: str) -> None:
    """Ends after a crash, without waiting for others, which may wait for this process."""
    print(text, file=sys.stderr, flush=True)
    scratch.remove()
    sys.stdout.flush()
    os._exit(1)


if __name__ == "__main__":
    command.run(main, addresses=("workdir", "checkpoint", "teacher"))
