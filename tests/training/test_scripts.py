"""Scripts of videos as batches for distillation: prompts of any form, or cached training data."""

import contextlib
import dataclasses
import json

import jax
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.errors import InputError
from longlive_jax.training import batch as batch_lib
from longlive_jax.training import prefetch, scripts
from tests.training import tiny_distill, tiny_run

PREFIX = "The scene transitions. "


def config(path, mesh=lib.Mesh(), **overrides):
    cfg = tiny_distill.config(mesh, batch_size=4, accumulation=2)
    return dataclasses.replace(cfg, data=lib.Data(path=str(path), **overrides))


@pytest.fixture
def folder(tmp_path):
    """Five videos of captions: of one shot, of two, of four chunks and of more than a rollout."""
    shots = {"one": ["a"], "two": ["b", "c"], "four": list("defg"), "six": list("hijklm")}
    shots["long"] = [f"n{i}" for i in range(9)]
    for name, captions in shots.items():
        (tmp_path / name).mkdir()
        for i, caption in enumerate(captions):
            (tmp_path / name / f"{i}.json").write_text(json.dumps({"caption": caption}))
        (tmp_path / name / "shot_durations.txt").write_text("\n".join("1" for _ in captions))
    return tmp_path


def encode(prompts):
    """Eight rows of a number for each prompt."""
    return np.stack([np.full((8, 16), sum(prompt.encode()), np.float32) for prompt in prompts])


def steps(cfg, tmp_path, stop=2):
    mesh = mesh_lib.make_mesh(cfg.mesh)
    source, _ = scripts.open_source(cfg)
    made = scripts.Prefetcher(cfg, mesh, source, encode, tmp_path / "failures", range(stop))
    like = batch_lib.abstract_scripts(cfg, mesh)
    with contextlib.closing(made) as batches:
        for batch, names in batches:
            jax.tree.map(lambda x, y: x.sharding == y.sharding or 1 / 0, batch, like)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
                lambda x: (x.shape, x.dtype), like
            )
            yield jax.device_get(batch), prefetch.decode_names(np.asarray(names))


def test_prompts_are_as_long_as_a_rollout(folder):
    source, identity = scripts.open_source(config(folder))
    assert identity.startswith("5 records, ") and len(source) == 5
    found = {(s := source.sample(i, 0)).name: s.prompts for i in range(5)}
    assert found == {
        "one": ("a",) * 4,  # its last prompt goes on
        "two": ("b", PREFIX + "c", "c", "c"),
        "four": ("d", *(PREFIX + c for c in "efg")),
        "six": ("h", *(PREFIX + c for c in "ijk")),
        "long": ("n0", *(f"{PREFIX}n{i}" for i in (1, 2, 3))),
    }


def test_batches_have_text_and_cuts_on_every_mesh(folder, tmp_path):
    one = list(steps(config(folder), tmp_path))
    many = list(steps(config(folder, lib.Mesh(data=2, fsdp=2, seq=2)), tmp_path))
    source, _ = scripts.open_source(config(folder))
    prompts = {(s := source.sample(i, 0)).name: s.prompts for i in range(5)}
    seen = []
    for (ours, our_names), (theirs, their_names) in zip(one, many, strict=True):
        assert our_names == their_names and tiny_run.equal(ours, theirs)
        seen += our_names
        for i, name in enumerate(our_names):
            at = divmod(i, 4)
            np.testing.assert_array_equal(ours.text[at], encode(prompts[name]))
            cuts = [p.startswith(PREFIX) for p in prompts[name]]
            assert ours.cut[at].tolist() == cuts and not cuts[0]
    assert len(seen) == 16
    assert all(sorted(seen[i : i + 5]) == sorted(prompts) for i in (0, 5, 10))


def test_other_prompts_are_other_data(folder):
    before = scripts.open_source(config(folder))[1]
    assert scripts.open_source(config(folder))[1] == before
    (folder / "one" / "0.json").write_text(json.dumps({"caption": "another"}))
    assert scripts.open_source(config(folder))[1] != before


def test_cached_data_give_text_and_first_frames(tmp_path):
    """As launch.encode_dataset writes them, whatever the trainer's own lengths are."""
    data = tiny_run.write_cached(tmp_path / "cached")
    cfg = tiny_run.config(data__path=str(data), video__image_to_video=True)
    distill = lib.Distill(latent_frames=4, batch_size=2)
    cfg = dataclasses.replace(cfg, distill=distill, objective="dmd")
    source, _ = scripts.open_source(cfg)
    mesh = mesh_lib.make_mesh(cfg.mesh)
    made = scripts.Prefetcher(cfg, mesh, source, None, tmp_path / "failures", range(1))
    with contextlib.closing(made) as batches:
        batch, names = next(batches)
    by_name = {(s := source.sample(i, 0)).name: s for i in range(len(source))}
    for i, name in enumerate(prefetch.decode_names(np.asarray(names))):
        np.testing.assert_array_equal(batch.first_frame[0, i], by_name[name].latents[:1])
        np.testing.assert_array_equal(batch.text[0, i], by_name[name].text)
    assert not np.any(batch.cut)
    longer = dataclasses.replace(cfg, distill=dataclasses.replace(distill, latent_frames=8))
    with pytest.raises(InputError, match="holds 4 latent frames a sample"):
        scripts.open_source(longer)
