"""Serves streams that people direct from a browser while they are made.

    python -m launch.serve                                  # the small trained world in assets/
    python -m launch.serve --config=configs/sample_5b.py --checkpoint=CKPT --config.sample.steps=2

Open http://127.0.0.1:8000 . Elsewhere than on this machine a token is required: --host=0.0.0.0
--token=SECRET (or LONGLIVE_TOKEN in the environment). docs/live.md has the protocol.
"""

import os
import pathlib
import socket
import sys

import uvicorn
from absl import flags

from launch import command
from longlive_jax import config as config_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.errors import InputError
from longlive_jax.pipeline import Pipeline
from longlive_jax.serving import guard
from longlive_jax.serving.limits import Limits
from longlive_jax.serving.models import Model
from longlive_jax.serving.server import Server

FLAGS = flags.FLAGS
flags.DEFINE_string("checkpoint", None, "Directory made by launch.convert or launch.train.")
flags.DEFINE_enum(
    "weights", "average", list(workdir.WEIGHTS),
    "Of a training run: the weights' moving average, or the last step's.",
)  # fmt: skip
flags.DEFINE_string("host", "127.0.0.1", "Address to listen at.")
flags.DEFINE_integer("port", 8000, "Port to listen at.", lower_bound=0, upper_bound=65535)
flags.DEFINE_string("token", None, "What clients must know; required where host is no loopback.")
flags.DEFINE_list("origins", [], "Origins of other pages that may use it: https://example.org")
flags.DEFINE_integer("streams", 2, "Streams made at a time, by turns.", lower_bound=1)
flags.DEFINE_list("steps", [], "More numbers of steps that a stream may ask for.")
flags.DEFINE_float("idle", 120, "Seconds after which a stream that nobody watches ends.")
flags.DEFINE_float("total", 3600, "Seconds that a stream may last.")
flags.DEFINE_string("output", "out/live", "Folder for videos and scripts.")

ROOT = pathlib.Path(__file__).parent.parent
WORLD, WEIGHTS = ROOT / "configs/train_ar_tiny_world.py", ROOT / "assets/tiny_world/checkpoint"
# The solver's steps of the small world: 10 look like 20 and keep up on two cores.
SETTINGS = {"sample.steps": 10}
PROMPTS = (
    "A yellow star moves to the right over a black background.",
    "A pink moon gets bigger over a dark blue background.",
    "Over a white background, a red triangle bounces up and down.",
    "There is a background of white and grey stripes. A purple cross falls.",
)
FILM_PROMPTS = (
    "A lighthouse at dusk, waves against the rocks.",
    "Inside, a keeper lights the lamp.",
    "The keeper turns to the window.",
)
WORLD_PROMPTS = (
    "A corridor of grey stone, torches on its walls.",
    "A wide plain before the hills.",
)


def main() -> None:
    token = FLAGS.token if FLAGS.token is not None else os.environ.get("LONGLIVE_TOKEN", "")
    if FLAGS.host not in guard.LOOPBACK and len(token) < 8:
        raise InputError(
            f"--host={FLAGS.host}: others can reach it, so it needs --token=SECRET of at least 8 "
            "characters; or leave --host out, to be reached from this machine alone"
        )
    if any(ord(c) < 33 or ord(c) > 126 for c in token):
        raise InputError("--token: must be of visible ASCII characters; headers carry no others")
    listening, model = _listen(), _model()
    limits = Limits(streams=FLAGS.streams, idle_s=FLAGS.idle, total_s=FLAGS.total)
    server = Server(
        {model.name: model}, _folder(), limits, token=token, origins=FLAGS.origins,
        hosts=() if token else {*guard.LOOPBACK, FLAGS.host},
    )  # fmt: skip
    port = listening.getsockname()[1]
    print(f"http://{FLAGS.host}:{port} (compiling; /readyz says when)", flush=True)
    config = uvicorn.Config(
        server.app,
        log_level="warning",
        access_log=False,
        ws_max_size=limits.message_bytes,
        ws_max_queue=32,
        loop="asyncio",
        timeout_graceful_shutdown=2,
        server_header=False,
        date_header=False,
        ws_per_message_deflate=False,
    )
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        if server.scheduler.busy:  # an interpreter cannot end while it computes
            print("terminated before the device was done", file=sys.stderr, flush=True)
            os._exit(143)


def _listen() -> socket.socket:
    family = socket.AF_INET6 if ":" in FLAGS.host else socket.AF_INET
    try:
        return socket.create_server((FLAGS.host, FLAGS.port), family=family)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise InputError(
            f"--host={FLAGS.host} --port={FLAGS.port}: {why}; give another --port"
        ) from error


def _model() -> Model:
    steps = _steps()
    if FLAGS.checkpoint is None and FLAGS["config"].value is None:
        if not WEIGHTS.is_dir():
            raise InputError(f"{WEIGHTS} is missing; give --config and --checkpoint")
        cfg = config_lib.load_config(WORLD, SETTINGS)
        pipeline = Pipeline(WEIGHTS, cfg)
        return Model("shapes", "Moving shapes", pipeline, prompts=PROMPTS, steps=steps)
    if FLAGS.checkpoint is None:
        raise InputError("--checkpoint is missing; leave --config out, too, for the small world")
    pipeline = Pipeline(FLAGS.checkpoint, command.config(), weights=FLAGS.weights)
    pipeline.check()
    films = pipeline.cfg.model.actions.kind == "none"
    return Model(
        "film" if films else "world", pathlib.Path(FLAGS.checkpoint).name, pipeline, steps=steps,
        prompts=FILM_PROMPTS if films else WORLD_PROMPTS,
    )  # fmt: skip


def _steps() -> tuple[int, ...]:
    try:
        return tuple(int(steps) for steps in FLAGS.steps)
    except ValueError as error:
        raise InputError(f"--steps={','.join(FLAGS.steps)}: must be whole numbers") from error


def _folder() -> pathlib.Path:
    folder = pathlib.Path(FLAGS.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output={folder}: {error.strerror}; give a folder to write") from error
    return folder


if __name__ == "__main__":
    command.run(main, addresses=("checkpoint",))
