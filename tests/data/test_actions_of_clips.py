"""Actions beside the videos of training data: cut, joined and padded as the pictures are."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import config as lib
from longlive_jax.data import action_rows, records, sidecars, walker
from longlive_jax.data.clips import VideoFolder
from longlive_jax.errors import InputError
from longlive_jax.models import actions as actions_lib
from tests.data import acted_videos
from tests.data.acted_videos import KEYS

ACTIONS = lib.Actions(kind="module", heads=2, head_dim=8, layers=1)


def config(path, own=ACTIONS, latents=4, **data):
    """Chunks of two latents: 5 pictures, then 8 each."""
    model = lib.Model(
        dim=32, ffn_dim=48, num_heads=4, num_layers=1, in_dim=4, out_dim=4, chunk_frames=2,
        actions=own,
    )  # fmt: skip
    return lib.Config(
        model=model,
        video=lib.Video(height=32, width=64),
        sample=lib.Sample(window_frames=8, sink_frames=0),
        data=lib.Data(path=str(path), **data),
        train=lib.Train(latent_frames=latents),
    )


def shown_and_acted(sample):
    """The numbers of the pictures, and of the rows: by the key, and by the mouse."""
    assert sample.actions.dtype == np.float32 and sample.actions.shape[1] == len(KEYS) + 2
    by_key, by_mouse = sample.actions[:, 0] * 256, sample.actions[:, -1] * 32
    np.testing.assert_array_equal(by_key, by_mouse)
    return acted_videos.numbers(sample.frames), by_key.astype(int)


CUTS = {
    "within a shot": ([14, 12], 4, {}),
    "over a cut": ([14, 12], 6, {}),
    "a second skipped": ([60], 6, {"max_chunks_per_shot": 2}),
    "longer than all shots": ([14, 12], 8, {"allow_padding": True}),
}


@pytest.mark.parametrize("shots, latents, rules", CUTS.values(), ids=CUTS)
def test_rows_are_those_of_the_pictures(tmp_path, shots, latents, rules):
    root = acted_videos.write(tmp_path, {"a": shots})
    source = VideoFolder(config(root, latents=latents, **rules))
    starts = set()
    for key in range(6):
        shown, acted = shown_and_acted(source.sample(0, key))
        np.testing.assert_array_equal(acted, shown)
        starts.add(shown[0])
    assert len(starts) > 1 or "allow_padding" in rules


def test_a_row_drives_what_the_model_says(tmp_path):
    """Sidecars whose row drives its own picture, for a model whose row drives the next one."""
    root = acted_videos.write(tmp_path, {"a": [20]}, pad=11)
    for pad, later in ((11, 0), (12, 1)):
        own = dataclasses.replace(ACTIONS, pad=pad)
        sample = VideoFolder(config(root, own)).sample(0, 3)
        shown, acted = shown_and_acted(sample)
        np.testing.assert_array_equal(acted, np.minimum(shown + later, 19))


def test_another_rate_is_resampled_with_the_pictures(tmp_path):
    """48 a second: every second picture, with the moves of both."""
    root = acted_videos.write(tmp_path, {"a": [40]}, fps=48)
    sample = VideoFolder(config(root)).sample(0, 5)
    shown = acted_videos.numbers(sample.frames)
    assert (np.diff(shown) == 2).all()
    np.testing.assert_allclose(sample.actions[:, -1] * 32, 2 * shown + 1, atol=1e-4)
    np.testing.assert_allclose(sample.actions[:, 0] * 256, shown + 1, atol=1e-4)


def test_keys_are_taken_by_name(tmp_path):
    root = acted_videos.write(tmp_path, {"a": [20]}, keys=("KeyD", "KeyW"))
    own = dataclasses.replace(ACTIONS, keyboard_dim=2, keyboard_keys="KeyW,KeyD")
    sample = VideoFolder(config(root, own)).sample(0, 1)
    np.testing.assert_array_equal(sample.actions[:, 0], 0)
    np.testing.assert_array_equal(sample.actions[:, 1] * 256, acted_videos.numbers(sample.frames))


def test_a_bad_sidecar_costs_its_file_alone(tmp_path):
    root = acted_videos.write(tmp_path, {"a": [20], "b": [20], "c": [20]})
    sidecars.path_for(root / "video/b/000000.mp4").unlink()
    short = acted_videos.actions(19)
    sidecars.write(sidecars.path_for(root / "video/c/000000.mp4"), short)
    source = VideoFolder(config(root))
    assert source.sample(1, 0).name == "a"
    failures = dict(source.sample(1, 0).failures)
    assert "has no sidecar 000000.actions.npz" in failures[str(root / "video/b/000000.mp4")]
    assert (
        "19 rows for a video of 20 pictures" in failures[str(root / "video/c/000000.actions.npz")]
    )


BAD = {
    "none": (dict(sidecar=False), ACTIONS, r"video/a/000000\.mp4: has no sidecar 000000\.actions"),
    "rate": (dict(), ACTIONS, r"fps=30, the video has 24 pictures a second"),
    "keys": (dict(keys=("Space",)), ACTIONS, r"key 'Space' is held in picture 1, and the model"),
    "mouse": (dict(), dataclasses.replace(ACTIONS, mouse_dim=0), "the mouse moves in picture 1"),
    "names": (dict(), dataclasses.replace(ACTIONS, keyboard_dim=7), "keyboard_dim=7 and no names"),
}


@pytest.mark.parametrize("case", BAD)
def test_data_that_has_no_actions_for_the_model_is_refused_when_it_is_opened(tmp_path, case):
    given, own, message = BAD[case]
    root = acted_videos.write(tmp_path, {"a": [20], "b": [20]}, **given)
    if case == "rate":
        for name in "ab":
            file = sidecars.path_for(root / f"video/{name}/000000.mp4")
            sidecars.write(file, acted_videos.actions(20, fps=30))
    with pytest.raises(InputError, match=message):
        VideoFolder(config(root, own))
    assert VideoFolder(config(root, lib.Actions())).sample(0, 0).actions is None


@hypothesis.given(
    st.integers(1, 30), st.integers(1, 40), st.sampled_from([12, 11, 8]), st.booleans(),
)  # fmt: skip
@hypothesis.settings(max_examples=60, deadline=None)
def test_vectors_of_rows_are_those_of_the_sidecar(count, latents, pad, mouse):
    """What training reads of a whole video's rows is what a stream reads of its sidecar."""
    own = dataclasses.replace(ACTIONS, pad=pad, mouse_dim=2 * mouse)
    made = acted_videos.actions(count)
    if not mouse:
        made = dataclasses.replace(made, mouse=0 * made.mouse)
    rows = action_rows.of(made, own)
    found, expected = action_rows.vectors(rows, own), sidecars.vectors(made, own)
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name][0], x)
        if actions_lib.needed(own, latents) <= len(x):
            host = actions_lib.windows(x[None], own, latents)
            on_device = actions_lib.windows(jnp.asarray(x[None]), own, latents)
            np.testing.assert_array_equal(host, on_device)
    again = action_rows.actions(rows, own.key_names, pad)
    np.testing.assert_array_equal(action_rows.of(again, own), rows)
    longer = action_rows.fitted(rows, count + 3)
    np.testing.assert_array_equal(longer[count:], rows[-1:].repeat(3, axis=0))


@hypothesis.given(st.integers(1, 400), st.integers(0, 2**32), st.booleans())
@hypothesis.settings(max_examples=40, deadline=None)
def test_a_walk_is_one_that_a_player_could_take(pictures, seed, mouse):
    own = dataclasses.replace(ACTIONS, mouse_dim=2 * mouse)
    walk = walker.walk(own, pictures, np.random.default_rng(seed))
    again = walker.walk(own, pictures, np.random.default_rng(seed))
    np.testing.assert_array_equal(walk.keyboard, again.keyboard)
    assert len(walk) == pictures and walk.keys == KEYS and walk.fps == 24
    assert set(np.unique(walk.keyboard)) <= {0, 1}
    assert not (walk.keyboard[:, 0] * walk.keyboard[:, 1]).any()  # W and S
    assert mouse or not walk.mouse.any()
    assert action_rows.of(walk, own).shape == (pictures, 6)


def test_walks_hold_and_turn():
    walk = walker.walk(ACTIONS, 4000, np.random.default_rng(0))
    held = walk.keyboard.any(axis=1).mean()
    assert 0.6 < held < 0.95 and (walk.keyboard.mean(axis=0) > 0.1).all()
    assert 0.3 < (walk.mouse[:, 1] != 0).mean() < 0.7 and np.abs(walk.mouse[:, 1]).max() > 3


def test_what_a_dataset_is_encoded_with():
    assert records.action_settings(lib.Actions()) == {}
    assert records.action_settings(ACTIONS)["actions.keyboard_keys"] == "KeyW,KeyS,KeyA,KeyD"
