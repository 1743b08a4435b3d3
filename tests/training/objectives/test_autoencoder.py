"""Training a VAE: what it learns, that it can be stopped, and what is made of its weights."""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import workdir
from longlive_jax.data.video import VideoWriter
from longlive_jax.errors import InputError
from longlive_jax.models import vae
from longlive_jax.training import checkpoint, loop
from longlive_jax.training.objectives import autoencoder
from longlive_jax.training.objectives.videos import Videos, read_videos
from longlive_jax.training.plan import Plan

Z = 4
CFG = config_lib.Config(
    vae=config_lib.VAE(4, 8, Z, (0.0,) * Z, (1.0,) * Z),
    video=config_lib.Video(height=32, width=32),
    train_vae=config_lib.TrainVAE(
        steps=16, batch_size=2, frames=5, learning_rate=5e-3, warmup_steps=2, held_out=1,
        kl_weight=1e-4, save_every=8, log_every=1,
    ),
    dtype="float32",
)  # fmt: skip
# Compiling is most of the time of these tests.
_FAST = {"xla_backend_optimization_level": 0}


def change(cfg=CFG, **settings):
    return dataclasses.replace(cfg, train_vae=dataclasses.replace(cfg.train_vae, **settings))


def mesh_of(**sizes):
    return mesh_lib.make_mesh(config_lib.Mesh(**sizes))


def smooth(seed, count, height=32, width=32):
    """A disc that moves over a gradient, uint8 [count, height, width, 3]."""
    rng = np.random.default_rng(seed)
    colours, y, x = rng.integers(0, 256, (3, 3)), *np.mgrid[:height, :width]
    ground = colours[0] + (colours[1] - colours[0]) * (x / width)[..., None]
    discs = [(y - height / 2) ** 2 + (x - 2 * t) ** 2 < (height / 3) ** 2 for t in range(count)]
    return np.stack([np.where(d[..., None], colours[2], ground) for d in discs]).astype(np.uint8)


def videos(*counts):
    frames = [smooth(seed, count) for seed, count in enumerate(counts)]
    return Videos(
        tuple(f"{i}.mp4" for i in range(len(counts))),
        np.concatenate(frames),
        np.cumsum([0, *counts]),
    )


def write(root, *folders, size=(32, 32)):
    """`folders`: the numbers of frames of each folder's files."""
    for i, counts in enumerate(folders):
        for j, count in enumerate(counts):
            with VideoWriter(root / "video" / f"clip-{i}" / f"{j:06d}.mp4", *size) as writer:
                writer.write(smooth(10 * i + j, count, *size))
    return root


def random_params():
    """Initial weights, with biases that are not zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), autoencoder.init(CFG)
    )


# Steps.


def fit(root, objective, batches=lambda steps: (((), None) for _ in steps)):
    """The state after the last step of a run in the folder `root`."""
    cfg, inputs = objective.cfg, loop.Inputs(batches, frozen=objective.frozen_arrays())
    with checkpoint.acquire(root, {"train_vae.seed": cfg.train_vae.seed}, network=None):
        state, _ = loop.run(objective, Plan.of(cfg.train_vae), root, inputs, lambda text: None)
    return jax.device_get(state)


def lines(root):
    return [json.loads(x) for x in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loss_falls_and_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "Step", functools.cache(loop.Step))  # traced once for three runs
    objective = autoencoder.Autoencoder(CFG, mesh_of(), videos(6))
    whole, names = fit(tmp_path / "whole", objective), ("step", "loss", "l1", "kl", "psnr")
    log = lines(tmp_path / "whole")
    assert [x["step"] for x in log] == list(range(1, 17))
    assert {*names, "grad_norm", "seconds"} <= set(log[0]) and "samples" not in log[0]
    assert log[-1]["loss"] < log[0]["loss"] / 2
    assert log[-1]["psnr"] > log[0]["psnr"] + 3

    root = tmp_path / "stopped"

    def stops(steps):
        yield from (((), None) for _ in range(12))
        while not (root / "checkpoints" / "8").is_dir():  # written in the background
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(root, objective, stops)
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # what a kill may leave
    resumed = fit(root, objective)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    for ours, theirs in zip(lines(root), log, strict=True):
        assert [ours[name] for name in names] == [theirs[name] for name in names]


@pytest.mark.slow
def test_a_step_does_not_depend_on_the_mesh(tmp_path):
    cfg = change(steps=3, save_every=3)
    for name, mesh in (("one", mesh_of()), ("two", mesh_of(data=2))):
        fit(tmp_path / name, autoencoder.Autoencoder(cfg, mesh, videos(9)))
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        for field in ("loss", "l1", "kl", "psnr", "grad_norm"):
            assert two[field] == pytest.approx(one[field], rel=1e-4)


def test_another_runs_folder_is_refused(tmp_path):
    def acquire(data, **settings):
        wanted = autoencoder.settings(change(**settings), data)
        return checkpoint.acquire(tmp_path, wanted, network=None)

    with acquire(videos(7)):
        pass
    with acquire(videos(7), log_every=7):  # changes nothing that is trained
        pass
    with pytest.raises(InputError, match=r"train_vae\.seed=0, now it is 1"):
        acquire(videos(7), seed=1).__enter__()
    with pytest.raises(InputError, match=r"videos\.shape"):
        acquire(videos(8)).__enter__()
    with pytest.raises(InputError, match="give the checkpoint that it wrote"):
        workdir.State(tmp_path)


# The model.


def test_a_clip_is_any_window_of_the_frames(monkeypatch):
    """Pixels say where they are: blue the frame, green the row, red the column."""
    rows, columns = np.mgrid[:32, :64]
    frames = np.stack([np.stack([columns, rows, 0 * rows + i], -1) for i in range(7)])
    data = Videos(("a.mp4",), frames.astype(np.uint8), np.asarray([0, 7]))
    seen = {}

    def losses(params, cfg, clips, noise):
        seen.update(clips=np.round((np.asarray(clips) + 1) * 127.5), noise=noise.shape)
        return {"loss": jnp.zeros(())}

    monkeypatch.setattr(autoencoder, "losses", losses)
    cfg = change(crop_height=16, crop_width=48, batch_size=128)
    cfg = dataclasses.replace(cfg, video=dataclasses.replace(cfg.video, height=32, width=64))
    objective = autoencoder.Autoencoder(cfg, mesh_of(), data)
    params, frozen = objective.init_params(), objective.frozen_arrays()
    objective.loss(autoencoder.NETWORK, params, frozen, jnp.arange(128), jax.random.key(0))
    clips = seen["clips"]
    assert clips.shape == (128, 5, 16, 48, 3) and seen["noise"] == (128, 2, 1, 3, Z)
    corners = clips[:, 0, 0, 0]
    for clip, corner in zip(clips, corners):
        np.testing.assert_array_equal(clip[:, 0, 0, 2], corner[2] + np.arange(5))
        np.testing.assert_array_equal(clip[0, :, 0, 1], corner[1] + np.arange(16))
        np.testing.assert_array_equal(clip[0, 0, :, 0], corner[0] + np.arange(48))
    # Every place occurs, the last one too.
    assert {*corners[:, 0]} == {*range(17)} and {*corners[:, 1]} == {*range(17)}


def test_parameters_as_a_vector_and_back():
    params = random_params()
    turned = params_lib.unflatten(dict(reversed(params_lib.flatten(params).items())))
    for tree in (params, turned):
        again = autoencoder.tree(autoencoder.flat(tree), CFG.vae)
        jax.tree.map(np.testing.assert_array_equal, again, params)
    numbered = jnp.arange(autoencoder.flat(params).size, dtype=jnp.int32)
    for x in jax.tree.leaves(autoencoder.tree(numbered, CFG.vae)):
        assert x.reshape(-1)[0] % autoencoder.ALIGNMENT == 0


def test_moments_are_the_encoders_means_and_log_variances():
    params = random_params()
    frames = jnp.asarray(smooth(0, 5)[None] / 127.5 - 1, jnp.float32)
    encode = jax.jit(vae.encode_video, static_argnums=(1, 3), compiler_options=_FAST)
    means = encode(params, CFG.vae, frames, 1)
    mesh, whole = mesh_of(), jax.P()

    @functools.partial(jax.jit, compiler_options=_FAST)
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=whole, out_specs=whole)
    def both(params, frames):
        return autoencoder.moments(params, CFG.vae, frames)

    mean, log_var = both(*autoencoder.place((params, frames), mesh))
    np.testing.assert_allclose(mean, means, atol=1e-5)
    halves = {k: np.split(v, 2, axis=-1) for k, v in params["conv1"].items()}
    conv1 = {k: np.concatenate([b, a], axis=-1) for k, (a, b) in halves.items()}
    params = params | {"conv1": conv1}
    np.testing.assert_allclose(encode(params, CFG.vae, frames, 1), log_var, atol=1e-5)


@pytest.mark.slow
def test_folded_statistics_leave_pictures_as_they_were():
    params, data, mesh = random_params(), videos(10, 5, 6), mesh_of(data=2)
    mean, std = autoencoder.statistics(params, CFG, mesh, data)
    assert np.abs(mean).max() > 0.05
    assert np.abs(std - 1).max() > 0.05
    folded = autoencoder.fold(params, CFG.vae, mean, std)
    new_mean, new_std = autoencoder.statistics(folded, CFG, mesh, data)
    np.testing.assert_allclose(new_mean, 0, atol=1e-5)
    np.testing.assert_allclose(new_std, 1, atol=1e-5)
    before, after = (
        list(autoencoder.reconstructions(p, CFG, mesh, data)) for p in (params, folded)
    )
    assert [len(made) for _, made in before] == [2, 2]
    for (source, made), (_, again), start in zip(before, after, ([0, 5], [10, 15])):
        np.testing.assert_array_equal(source, [data.frames[i : i + 5] for i in start])
        np.testing.assert_allclose(made.astype(int), again.astype(int), atol=1)  # a rounding apart
        assert np.mean(made == again) > 0.999


# Videos.


def test_windows_lie_in_one_file():
    assert videos(7, 5, 6).windows(5, 1).tolist() == [0, 1, 2, 7, 12, 13]
    assert videos(10, 5, 6).windows(5, 5).tolist() == [0, 5, 10, 15]


def test_cuts_are_where_a_latent_begins():
    # The second file has fewer frames than a window needs behind or ahead.
    assert videos(7, 5, 9).cuts(9).tolist() == [2, 11, 7]
    assert videos(7).cuts(5).tolist() == []


def test_a_share_of_the_clips_spans_a_cut(monkeypatch):
    seen = []

    def losses(params, cfg, clips, noise):
        seen.append(np.round((np.asarray(clips[:, 0, 0, 0, 2]) + 1) * 127.5).astype(int))
        return {"loss": jnp.zeros(())}

    monkeypatch.setattr(autoencoder, "losses", losses)
    frames = np.zeros((14, 32, 32, 3), np.uint8)
    frames[..., 2] = np.arange(14)[:, None, None]
    data = Videos(("a.mp4", "b.mp4"), frames, np.asarray([0, 7, 14]))
    for share in (0.0, 0.25, 1.0):
        objective = autoencoder.Autoencoder(
            change(batch_size=512, cut_share=share), mesh_of(), data
        )
        params, frozen = objective.init_params(), objective.frozen_arrays()
        objective.loss(autoencoder.NETWORK, params, frozen, jnp.arange(512), jax.random.key(0))
        spans = np.isin(seen[-1], data.cuts(5))
        assert np.isin(seen[-1][~spans], data.windows(5, 1)).all()
        assert abs(spans.mean() - share) < 0.07 * (0 < share < 1) + 1e-9


def test_a_share_of_cuts_needs_two_videos():
    with pytest.raises(InputError, match=r"train_vae\.cut_share=0\.5: no two videos"):
        autoencoder.Autoencoder(change(cut_share=0.5), mesh_of(), videos(7))


def test_videos_are_read_and_held_out_by_folder(tmp_path):
    root = write(tmp_path, (6, 7), (5,), (8, 9))
    train, held_out = read_videos(with_data(root))
    assert [p.parent.name for p in train.paths] == ["clip-0", "clip-0", "clip-1"]
    assert train.starts.tolist() == [0, 6, 13, 18]
    assert held_out.starts.tolist() == [0, 8, 17]
    written = np.concatenate([smooth(20, 8), smooth(21, 9)]).astype(int)
    assert np.abs(held_out.frames - written).mean() < 6  # what the codec keeps of them


def with_data(root, **settings):
    data = dataclasses.replace(CFG.data, path=str(root))
    return dataclasses.replace(change(**settings), data=data)


@pytest.mark.parametrize(
    ("folders", "size", "settings", "message"),
    [
        ([], None, {}, r"no .*video.*make_tiny_world"),
        ([(6,)], None, {}, r"1 folders of videos, train_vae\.held_out=1 leaves none"),
        ([(6,), (4,)], None, {}, r"000000\.mp4: 4 frames, fewer than train_vae\.frames=5"),
        ([(6,), (6,)], (32, 48), {}, r"32x48 pixels.*--config\.video\.width=48"),
        ([(6,), (6,)], None, {"memory_gib": 1e-5}, r"more than train_vae\.memory_gib=1e-05"),
    ],
)
def test_videos_that_cannot_be_used(tmp_path, folders, size, settings, message):
    root = write(tmp_path, *folders, size=size or (32, 32))
    with pytest.raises(InputError, match=message):
        read_videos(with_data(root, **settings))


def test_a_damaged_video_is_named(tmp_path):
    file = write(tmp_path, (6,), (6,)) / "video/clip-1/000000.mp4"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"clip-1/000000\.mp4"):
        read_videos(with_data(tmp_path))


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"frames": 16}, r"train_vae\.frames=16 must be 5, 9, 13"),
        ({"frames": 1}, r"train_vae\.frames=1"),
        ({"crop_width": 24}, r"train_vae\.crop_width=24 must be a multiple .*nearest: \[16, 32\]"),
        ({"crop_height": 48}, r"train_vae\.crop_height=48 must be at most video\.height=32"),
        ({"steps": 0}, r"train_vae\.steps=0"),
        ({"warmup_steps": 16}, r"must be below train_vae\.steps=16"),
        ({"learning_rate": 0.0}, r"train_vae\.learning_rate"),
        ({"ema_decay": 1.0}, r"train_vae\.ema_decay"),
        ({"kl_weight": -1.0}, r"train_vae\.kl_weight"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(InputError, match=message):
        config_lib.validate_vae_training(change(**settings))


def test_meshes_and_latents_that_cannot_work():
    def refused(message, **sections):
        with pytest.raises(InputError, match=message):
            config_lib.validate_vae_training(dataclasses.replace(CFG, **sections))

    refused(r"mesh\.seq=2", mesh=config_lib.Mesh(seq=2))
    refused(r"batch_size=2 must be a multiple", mesh=config_lib.Mesh(data=4))
    refused(r"latent_mean", vae=dataclasses.replace(CFG.vae, latent_std=(2.0,) * Z))
    config_lib.validate_vae_training(CFG)
