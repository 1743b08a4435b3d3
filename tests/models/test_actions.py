"""The action module: the original's numbers, an oracle, streaming against training, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch.probes import action_module
from longlive_jax import config as config_lib
from longlive_jax import params as params_lib
from longlive_jax.checkpoints import actions as names
from longlive_jax.checkpoints import layout
from longlive_jax.errors import InputError
from longlive_jax.models import actions, dit
from longlive_jax.models.actions import module
from longlive_jax.sampling import cost
from tests import golden_files
from tests.models.actions_oracle import oracle

GOLDEN = golden_files.arrays("actions_tiny")
TINY = dict(kind="module", heads=2, head_dim=64, keyboard_embed=16)


def model(chunk=3, dim=48, **settings):
    """Universal: 4 keys and a mouse."""
    own = config_lib.Actions(**(TINY | settings))
    return config_lib.Model(dim=dim, num_heads=1, chunk_frames=chunk, actions=own)


@dataclasses.dataclass
class Stored:
    """A tensor as files have them."""

    array: np.ndarray

    def read(self, start=0, stop=None):
        return self.array[start:stop]

    @property
    def shape(self):
        return self.array.shape


def tensors(*prefixes):
    found = {k: v for k, v in GOLDEN.items() if k.startswith(prefixes or ("weights/universal/",))}
    return {key.split("/")[-1]: Stored(x) for key, x in found.items()}


@functools.cache
def params():
    return action_module.from_torch(names.collect(tensors(), "W"), model(), "W")


def case(name, *keys):
    keys = keys or ("x", "keyboard", "mouse")
    return {key: jnp.asarray(GOLDEN[f"{name}/{key}"]) for key in keys}


def run(cfg, mode, given, p=None, **at):
    place = action_module.place({**given, **at}, cfg)
    call = jax.jit(action_module.function(cfg, place, mode))
    return call(params() if p is None else p, **given)


def far(found, expected):
    """The largest difference, relative to the largest entry."""
    expected = np.asarray(expected)
    return np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()


def test_a_whole_clip_is_the_originals_with_all_gradients():
    cfg, given = model(window=0), case("universal/full")
    call = action_module.function(cfg, action_module.place(given, cfg), "full")

    def dot(p, given):
        out = call(p, **given)["out"]
        return jnp.sum(out * GOLDEN["universal/full/cotangent"]), out

    (_, out), (of_params, of_given) = jax.jit(
        jax.value_and_grad(dot, (0, 1), has_aux=True)
    )(params(), given)  # fmt: skip
    assert far(out, GOLDEN["universal/full/out"]) < 1e-5
    for name, gradient in of_given.items():
        assert far(gradient, GOLDEN[f"universal/full/grad_{name}"]) < 1e-5, name
    leaves = params_lib.flatten(of_params)
    checked = 0
    for path, gradient in leaves.items():
        (key,) = layout.Weight(("blocks", *path), 0, gradient.shape).keys
        key = key.removeprefix("blocks.0.action_model.")
        if f"universal/full/grad/{key}" in GOLDEN:
            (theirs,) = layout.Weight(("blocks", *path), 0, gradient.shape).to_torch(
                np.asarray(gradient)
            )
            assert far(theirs, GOLDEN[f"universal/full/grad/{key}"]) < 1e-5, key
            checked += 1
    assert checked == 5


def test_chunks_are_the_originals_with_gradients():
    cfg, given = model(), case("universal/causal")
    call = action_module.function(cfg, action_module.place(given, cfg), "causal")

    def dot(given):
        return jnp.sum(call(params(), **given)["out"] * GOLDEN["universal/causal/cotangent"])

    for name, gradient in jax.jit(jax.grad(dot))(given).items():
        assert far(gradient, GOLDEN[f"universal/causal/grad_{name}"]) < 1e-5, name
    assert far(run(cfg, "causal", given)["out"], GOLDEN["universal/causal/out"]) < 1e-5
    everything = run(model(window=0), "causal", given)["out"]
    assert far(everything, GOLDEN["universal/causal/out_no_window"]) < 1e-5


def test_a_stream_is_the_original_and_chunk_by_chunk_the_whole():
    cfg, given = model(), case("universal/causal")
    noisy = given | case("universal/stream", "x_noisy")
    found = run(cfg, "stream", noisy)
    assert far(found["out_noisy"], GOLDEN["universal/stream/out_noisy"]) < 1e-5
    assert far(found["out"], run(cfg, "causal", given)["out"]) < 1e-6


def test_the_rest_of_the_original():
    """A batch, which it cannot have; no mouse; chunks from latent 300 on; norms that it ignores."""
    everything = model(window=0)
    assert far(run(everything, "full", case("batch2"))["out"], GOLDEN["batch2/out"]) < 1e-5
    given = case("universal/full", "x", "keyboard")
    without = GOLDEN["universal/full/out_without_mouse"]
    assert far(run(everything, "full", given)["out"], without) < 1e-5
    at = {"first_latent": GOLDEN["late/start"], "first_action": GOLDEN["late/first_action"]}
    assert far(run(model(), "stream", case("late"), **at)["out"], GOLDEN["late/out"]) < 1e-5
    changed = tensors() | tensors("norm_ignored/")
    p = action_module.from_torch(names.collect(changed, "W", ones=False), everything, "W")
    jax.tree.map(np.testing.assert_array_equal, p, params())


CASES = [
    (dict(keyboard_dim=7, mouse_dim=0, window=6), 2),  # temple run
    (dict(keyboard_dim=2, window=4), 3),  # GTA
    (dict(keyboard_dim=6, window=0, pad=8), 1),  # Matrix-Game 3
    (dict(window=2, pad=11, head_dim=16), 2),
]


@pytest.mark.parametrize(("settings", "chunk"), CASES)
def test_an_oracle_in_numpy(settings, chunk):
    """Two samples, chunks of several sizes, windows smaller than the video, all alignments."""
    cfg, latents, positions = model(chunk, dim=10, **settings), 6, 3
    draw = np.random.default_rng(0)

    def weight(spec):
        return jnp.asarray(draw.standard_normal(spec.shape) * spec.shape[0] ** -0.5, jnp.float32)

    p = jax.tree.map(weight, module._spec(cfg), is_leaf=params_lib.is_spec)
    number = 4 * latents if cfg.actions.pad == 8 else 4 * latents - 3
    shapes = {"x": (2, latents * positions, 10), "keyboard": (2, number, cfg.actions.keyboard_dim)}
    if cfg.actions.mouse_dim:
        shapes["mouse"] = (2, number, 2)
    given = {k: jnp.asarray(draw.standard_normal(s), jnp.float32) for k, s in shapes.items()}
    expected = oracle(p["action_model"], cfg.actions, chunk, positions, **given)
    for mode in ("causal", "stream"):
        assert far(run(cfg, mode, given, p)["out"], expected) < 1e-5, mode


def test_noisy_chunks_see_the_clean_past_and_themselves():
    """Teacher forcing is what a stream computes: noisy passes over a clean past."""
    cfg, given = model(), case("universal/causal")
    expected = run(cfg, "stream", given | case("universal/stream", "x_noisy"))
    noisy = case("universal/stream", "x_noisy")["x_noisy"]
    both = jnp.stack([given["x"], noisy]).reshape(2, 1, 4, 3, 6, 48)
    windows = {
        name: actions.windows(given[name], cfg.actions, 12).reshape(1, 4, 1, 3, 12, -1)
        for name in ("keyboard", "mouse")
    }
    numbers = jnp.arange(12, dtype=jnp.int32).reshape(1, 4, 1, 3)
    inserted = actions.conditioning(cfg.actions, windows, numbers)
    attention = {b.name: b.attention for b, _ in actions.branches(cfg.actions)}

    def attend(name, q, k, v):
        return attention[name].teacher_forcing(q, k, v, dit.Sharding())

    def apply(p, x, inserted):
        return action_module._apply(cfg, p, x, inserted, attend)

    found = jax.jit(apply)(params(), jnp.moveaxis(both, 0, 2), inserted)
    for copy, name in enumerate(("out", "out_noisy")):
        assert far(found[:, :, copy].reshape(expected[name].shape), expected[name]) < 1e-6


def test_sizes_on_the_5b_backbone():
    """Parameters a block, as Matrix-Game 3 has them, and the share of a forward."""
    own = config_lib.Actions(kind="module", keyboard_dim=6, window=0)
    cfg = config_lib.Config(model=config_lib.Model(actions=own))
    spec = dit.spec(cfg.model)["blocks"]["action_model"]
    assert params_lib.count(spec) == 15 * 19_969_024
    plain = cost.chunk_flops(config_lib.Config(), 44, 80)
    share = cost.chunk_flops(cfg, 44, 80) / plain - 1
    assert 0.0258 < share < 0.0268, share


@pytest.mark.parametrize("latent", [0, 300, 1_000_000])
def test_positions_never_end(latent):
    vectors = {"keyboard": jnp.zeros((1, 1, 12, 4))}
    given = actions.conditioning(model().actions, vectors, jnp.full((1, 1), latent, jnp.int32))
    angle = np.asarray(given["keyboard"].angle[0, 0, 0], np.float64)
    expected = latent * 256.0 ** (-np.arange(4) / 4)
    assert np.abs(np.exp(1j * angle[:4]) - np.exp(1j * expected)).max() < 1e-6
    assert not angle[4:].any() and len(angle) == 32


@pytest.mark.parametrize(("pad", "first"), [(12, 1), (11, 0), (8, 0)])
def test_which_picture_an_action_drives(pad, first):
    """Action f enters first in the latent that shows picture f + 1 (pad 12), or f (11)."""
    cfg = model(pad=pad).actions
    vectors = np.eye(24, dtype=np.float32)[None]
    windows = np.asarray(actions.windows(jnp.asarray(vectors), cfg, 6))
    seen = windows.any(axis=2)[0]  # [latent, action]
    for action in range(4, 20):
        latent = int(np.argmax(seen[:, action]))
        picture = action + first
        shows = (picture + 3) // 4 if pad != 8 else picture // 4
        assert latent == shows


@pytest.mark.parametrize("kind", ["module", "token"])
@pytest.mark.parametrize("pad", [12, 11, 8])
def test_a_stream_cuts_actions_as_a_video_does(kind, pad):
    cfg, frames = model(pad=pad, kind=kind).actions, 3
    vectors = np.random.default_rng(0).standard_normal((2, 36, 4)).astype(np.float32)
    whole = actions.windows(jnp.asarray(vectors), cfg, 9)
    before, found = actions.start(cfg, 2)["keyboard"], []
    for chunk in range(3):
        fresh = jnp.asarray(actions.of_chunk(vectors, cfg, chunk, frames))
        window, before = actions.advance(before, fresh, jnp.full((2,), chunk == 0))
        found.append(window)
    np.testing.assert_array_equal(jnp.concatenate(found, axis=1), whole)


def test_bad_input_is_refused_by_name():
    weights = tensors()
    key = "blocks.0.action_model.img_attn_q_norm.weight"
    with pytest.raises(InputError, match=f"{key} must be 1.*64 of its 64"):
        names.collect(weights | {key: Stored(np.full(64, 2, np.float32))}, "W")
    left = names.collect(weights, "W")
    key = "blocks.0.action_model.t_qkv.weight"
    with pytest.raises(InputError, match=rf"{key} must have shape \(384, 128\)"):
        action_module.from_torch(left | {key: Stored(np.zeros((3, 3)))}, model(), "W")
    with pytest.raises(InputError, match=r"mouse_mlp.*not in the action module of the config"):
        action_module.from_torch(left, model(mouse_dim=0), "W")
    with pytest.raises(InputError, match=r"keyboard: shape \(1, 45, 4\).*keyboard_dim=6"):
        action_module.place(case("universal/causal"), model(keyboard_dim=6))
    with pytest.raises(InputError, match="7 vectors, the last of picture 6"):
        given = case("universal/causal")
        action_module.place({k: x[:, :7] if k != "x" else x for k, x in given.items()}, model())
    with pytest.raises(InputError, match="12 latents must be a multiple of"):
        given = case("universal/causal")
        cfg = model(chunk=5)
        action_module.function(cfg, action_module.place(given, cfg), "causal")
    with pytest.raises(InputError, match=r"3 vectors for 7 latents.*at least 24"):
        actions.windows(jnp.zeros((1, 3, 4)), model().actions, 7)
    with pytest.raises(
        InputError, match=r"actions\.window=2 must be at least model.chunk_frames=3"
    ):
        model(window=2)
    with pytest.raises(InputError, match=r"actions.pad=9 must be one of 12, 11, 8"):
        model(pad=9)
    with pytest.raises(InputError, match=r"actions.layers=15 must be at most model.num_layers=2"):
        config_lib.Model(num_layers=2, actions=config_lib.Actions(kind="module", window=0))
    with pytest.raises(InputError, match=r"actions.heads=3 must be a multiple of mesh.seq=2"):
        own = dataclasses.replace(model(4, heads=3, window=0), num_heads=2)
        config_lib.Config(model=own, mesh=config_lib.Mesh(seq=2), sample=WINDOW)


WINDOW = config_lib.Sample(window_frames=12, sink_frames=0, multi_shot_sink=False)
