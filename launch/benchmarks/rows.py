"""Streams by turns against the same streams as rows of one batch: what a server would gain."""

import statistics
import time

import jax
import numpy as np
from absl import flags

from launch.benchmarks import measure, stream
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.models import dit
from longlive_jax.prompts.embeddings import Embeddings
from longlive_jax.sampling import stream as stream_lib
from longlive_jax.sampling.session import Engine, Session, Start

ROWS = (2, 4)
PARTS = ("denoise", "decode", "commit")


def run(cfg: config_lib.Config) -> dict:
    """Seconds of a chunk of all streams, medians; both ways in turns, so that load hits both."""
    mesh = mesh_lib.make_mesh(cfg.mesh)
    params = measure.random_params(dit.spec(cfg.model), mesh, cfg.compute_dtype)
    params = stream_lib.sampler(cfg, mesh).prepare(params)
    engine, figures = Engine(cfg, mesh, params, stream.decoder(cfg, mesh)), {}
    for rows in ROWS:
        together = _session(engine, range(rows))
        alone = [_session(engine, [row]) for row in range(rows)]
        for session in (together, *alone):
            for _ in range(cfg.sample.window(cfg.model).chunks):
                _chunk(session)
        batched, turns = [], []
        for _ in range(flags.FLAGS.chunks):
            batched.append(_chunk(together))
            turns.append([sum(part) for part in zip(*map(_chunk, alone))])
        for way, times in (("batched", batched), ("by_turns", turns)):
            for part, seconds in zip(PARTS, zip(*times)):
                figures[f"{rows}_{way}_{part}_s"] = round(statistics.median(seconds), 4)
            figures[f"{rows}_{way}_s"] = round(statistics.median(map(sum, times)), 4)
        figures[f"{rows}_gain"] = round(
            figures[f"{rows}_by_turns_s"] / figures[f"{rows}_batched_s"], 3
        )
        measure.show(figures)
    return figures


def _session(engine, samples):
    cfg, (height, width) = engine.cfg, engine.cfg.video.latent_size
    shape = (1, cfg.model.text_len, cfg.model.text_dim)
    text = np.random.default_rng(0).standard_normal(shape, np.float32)
    start = Start(height=height, width=width, samples=tuple(samples))
    session = Session(engine, Embeddings(["one"], text, text[0]), start)
    session.prompt("one")
    return session


def _chunk(session):
    """Seconds of each of PARTS, of one chunk."""
    times = [time.perf_counter()]
    chunk = session.step()
    jax.block_until_ready(chunk.latents)
    times.append(time.perf_counter())
    for piece in chunk.frames:
        np.asarray(piece)
    times.append(time.perf_counter())
    jax.block_until_ready(session.carried)
    times.append(time.perf_counter())
    return np.diff(times)
