"""An objective of one's own: a student learns to be a frozen teacher, and a critic how far it is.

python -m examples.train_toy FOLDER

Accumulation, any mesh, optimisers, moving averages, resume and the log are the trainer's: the same
command goes on where it stopped. CONTRIBUTING.md has the recipe.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from longlive_jax import Config
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.training import checkpoint, loop
from longlive_jax.training.objective import Network, Objective
from longlive_jax.training.plan import Plan

SPECS = {"w": params_lib.ParamSpec((8, 8), ("embed", None), params_lib.normal(0.1))}
ROWS = 8


class Distillation(Objective):
    """Two networks; the critic is trained in every step, the student in every third."""

    shown = ("distance",)  # on the screen, beside losses

    def __init__(self, mesh, accumulation=1):
        self.mesh, self.batch_size, self.accumulation = mesh, ROWS // accumulation, accumulation
        self.parts = mesh.size * accumulation  # whose losses are summed
        self.networks = {
            "student": Network(SPECS, optax.adam(0.03), lambda step: jnp.float32(0.5), period=3),
            "critic": Network(SPECS, optax.sgd(0.3)),
        }
        self.frozen = {"teacher": params_lib.abstract(SPECS, mesh)}
        where = jax.NamedSharding(mesh, jax.P(None, ("data", "fsdp")))
        shape = (accumulation, self.batch_size, 8)
        self.batch = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)

    def loss(self, network, params, frozen, inputs, key):
        """This device's part, from its rows and shards."""

        def apply(tree):
            return inputs @ params_lib.gather(tree, SPECS, mesh_lib.RULES)["w"]

        apart = apply(params["student"]) - apply(frozen["teacher"])
        if network == "student":
            distance = jnp.mean(apart**2) / self.parts
            return distance, {"distance": distance}
        error = apply(params["critic"]) - jax.lax.stop_gradient(apart)
        return jnp.mean(error**2) / self.parts, {}


def main(folder: str, steps: int = 30) -> loop.Done:
    objective = Distillation(mesh_lib.make_mesh(Config().mesh))
    teacher = params_lib.init(SPECS, jax.random.key(7), mesh=objective.mesh)

    def batches(numbers):  # a step's data are a function of its number
        for step in numbers:
            rows = np.random.default_rng(step).standard_normal(objective.batch.shape, np.float32)
            yield jax.device_put(rows, objective.batch.sharding), None

    plan, root = Plan("toy", steps=steps, save_every=10), pathlib.Path(folder).resolve()
    with checkpoint.acquire(root, {"toy.rows": ROWS}, network="student"):
        inputs = loop.Inputs(batches, frozen={"teacher": teacher})
        return loop.run(objective, plan, root, inputs, print)[1]


if __name__ == "__main__":
    main(sys.argv[1])
