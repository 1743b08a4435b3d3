"""Actions that check themselves, their files, and what a model reads of them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from longlive_jax import config as config_lib
from longlive_jax.data import sidecars
from longlive_jax.data.sidecars import for_model, keys
from longlive_jax.errors import InputError

WASD = ("KeyW", "KeyS", "KeyA", "KeyD")


def make(count=3, names=WASD, **fields):
    draw = np.random.default_rng(count)
    values = {
        "keyboard": draw.random((count, len(names)), np.float32),
        "mouse": draw.normal(0, 5, (count, 2)).astype(np.float32), "fps": 24.0, "keys": names,
    }  # fmt: skip
    return sidecars.Actions(**(values | fields))


def equal(a, b):
    for field in dataclasses.fields(a):
        if field.name in ("where", "clipped"):
            continue
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype == np.float32
            np.testing.assert_array_equal(x, y)
        else:
            assert x == y, field.name


@st.composite
def drawn(draw):
    count = draw(st.integers(1, 6))
    names = tuple(draw(st.lists(st.sampled_from(keys.CODES), unique=True, max_size=4)))

    def numbers(dim, least, most):
        element = st.floats(least, most, width=32)
        return draw(arrays.arrays(np.float32, (count, dim), elements=element))

    return sidecars.Actions(
        keyboard=numbers(len(names), 0, 1), mouse=numbers(2, -20, 20), keys=names,
        fps=draw(st.sampled_from([24, 16, 29.97, 1000])),
        view=draw(st.sampled_from(sidecars.VIEWS)), pad=draw(st.sampled_from([12, 11, 8])),
        pose=numbers(7, -1e6, 1e6) if draw(st.booleans()) else None,
        source=draw(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9)),
    )  # fmt: skip


@settings(deadline=None, max_examples=40)
@given(drawn(), st.sampled_from([".actions.npz", ".actions.jsonl"]))
def test_a_file_keeps_every_bit(tmp_path_factory, actions, end):
    path = tmp_path_factory.mktemp("s") / f"a{end}"
    sidecars.write(path, actions)
    equal(sidecars.read(path, len(actions), actions.fps), actions)


def test_the_mouse_is_cut_and_counted(caplog):
    mouse = np.asarray([[25, 0], [-3, 20], [-70, 1000], [0, -20.5]])
    with caplog.at_level("WARNING"):
        actions = make(4, mouse=mouse, where="walk.jsonl")
    assert actions.clipped == 3 and actions.mouse.tolist() == [
        [20, 0],
        [-3, 20],
        [-20, 20],
        [0, -20],
    ]
    assert "walk.jsonl: the mouse moves more than 20 degrees a picture in 3 of 4" in caplog.text
    assert make(3).clipped == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keyboard": np.full((3, 4), np.nan)}, r"keyboard is nan in picture 0"),
        ({"mouse": [[0, 0], [0, np.inf], [0, 0]]}, r"mouse is inf in picture 1"),
        ({"keyboard": np.full((3, 4), 1.5)}, r"keyboard has 1.5; it must be 0 \(up\) to 1"),
        ({"keyboard": np.zeros((3, 2))}, r"keyboard is float64\[3, 2\].*\[picture, 4\]"),
        ({"mouse": np.zeros((2, 2))}, r"3 rows of keyboard, 2 rows of mouse; each needs one row"),
        ({"pose": np.zeros((4, 7))}, r".*4 rows of pose"),
        ({"pose": np.zeros((3, 6))}, r"pose is .*\[picture, 7\]"),
        ({"keyboard": np.zeros((3, 4), object)}, r"keyboard is object"),
        ({"keys": ("KeyW", "KeyS", "KeyA", "Keyd")}, r"unknown key 'Keyd'.*such as 'KeyD'"),
        ({"keys": ("KeyW",) * 4}, r"key 'KeyW' is there twice"),
        ({"fps": 0}, r"fps=0; it must be above 0, 1000 at most"),
        ({"fps": float("nan")}, r"fps=nan"),
        ({"view": "bird"}, r"view='bird'; it must be one of first, third"),
        ({"pad": 9}, r"pad=9; it must be one of 12, 11, 8"),
    ],
)
def test_what_cannot_be_is_refused_by_name(fields, message):
    with pytest.raises(InputError, match=f"^walk: {message}"):
        make(3, where="walk", **fields)


def test_other_videos_are_refused(tmp_path):
    path = tmp_path / "walk.actions.npz"
    sidecars.write(path, make(5))
    with pytest.raises(InputError, match="npz: 5 rows for a video of 6 pictures: shorter than the"):
        sidecars.read(path, 6)
    with pytest.raises(InputError, match="npz: 5 rows for a video of 4 pictures: longer than the"):
        sidecars.read(path, 4)
    with pytest.raises(InputError, match="npz: fps=24, the video has 16 pictures a second; resam"):
        sidecars.read(path, 5, 16)
    sidecars.read(path, 5, 24000 / 1001)


def row(**fields):
    return {"keyboard": [1], "mouse": [0, 0]} | fields


FIRST = row(fps=24, keys=["KeyW"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.actions.jsonl", "", "there is no object in it"),
        ("a.actions.jsonl", "[1]", r"\[0\] is a list, not an object"),
        ("a.actions.jsonl", "{", "cannot be read: .*; one object a line"),
        ("a.actions.jsonl", b"\xff", "cannot be read"),
        ("a.actions.jsonl", [row()], "has no 'fps'"),
        ("a.actions.jsonl", [row(fps=24, keys="KeyW")], "keys is 'KeyW', not a list"),
        ("a.actions.jsonl", [FIRST, {"keyboard": [1]}], r"\[1\] has no 'mouse'"),
        ("a.actions.jsonl", [FIRST, row(keyboard=[1, 0])], r"\[1\] has 2 numbers of keyboard, .* 1"),
        ("a.actions.jsonl", [FIRST, row(fps=24)], r"\[1\] has 'fps', which no sidecar has"),
        ("a.actions.jsonl", [FIRST | {"pose": [0] * 7}, row()], r"\[1\] has 0 numbers of pose"),
        ("a.actions.jsonl", [FIRST, row(mouse=[0, "a"])], r"\[1\].mouse\[1\] is 'a', not a number"),
        ("a.actions.jsonl", '{"keyboard": [NaN], "mouse": [0, 0], "fps": 1, "keys": ["KeyW"]}',
         "keyboard is nan in picture 0"),
        ("a.actions.jsonl", [FIRST | {"keys": ["w"]}], "unknown key 'w'"),
        ("a.actions.npz", b"PK", "not a .npz file"),
        ("a.actions.npz", {"keyboard": np.zeros((1, 1))}, "array 'mouse' is missing"),
        ("a.actions.npz", dict(keyboard=np.zeros((1, 1)), mouse=np.zeros((1, 2)), fps=24, keys=[7]),
         r"'keys' is int64\[1\]; it must be texts"),
        ("a.actions.npz", dict(keyboard=np.zeros((1, 1)), mouse=np.zeros((1, 2)), fps="24", keys="a"),
         "'fps' is .*; it must be a number"),
        ("a.actions.npz", dict(keyboard=np.zeros((1, 1)), mouse=np.full((1, 2), np.nan), fps=24,
         keys=["KeyW"]), "2 of 2 values of 'mouse' are not finite"),
        ("a.actions.npz", dict(keyboard=np.zeros((1, 1), object), mouse=1, fps=24, keys=["KeyW"]),
         "pickled objects are refused"),
        ("a.txt", "w*3", "must end in .actions.npz or .actions.jsonl"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused_by_name(tmp_path, name, content, message):
    path = tmp_path / name
    if isinstance(content, dict):
        np.savez(path, **content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        lines = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
        path.write_text(lines)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*{message}"):
        sidecars.read(path)


def test_a_missing_file_is_named(tmp_path):
    for end in ("npz", "jsonl"):
        with pytest.raises(InputError, match=rf"walk\.{end}: .*[Nn]o such file"):
            sidecars.read(tmp_path / f"walk.{end}")


def test_a_video_finds_its_sidecar(tmp_path):
    video = tmp_path / "walk.one.mp4"
    assert sidecars.beside(video) is None
    sidecars.write(sidecars.path_for(video), make())
    assert sidecars.beside(video) == tmp_path / "walk.one.actions.npz"
    sidecars.write(sidecars.path_for(video, ".actions.jsonl"), make())
    with pytest.raises(InputError, match=r"one.actions.npz: and walk.one.actions.jsonl beside it"):
        sidecars.beside(video)


def own(**fields):
    return config_lib.Actions(**({"kind": "module"} | fields))


@pytest.mark.parametrize("of_model", [12, 11, 8])
@pytest.mark.parametrize("of_sidecar", [12, 11, 8])
def test_a_row_drives_its_picture_whatever_the_alignments(of_model, of_sidecar):
    """The newest action of picture p in a model's array is entry p + 11 - pad (actions.md 4)."""
    count = 13
    mouse = np.stack([np.zeros(count), np.arange(count)], axis=1)
    actions = make(count, mouse=mouse, pad=of_sidecar)
    cfg = own(pad=of_model, mouse_degrees=2.0)
    made = sidecars.vectors(actions, cfg)["mouse"][:, 1] * 2
    for picture in range(1, count):
        drives = picture - (of_sidecar == 12)  # of the sidecar's rows
        assert made[picture + 11 - of_model] == drives


def test_vectors_are_in_the_models_order_and_units():
    actions = make(2, ("KeyD", "KeyW"), keyboard=[[1, 0], [0.5, 1]], mouse=[[3, -15], [0, 0]])
    made = sidecars.vectors(actions, own())
    assert made["keyboard"].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0.5]]
    np.testing.assert_allclose(made["mouse"], [[0.2, -1], [0, 0]], rtol=1e-6)
    assert made["keyboard"].dtype == made["mouse"].dtype == np.float32
    other = sidecars.vectors(actions, own(keyboard_dim=3, keys="Space, KeyW,KeyD"))
    assert other["keyboard"].tolist() == [[0, 0, 1], [0, 1, 0.5]]
    still = make(2, ("KeyD", "Space"), keyboard=[[1, 0], [0, 0]], mouse=np.zeros((2, 2)))
    made = sidecars.vectors(still, own(mouse_dim=0))  # a key that is never held may be unknown
    assert list(made) == ["keyboard"] and made["keyboard"][0].tolist() == [0, 0, 0, 1]


def test_alignment_twice_is_alignment_once():
    for pad in (12, 11, 8):
        once = sidecars.aligned(make(5, pad=12), own(pad=pad))
        equal(sidecars.aligned(once, own(pad=pad)), once)
        assert once.pad == pad
        assert for_model.of_rows(once, own(pad=pad))["keyboard"].shape == (5, 4)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config_lib.Actions(), "walk: actions for a model without an action path"),
        (own(keyboard_dim=2), "walk: key 'KeyA' is held in picture 1, .*; its keys are KeyW, KeyS"),
        (own(keyboard_dim=7), "config: actions.keyboard_dim=7 and no names for its keys; give act"),
        (own(keyboard_dim=1, keys="keyw"), "config: actions.keys: unknown key 'keyw'"),
        (own(mouse_dim=0), "walk: the mouse moves in picture 0, and the model has no mouse"),
        (own(mouse_dim=3), "config: actions.mouse_dim=3; a sidecar's mouse is pitch and yaw"),
    ],
)
def test_a_model_that_cannot_be_given_them_says_so(cfg, message):
    keyboard = np.asarray([[1, 0, 0, 0], [1, 0, 1, 0]])
    actions = make(2, keyboard=keyboard, mouse=np.ones((2, 2)), where="walk")
    with pytest.raises(InputError, match=f"^{message}"):
        sidecars.vectors(actions, cfg)


def test_names_of_keys_must_be_as_many_as_the_keyboard():
    with pytest.raises(InputError, match=r"names 2 keys, actions.keyboard_dim is 4"):
        own(keys="KeyW,KeyS")


def test_videos_are_joined():
    first, second = make(2, ("KeyW",)), make(3, ("KeyA", "KeyW"), view="third")
    both = sidecars.join([first, second])
    assert both.keys == ("KeyW", "KeyA") and both.view == "third" and len(both) == 5
    np.testing.assert_array_equal(both.keyboard[2:], second.keyboard[:, ::-1])
    np.testing.assert_array_equal(both.keyboard[:2, 0], first.keyboard[:, 0])
    np.testing.assert_array_equal(both.mouse, np.concatenate([first.mouse, second.mouse]))
    with pytest.raises(InputError, match="pad=11, and actions has fps=24, pad=12; they must be eq"):
        sidecars.join([make(2, pad=11), second])
