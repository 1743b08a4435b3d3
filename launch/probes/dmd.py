"""One step of distribution matching distillation on given noise, text and draws.

    python -m launch.probe dmd --config=... --student=CKPT --teacher=CKPT --critic=CKPT \\
        --inputs=I.npz --output=O.npz [--gradient=stop|through] [--lora=FILE] \\
        [--gradients=KEY,KEY] [--critic_gradients=KEY,KEY] [--config.sample.steps=4 ...]

Inputs: `noise`, `eps` [batch, latent frame, channel, h, w], of the rollout and of the scores;
`text` [batch * chunk, token, dim]; `negative` [1, token, dim]; `tau` [batch, 1 or chunk], numbers
of 0 to 999 that `schedule.score_law` maps to timesteps; `exit_step`. Optional: `cut` [chunk];
`image` [batch, 1, channel, h, w]; `critic_noise`, `critic_eps`, `critic_tau`, `critic_exit_step`.

Outputs, latents as the inputs': `exit_x`, `exit_t` [batch, latent frame], `exit_x0`, `context_x`,
`t`, `x_t`, `fake_x0`, `real_cond_x0`, `real_uncond_x0`, `normaliser` [batch, chunk], `g`, `loss`,
`dx` (of the loss by x0), `grad/<key>`; `critic_x`, `critic_t`, `critic_x_t`, `critic_flow`,
`critic_loss`, `critic_grad/<key>`.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import layout, networks, peft
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, save_npz
from longlive_jax.models import lora
from longlive_jax.training.batch import Scripts
from longlive_jax.training.objective import Moment, Network
from longlive_jax.training.objectives import rollout
from longlive_jax.training.objectives.dmd import CRITIC, DIT, DMD, LORA, STUDENT, TEACHER
from longlive_jax.training.step import Step

FLAGS = flags.FLAGS
flags.DEFINE_string("inputs", None, "A .npz file of arrays.")
flags.DEFINE_string("output", None, "The .npz file to write.")
flags.DEFINE_string("student", None, "The student's checkpoint.")
flags.DEFINE_string("teacher", None, "The teacher's checkpoint.")
flags.DEFINE_string("critic", None, "The critic's checkpoint.")
flags.DEFINE_string("lora", None, "Adapters of the student, by PEFT's names.")
flags.DEFINE_enum("gradient", "stop", ["stop", "through"], "As distill.gradient.")
flags.DEFINE_list("gradients", [], "The student's weights whose gradients are wanted.")
flags.DEFINE_list("critic_gradients", [], "The critic's weights.")
_REQUIRED = ("noise", "eps", "text", "negative", "tau", "exit_step")
_CRITIC = ("noise", "eps", "tau", "exit_step")


class _Probe(DMD):
    """DMD of whole networks, one of which may have adapters that alone are trained."""

    def __init__(self, cfg, mesh, adapted: bool):
        super().__init__(cfg, mesh)
        self.adapted = adapted
        if adapted:
            specs = {LORA: lora.specs(self.specs, cfg.distill.lora)}
            student = dataclasses.replace(self.networks[STUDENT], specs=specs)
            self.networks: dict[str, Network] = {**self.networks, STUDENT: student}

    def transformer(self, name, params, frozen):
        if name == STUDENT and self.adapted:
            scale = self.cfg.distill.lora.scale
            return lora.attach(frozen[STUDENT], params[STUDENT][LORA], scale)
        return super().transformer(name, params, frozen)

    def critic_flow(self, moment, inputs):
        """The noised clip, its timesteps and the critic's velocity, in place of its loss."""

        def local(params, frozen, inputs):
            x_t, timestep, _ = self._noised(inputs)
            tree = self.transformer(CRITIC, params, frozen)
            flow = self._block_causal(CRITIC, tree, x_t, timestep, inputs, inputs.scripts)
            return x_t, timestep, flow.astype(jnp.float32)

        arguments = (moment.params, moment.frozen, inputs)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=jax.tree.map(lambda x: jax.typeof(x).sharding.spec, arguments),
            out_specs=(rollout.LATENTS, jax.P(*rollout.CHUNKS, None), rollout.LATENTS),
            check_vma=False,
        )(*arguments)


def main() -> None:
    command.check_output("output", ".npz")
    if not FLAGS.inputs:
        raise InputError("--inputs is missing; give the .npz file of arrays")
    command.check_apart([FLAGS.output], [FLAGS.inputs])
    config = command.config()
    arrays = load_npz(FLAGS.inputs, _REQUIRED)
    cfg = _sized(config, arrays)
    config_lib.validate_distillation(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    goal = _Probe(cfg, mesh, adapted=bool(FLAGS.lora))
    load = functools.partial(networks.load, part=DIT, cfg=cfg, mesh=mesh, rules=mesh_lib.RULES)
    student, teacher, critic = (load(FLAGS[n].value) for n in (STUDENT, TEACHER, CRITIC))
    params = {STUDENT: {DIT: student}, CRITIC: {DIT: critic}}
    frozen = goal.freeze({TEACHER: teacher}, jnp.asarray(arrays["negative"]))
    if FLAGS.lora:
        specs = goal.networks[STUDENT].specs[LORA]
        adapters = peft.from_file(FLAGS.lora, specs, cfg.distill.lora)
        params[STUDENT] = {LORA: jax.device_put(adapters, params_lib.shardings(specs, mesh))}
        frozen[STUDENT] = student
    probe = _Run(goal, params, frozen, _scripts(goal, arrays))
    result = probe.student(_draws(goal, arrays, ""))
    if all(f"critic_{name}" in arrays for name in _CRITIC):
        result |= probe.critic(_draws(goal, arrays, "critic_"))
    save_npz(FLAGS.output, **result)
    print(f"{len(result)} arrays: {FLAGS.output}", flush=True)


def _sized(config, arrays):
    """The config, of the arrays' batch and length, and of whole networks."""
    batch, frames, channels, height, width = _shape(arrays["noise"], "noise", 5)
    found = channels, height, width
    wanted = config.model.in_dim, *config.video.latent_size
    if found != wanted:
        raise InputError(
            f"{FLAGS.inputs}: noise has [channel, h, w] {found}, the config says {wanted}; set "
            "model.in_dim, video.height and video.width (16 pixels a latent)"
        )
    own = dataclasses.replace(config.distill.lora, enabled=False)
    distill = dataclasses.replace(
        config.distill, batch_size=batch, latent_frames=frames, least_frames=0, accumulation=1,
        gradient=FLAGS.gradient, lora=own,
    )  # fmt: skip
    video = dataclasses.replace(config.video, image_to_video="image" in arrays)
    return dataclasses.replace(config, distill=distill, video=video)


def _shape(array, name, axes):
    if array.ndim != axes:
        raise InputError(f"{FLAGS.inputs}: {name} has shape {array.shape}, {axes} axes are wanted")
    return array.shape


def _scripts(goal, arrays) -> Scripts:
    cfg, like = goal.cfg, jax.tree.map(_without_lead, goal.batch)
    lead = like.cut.shape
    cut = np.broadcast_to(arrays.get("cut", np.zeros(lead[1], bool)), lead)
    text = arrays["text"].reshape(*lead, cfg.model.text_len, cfg.model.text_dim)
    first = None
    if like.first_frame is not None:
        first = jnp.asarray(np.moveaxis(arrays["image"], 2, -1), jnp.float32)
    made = Scripts(jnp.asarray(text, like.text.dtype), jnp.asarray(cut, bool), first)
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), made, like)


def _without_lead(x):
    """Of one batch, from all of a step's."""
    place = jax.NamedSharding(x.sharding.mesh, jax.P(*x.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)


def _draws(goal, arrays, prefix) -> rollout.Draws:
    cfg, mesh = goal.cfg, goal.mesh
    chunks = cfg.distill.latent_frames // cfg.model.chunk_frames
    lead = (cfg.distill.batch_size, chunks)

    def place(x, spec):
        return jax.device_put(jnp.asarray(x), jax.NamedSharding(mesh, spec))

    def latents(name):
        return place(_chunked(arrays[f"{prefix}{name}"], cfg), rollout.LATENTS)

    tau = np.broadcast_to(arrays[f"{prefix}tau"], lead).astype(np.int32)
    exits = np.broadcast_to(arrays[f"{prefix}exit_step"], (chunks,)).astype(np.int32)
    if exits.min() < 0 or exits.max() >= cfg.sample.steps:
        raise InputError(
            f"{FLAGS.inputs}: {prefix}exit_step={exits.tolist()} must be 0 to "
            f"{cfg.sample.steps - 1}: sample.steps={cfg.sample.steps}"
        )
    return rollout.Draws(
        latents("noise"), latents("eps"), place(tau, rollout.CHUNKS), place(exits, jax.P(None)),
        place(np.int32(chunks), jax.P()),
    )  # fmt: skip


def _chunked(x, cfg):
    """[batch, latent frame, channel, h, w] -> [batch, chunk, frame, h, w, channel], float32."""
    x = np.moveaxis(x, 2, -1).astype(np.float32)
    return x.reshape(x.shape[0], -1, cfg.model.chunk_frames, *x.shape[2:])


def _frames(x: jax.Array) -> np.ndarray:
    """The inverse of `_chunked`; of arrays without pictures [batch, chunk, frame] too."""
    y = np.asarray(x)
    y = y.reshape(y.shape[0], -1, *y.shape[3:])
    return y if y.ndim == 2 else np.moveaxis(y, -1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """Both networks' losses on given draws."""

    goal: _Probe
    params: Mapping[str, params_lib.Tree]
    frozen: Mapping[str, Any]
    scripts: Scripts

    def student(self, draws: rollout.Draws) -> dict[str, np.ndarray]:
        goal = self.goal
        inputs, scores, loss, gradient = self._run(STUDENT, goal.scores, draws)
        clip = inputs.clip
        # Of a given frame only the loss is not aware.
        given = np.asarray(clip.timestep) > 0
        graded = given if goal.cfg.video.image_to_video else np.ones_like(given)
        dx = np.asarray(scores.g) * graded[..., None, None, None] / np.asarray(inputs.count)
        return {
            "exit_x": _frames(clip.x),
            "exit_t": _frames(clip.timestep),
            "exit_x0": _frames(clip.x0),
            "context_x": _frames(clip.final),
            "t": _frames(scores.timestep),
            **{
                name: _frames(getattr(scores, name))
                for name in ("x_t", "fake_x0", "real_cond_x0", "real_uncond_x0", "g")
            },
            "normaliser": np.asarray(scores.normaliser),
            "loss": np.asarray(loss),
            "dx": _frames(dx),
            **self._gradients("grad", FLAGS.gradients, gradient),
        }

    def critic(self, draws: rollout.Draws) -> dict[str, np.ndarray]:
        inputs, found, loss, gradient = self._run(CRITIC, self.goal.critic_flow, draws)
        x_t, timestep, flow = found
        return {
            "critic_x": _frames(inputs.clip.x0),
            "critic_t": _frames(timestep),
            "critic_x_t": _frames(x_t),
            "critic_flow": _frames(flow),
            "critic_loss": np.asarray(loss),
            **self._gradients("critic_grad", FLAGS.critic_gradients, gradient),
        }

    def _run(self, network, look, draws):
        """The inputs of a network's loss, what `look(moment, inputs)` says, loss and gradient."""

        def one(params, frozen, scripts, draws):
            moment = Moment(
                step=jnp.int32(0), key=jax.random.key(0), params=params, frozen=frozen,
                carried=None, over_step=None, batch=scripts,
            )  # fmt: skip
            inputs = self.goal.inputs(network, moment, draws)
            gradient, (loss, _), _ = Step(self.goal).gradient(network, moment, inputs)
            return inputs, look(moment, inputs), loss, gradient

        return jax.jit(one)(self.params, self.frozen, self.scripts, draws)

    def _gradients(self, prefix, keys, gradient):
        """Those of the wanted weights, by the original's keys and in its layouts."""
        if not keys:
            return {}
        named = (
            peft.to_peft(gradient[LORA])
            if LORA in gradient
            else _by_key(gradient[DIT], self.goal.specs)
        )
        if unknown := [key for key in keys if key not in named]:
            raise InputError(
                f"--{prefix}ients: no weight {unknown[0]!r}; there are, for example, "
                f"{', '.join(list(named)[:3])}"
            )
        return {f"{prefix}/{key}": named[key] for key in keys}


def _by_key(tree, specs):
    leaves = {path: np.asarray(leaf) for path, leaf in params_lib.flatten(tree).items()}
    named = {}
    for weight in layout.weights(specs):
        array = leaves[weight.path]
        array = array if weight.layer is None else array[weight.layer]
        named |= dict(zip(weight.keys, weight.to_torch(array)))
    return named
