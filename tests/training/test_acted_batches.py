"""Actions on their way to the trainer: of cached data, of folders of sidecars, of a random walk."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.data import action_rows, records, sidecars
from longlive_jax.errors import InputError
from longlive_jax.models import actions
from longlive_jax.training import evaluate, feed, prefetch, scripts
from tests.data import acted_videos
from tests.training import tiny_distill, tiny_run

ACTIONS = lib.Actions(kind="module", heads=2, head_dim=8, keyboard_embed=8, layers=1, window=4)


def config(path, own=ACTIONS, mesh=lib.Mesh()):
    cfg = tiny_run.config(data__path=str(path))
    model = dataclasses.replace(cfg.model, actions=own)
    return dataclasses.replace(cfg, model=model, mesh=mesh)


def rollouts(path, own=ACTIONS, mesh=lib.Mesh(), **data):
    """Of four chunks of four latents: 61 pictures."""
    cfg = tiny_distill.config(mesh, model=dict(actions=own), batch_size=4)
    return dataclasses.replace(cfg, data=lib.Data(path=str(path), **data))


def steps(cfg, tmp_path, first=0, stop=2):
    """The batches of some steps, on the host, and their samples' names."""
    mesh = mesh_lib.make_mesh(cfg.mesh)
    failures, numbers = tmp_path / "failures", range(first, stop)
    if cfg.objective == "dmd":
        source, _ = scripts.open_source(cfg)
        encode = None if cfg.data.cached else lambda prompts: np.zeros((len(prompts), 8, 16))
        made = scripts.Prefetcher(cfg, mesh, source, encode, failures, numbers)
    else:
        source, _ = feed.open_source(cfg)
        made = feed.Prefetcher(cfg, mesh, source, feed.Encoders(), failures, numbers)
    with contextlib.closing(made) as batches:
        return [(jax.device_get(b), prefetch.decode_names(np.asarray(n))) for b, n in batches]


def by_latent(rows, cfg, latents):
    """What the model is given of rows of pictures, [latent, action, dim] by path."""
    made = sidecars.vectors(action_rows.actions(rows, cfg.key_names, cfg.pad), cfg)
    return {name: actions.windows(x[None], cfg, latents)[0] for name, x in made.items()}


@pytest.mark.parametrize("mesh", [lib.Mesh(), lib.Mesh(data=2, seq=2)], ids=["one", "mesh"])
def test_batches_have_the_actions_of_their_samples(tmp_path, mesh):
    cfg = config(tiny_run.write_cached(tmp_path / "data", acts=ACTIONS), mesh=mesh)
    for batch, names in steps(cfg, tmp_path):
        assert batch.actions.keys() == {"keyboard", "mouse"}
        for i, name in enumerate(names):
            expected = by_latent(tiny_run.rows_of(name), ACTIONS, 4)
            for path, x in batch.actions.items():
                at = x.reshape(-1, *x.shape[2:])[i]  # [chunk, frame, action, dim]
                np.testing.assert_array_equal(at.reshape(4, *at.shape[2:]), expected[path])


def test_another_alignment_and_no_mouse(tmp_path):
    """What is stored is the sidecar's: a model of another alignment reads it as its own."""
    data = tiny_run.write_cached(tmp_path / "data", acts=ACTIONS)
    own = dataclasses.replace(ACTIONS, pad=11)
    ((batch, names),) = steps(config(data, own), tmp_path, stop=1)
    moved = tiny_run.rows_of(names[0])[np.maximum(np.arange(13) - 1, 0)]
    expected = by_latent(moved, own, 4)["mouse"]
    found = batch.actions["mouse"][0, 0]
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


REFUSED = {
    "none": (None, ACTIONS, r"holds no actions, and the model has an action path"),
    "fewer": (
        ACTIONS, dataclasses.replace(ACTIONS, keyboard_dim=2),
        r"of the 4 keys KeyW,KeyS,KeyA,KeyD, the model's are the 2 of KeyW,KeyS; give "
        r"--config.actions.keyboard_dim=4",
    ),
    "others": (
        ACTIONS, dataclasses.replace(ACTIONS, keyboard_keys="KeyW,KeyA,KeyS,KeyD"),
        r"the model's are the 4 of KeyW,KeyA,KeyS,KeyD",
    ),
    "names": (ACTIONS, dataclasses.replace(ACTIONS, keyboard_dim=3), "no names for its keys"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_cached_data_of_another_model_is_refused_when_it_is_opened(tmp_path, case):
    stored, own, message = REFUSED[case]
    data = tiny_run.write_cached(tmp_path / "data", acts=stored)
    with pytest.raises(InputError, match=message):
        feed.open_source(config(data, own))
    assert feed.open_source(config(data, lib.Actions()))[0].sample(0, 0).actions is None


def test_another_rate_and_damage_are_refused(tmp_path):
    data = tiny_run.write_cached(tmp_path / "data", acts=ACTIONS)
    file = data / records.MANIFEST
    content = json.loads(file.read_text())
    del content["checksum"]
    content["settings"]["the pictures a second"] = 16
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="its actions have 16 rows a second"):
        feed.open_source(config(data))
    content["settings"]["the pictures a second"] = 24
    content["settings"]["actions.keyboard_keys"] = ""
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="it has files of actions, and its setting"):
        feed.open_source(config(data))
    content["settings"]["actions.keyboard_keys"] = "KeyW,KeyS,KeyA"
    file.write_text(json.dumps(content))
    three = dataclasses.replace(ACTIONS, keyboard_dim=3, keyboard_keys="KeyW,KeyS,KeyA")
    with pytest.raises(InputError, match=r"it is \[13, 6\] float32, by the manifest \[13, 5\]"):
        feed.open_source(config(data, three))


# ---------------------------------------------------------------------------------------------
# Rollouts.


def test_prompts_alone_are_walked_through_at_random(tmp_path):
    """From the seed and the step alone: a run that begins later draws what it would have drawn."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc")
    cfg = rollouts(prompts)
    first, second = steps(cfg, tmp_path)
    ((again, names),) = steps(cfg, tmp_path, first=1)
    assert names == second[1]
    jax.tree.map(np.testing.assert_array_equal, again, second[0])
    one, other = (batch.actions["keyboard"] for batch, _ in (first, second))
    assert one.shape == (1, 4, 4, 4, 12, 4) and (one != other).any()
    assert 0.1 < one.mean() < 0.6 and first[0].actions["mouse"].any()
    on_mesh = steps(rollouts(prompts, mesh=lib.Mesh(data=2, seq=2)), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, on_mesh[0][0], first[0])


def test_sidecars_drive_the_shots_of_a_folder_without_videos(tmp_path):
    """Of shots of 29 and 32 pictures, a random piece each; a short one starts over."""
    root = acted_videos.write(tmp_path / "data", {"a": [60, 20], "b": [60, 60]})
    for video in root.glob("video/*/*.mp4"):
        video.unlink()
    source, identity = scripts.open_source(rollouts(root))
    assert identity.startswith("2 records")
    numbers = {0: set(), 1: set()}
    for key in range(5):
        for index in numbers:
            rows = source.sample(index, key).actions
            assert rows.shape == (61, 6)
            found = (rows[:, 0] * 256).astype(int)
            first, second = found[:29], found[29:]
            assert (np.diff(first) == 1).all() and first[0] >= 0 and first[-1] < 60
            if index:
                assert (np.diff(second) == 1).all() and second[0] >= 60 and second[-1] < 120
            else:  # 20 rows for 32 pictures
                np.testing.assert_array_equal(second, 60 + np.arange(32) % 20)
            numbers[index].add(first[0])
    assert all(len(starts) > 2 for starts in numbers.values())


def test_a_script_has_its_own_actions(tmp_path):
    shots = [{"prompt": "a", "chunks": 2, "actions": "w*29"}, {"prompt": "b", "chunks": 2}]
    (tmp_path / "walk.json").write_text(json.dumps(shots))
    source, _ = scripts.open_source(rollouts(tmp_path / "walk.json"))
    rows = source.sample(0, 5).actions
    np.testing.assert_array_equal(rows[:, 0], np.arange(61) < 29)
    assert not rows[:, 1:].any()


def test_rollouts_of_cached_data_have_its_actions(tmp_path):
    data = tiny_run.write_cached(tmp_path / "data", acts=ACTIONS)
    cfg = config(data)
    distill = dataclasses.replace(
        cfg.distill, latent_frames=4, batch_size=2, lora=lib.LoRA(rank=2, alpha=4.0)
    )
    cfg = dataclasses.replace(cfg, distill=distill, objective="dmd")
    ((batch, names),) = steps(cfg, tmp_path, stop=1)
    for i, name in enumerate(names):
        expected = by_latent(tiny_run.rows_of(name), ACTIONS, 4)["keyboard"]
        found = batch.actions["keyboard"][0, i]
        np.testing.assert_array_equal(found.reshape(expected.shape), expected)


def test_sidecars_that_do_not_fit_are_refused_when_they_are_opened(tmp_path):
    root = acted_videos.write(tmp_path / "data", {"a": [60, 60], "b": [60, 60]})
    sidecars.path_for(root / "video/b/000001.mp4").unlink()
    with pytest.raises(InputError, match=r"video 'b' has 1 sidecar\(s\) for 2 shot\(s\)"):
        scripts.open_source(rollouts(root))
    sidecars.path_for(root / "video/b/000000.mp4").unlink()
    with pytest.raises(InputError, match=r"video 'b' has 0 sidecar\(s\) for 2 shot\(s\)"):
        scripts.open_source(rollouts(root))
    whole = acted_videos.write(tmp_path / "whole", {"a": [60]})
    with pytest.raises(InputError, match=r"the mouse moves in picture 1, and the model has no"):
        scripts.open_source(rollouts(whole, dataclasses.replace(ACTIONS, mouse_dim=0)))
    with pytest.raises(InputError, match=r"no names for its keys"):
        scripts.open_source(rollouts(root, dataclasses.replace(ACTIONS, keyboard_dim=5)))


def test_evaluations_are_driven_too(tmp_path):
    """Always by the same actions; those of the sidecars where there are some."""
    (tmp_path / "prompts.txt").write_text("a\nb")
    cfg = config("", ACTIONS)
    data = dataclasses.replace(cfg.data, eval_path=str(tmp_path / "prompts.txt"))
    train = dataclasses.replace(cfg.train, eval_every=1, eval_chunks=2)
    cfg = dataclasses.replace(cfg, data=data, train=train)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    first, second = (evaluate.read_prompts(cfg, mesh).batch.actions for _ in range(2))
    assert [len(one) for one in first] == [13, 13]
    assert (first[0].keyboard != first[1].keyboard).any()
    for one, again in zip(first, second):
        np.testing.assert_array_equal(one.keyboard, again.keyboard)
