"""The action module of one block: outputs, and gradients where a cotangent is given.

    python -m launch.probe actions --weights=W.safetensors --inputs=I.npz --output=O.npz \\
        --mode=full|causal|stream --config.actions.keyboard_dim=4 --config.model.dim=48 ...

W.safetensors holds blocks.{i}.action_model.* of one block. I.npz holds x [batch, latent * position,
dim], keyboard [batch, action, K] and, if there is one, mouse [batch, action, M]; where the latents
are not a video's first, first_latent and first_action; for a stream perhaps x_noisy, on which a
pass reads each chunk's past before the clean pass on x; perhaps cotangent, of out. O.npz gets out,
out_noisy, and the gradients grad_x, grad_keyboard and grad_mouse.

full: every latent sees all others. causal: a chunk sees those up to its own last, within
actions.window. stream: the same chunk by chunk, from caches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from launch import command
from launch.probes import action_module
from longlive_jax.checkpoints import actions as names
from longlive_jax.checkpoints import safetensors
from longlive_jax.checkpoints.names import strip
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npz, save_npz

FLAGS = flags.FLAGS
flags.DEFINE_string("weights", None, "A .safetensors of one block's action_model.")
flags.DEFINE_string("inputs", None, "An .npz of x, keyboard and perhaps mouse, cotangent, x_noisy.")
flags.DEFINE_string("output", None, "The .npz to write.")
flags.DEFINE_enum("mode", "full", ["full", "causal", "stream"], "What a latent sees.")

_ARRAYS = ("x", "keyboard", "mouse", "x_noisy")
_GRADIENTS = ("x", "keyboard", "mouse")


def main() -> None:
    model = command.config().model
    if model.actions.kind != "module":
        raise InputError(f"config: actions.kind={model.actions.kind!r} must be 'module'")
    for name in ("weights", "inputs"):
        if not FLAGS[name].value:
            raise InputError(f"--{name} is missing; python -m launch.probe actions --help")
    command.check_output("output", ".npz")
    command.check_apart([FLAGS.output], [FLAGS.weights, FLAGS.inputs])
    if FLAGS.mode == "full":  # no window
        unlimited = dataclasses.replace(model.actions, window=0)
        model = dataclasses.replace(model, actions=unlimited)
    tensors = {strip(key): x for key, x in safetensors.read(FLAGS.weights)[0].items()}
    tensors = names.collect(tensors, FLAGS.weights, ones=False)
    params = action_module.from_torch(tensors, model, FLAGS.weights)
    arrays = load_npz(FLAGS.inputs, ("x", "keyboard"))
    call = action_module.function(model, action_module.place(arrays, model), FLAGS.mode)
    given = {n: jnp.asarray(arrays[n], jnp.float32) for n in _ARRAYS if n in arrays}
    with jax.default_matmul_precision("highest"):
        results = jax.jit(call)(params, **given)
        if "cotangent" in arrays:
            results |= _gradients(call, params, given, arrays["cotangent"])
    save_npz(FLAGS.output, **results)
    print(f"{FLAGS.output}: {', '.join(results)}", flush=True)


def _gradients(call, params, given, cotangent):
    wanted = {n: given[n] for n in _GRADIENTS if n in given}

    def dot(wanted):
        out = call(params, **{**given, **wanted})["out"]
        return jnp.sum(out * jnp.asarray(cotangent, jnp.float32))

    return {f"grad_{n}": np.asarray(g) for n, g in jax.jit(jax.grad(dot))(wanted).items()}
