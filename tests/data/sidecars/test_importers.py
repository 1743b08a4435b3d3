"""Recordings of other projects, written here by hand, as our own sidecars."""

import json
import pickle
import re

import numpy as np
import pytest

from longlive_jax.data import sidecars
from longlive_jax.data.sidecars.importers import FORMATS, Options, Recording
from longlive_jax.errors import InputError
from longlive_jax.files.arrays import load_npy


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes | str):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, content)))
    else:
        path.write_text(json.dumps(content))
    return path


def read(name, path, **options):
    return FORMATS[name].read(path, Options(**options))


def held(actions):
    return [{k for k, x in zip(actions.keys, row) if x} for row in actions.keyboard]


# GameFactory.


def gamefactory(*entries):
    return {"biome": "plains", "actions": {str(i): entry for i, entry in enumerate(entries)}}


def test_gamefactory(tmp_path):
    """Deltas are 15 degrees, down is positive there; entry 0 means nothing; walls blank the keys."""
    entries = [
        {"ws": 1, "ad": 1, "scs": 1, "pitch_delta": 1.0, "yaw_delta": 1.0, "yaw": 0, "pitch": 0},
        {"ws": 1, "ad": 2, "scs": 3, "pitch_delta": 0.1, "yaw_delta": -0.2, "yaw": -3},
        {"ws": 2, "ad": 0, "scs": 1, "pitch_delta": 0, "yaw_delta": 0.4, "yaw": 3},
        {"ws": 1, "ad": 1, "scs": 2, "yaw": 3, "detection": True},
    ]
    path = write(tmp_path / "data/metadata/seed_1_part_1.json", gamefactory(*entries))
    write(tmp_path / "data/video/seed_1_part_1.mp4", b"")
    write(tmp_path / "data/annotation.csv", "")
    found = FORMATS["gamefactory"].find(tmp_path)
    assert found == [Recording(path, tmp_path / "data/video/seed_1_part_1.mp4")]
    actions = read("gamefactory", path)
    assert held(actions) == [
        set(), {"KeyW", "KeyD", "ControlLeft"}, {"KeyS", "Space"}, {"ShiftLeft"},
    ]  # fmt: skip
    np.testing.assert_allclose(actions.mouse, [[0, 0], [-1.5, -3], [0, 6], [0, 0]], atol=1e-6)
    assert (actions.fps, actions.view, actions.pad) == (16, "first", 11)  # the angles say so
    for entry, yaw in zip(entries, (0, 0, -3, 3)):
        entry["yaw"] = yaw
    assert read("gamefactory", write(path, gamefactory(*entries))).pad == 12
    keyboard = write(tmp_path / "one.json", gamefactory({"ws": 0}, {"ws": 1}))
    actions = read("gamefactory", keyboard, fps=20.0)
    assert actions.pad == 12 and actions.fps == 20 and not actions.mouse.any()


# VPT.


def row(dx=0, dy=0, buttons=(), keys=(), **fields):
    mouse = {"dx": dx, "dy": dy, "buttons": list(buttons), "newButtons": fields.pop("new", [])}
    return {
        "mouse": mouse | {"x": 1.0, "scaledX": 0.0, "dwheel": 0.0},
        "keyboard": {"keys": [f"key.keyboard.{key}" for key in keys], "newKeys": [], "chars": ""},
        "isGuiOpen": False, "tick": 3,
    } | fields  # fmt: skip


def test_vpt(tmp_path):
    rows = [
        row(dx=20, dy=-8, buttons=[0], new=[0], keys=["w"]),  # the button is stuck
        row(buttons=[0, 1], keys=["w", "left.shift", "5"], dy=3.5),
        row(dx=9, buttons=[0], keys=["e"], isGuiOpen=True),
        row(buttons=[0], new=[0], keys=["space", "keypad.7", "right.control"]),
        row(buttons=[0, 2], keys=["up", "grave.accent", "f5", "left.bracket"]),
    ]
    path = write(tmp_path / "a/b-1.jsonl", rows)
    write(tmp_path / "a/b-1.actions.jsonl", "")
    write(tmp_path / "a/.c.jsonl", "")
    assert FORMATS["vpt"].find(tmp_path) == [Recording(path)]
    actions = read("vpt", path)
    assert held(actions) == [
        {"KeyW"}, {"KeyW", "ShiftLeft", "Digit5", "Mouse2"}, set(),
        {"Space", "Numpad7", "ControlRight", "Mouse0"},
        {"ArrowUp", "Backquote", "F5", "BracketLeft", "Mouse0", "Mouse1"},
    ]  # fmt: skip
    np.testing.assert_allclose(actions.mouse[:3], [[1.2, 3], [-0.525, 0], [0, 0]], atol=1e-6)
    assert (actions.fps, actions.pad) == (20, 12)
    rows = [row(dx=dx, yaw=yaw) for dx, yaw in ((0, 179), (20, -178), (-40, 176))]
    assert read("vpt", write(path, rows)).pad == 11  # also through the angle of 180


# MIND.


def angles(pitch, yaw):
    return {"x": 0.0, "y": pitch, "z": yaw}


@pytest.mark.parametrize("edition", [1, 2])
def test_mind(tmp_path, edition):
    """In both editions: which values mean forward, and what a missing field is."""
    rows = [
        {"ws": 0, "actor_rpy": angles(0, 179)},
        {"ad": 1, "lr": 1, "actor_rpy": angles(2, -179)},
        {"ws": 1, "ad": 0, "actor_rpy": angles(1.5, -170)},
        {"actor_rpy": angles(1.5, -170)},
    ]
    for i, fields in enumerate(rows):
        if edition == 2:
            fields |= {name: fields.get(name, -1) + 1 for name in ("ws", "ad", "ud", "lr")}
        fields["time"] = i
    content = {"mark_time": 1, "total_time": 4, "caption": "a road", "data": rows}
    path = write(tmp_path / "3rd_data/train/walk/action.json", content)
    video = write(path.with_name("video.mp4"), b"")
    assert FORMATS["mind"].find(tmp_path) == [Recording(path, video)]
    actions = read("mind", path)
    assert held(actions) == [{"KeyW"}, {"KeyD"}, {"KeyS", "KeyA"}, set()]
    np.testing.assert_allclose(actions.mouse, [[2, 2], [-0.5, 9], [0, 0], [0, 0]])
    assert (actions.fps, actions.view, actions.pad) == (24, "third", 12)
    for i, fields in enumerate(rows):  # the camera is what turns the picture
        fields["camera_rpy"] = angles(0, 3 * i)
    np.testing.assert_allclose(read("mind", write(path, content)).mouse[:3], [[0, 3]] * 3)
    first = write(tmp_path / "1st_data/x/action.json", content)
    assert read("mind", first).view == "first" and read("mind", first, view="third").view == "third"


# ABot-World and FastVideo.


def test_abot(tmp_path):
    frames = [
        {"keys": {"W": True, "A": False, "I": False}, "frame_id": 1},
        {"keys": {"W": True, "J": True}, "frame_id": 2},
    ]
    path = write(tmp_path / "walk/action.json", {"total_frames": 2, "fps": 16, "frames": frames})
    video = write(tmp_path / "walk/out.mp4", b"")
    assert FORMATS["abot"].find(tmp_path / "walk") == [Recording(path, video)]
    actions = read("abot", path, fps=16.0)
    assert held(actions) == [{"KeyW"}, {"KeyW", "KeyJ"}] and actions.fps == 16


def test_fastvideo(tmp_path):
    keyboard, mouse = np.eye(4)[:3], np.full((3, 2), [0.1, -0.2])
    path = write(tmp_path / "a.npz", {"keyboard": keyboard, "mouse": mouse, "more": keyboard})
    actions = read("fastvideo", path, fps=25.0)
    assert actions.keys == ("KeyW", "KeyS", "KeyA", "KeyD") and actions.fps == 25
    np.testing.assert_allclose(actions.mouse, [[1.5, -3]] * 3, atol=1e-6)
    path = write(tmp_path / "b.npy", np.eye(7, dtype=bool))
    names = ("KeyQ", "KeyW", "KeyS", "ArrowLeft", "ArrowRight", "KeyA", "KeyD")
    actions = read("fastvideo", path, fps=25.0, keys=names)
    assert held(actions) == [{name} for name in names] and not actions.mouse.any()
    found = FORMATS["fastvideo"].find(tmp_path)
    assert [one.actions.name for one in found] == ["a.npz", "b.npy"]


def test_our_own(tmp_path):
    video = write(tmp_path / "walk.mp4", b"")
    sidecars.write(tmp_path / "walk.actions.jsonl", sidecars.parse("w*4, yaw+1*2"))
    (found,) = FORMATS["canonical"].find(tmp_path)
    assert found == Recording(tmp_path / "walk.actions.jsonl", video)
    assert len(read("canonical", found.actions)) == 6


# What is refused.


class Evil:
    def __reduce__(self):
        return (print, ("it ran",))


BAD = {
    "gamefactory": [
        ({"actions": []}, "actions is a list without items|actions is a list, not an object"),
        ({"actions": {}}, "there is no picture in it"),
        (gamefactory({"ws": 3}), "action 0 has ws=3; it must be 0 to 2"),
        (gamefactory({"scs": 0.5}), "action 0 has scs=0.5; it must be 0 to 3"),
        ({"actions": {"0": {}, "2": {}}}, "2 actions, and '1' is not among them"),
        (gamefactory({}, {"detection": [3, 1]}), "detection is a list, not"),
        (gamefactory({}, {"yaw_delta": "1"}), "yaw_delta is '1', not a number"),
        ('{"actions": {"0": {}, "1": {"yaw_delta": NaN}}}', "mouse is nan in picture 1"),
        ("[", "is not JSON"),
    ],
    "mind": [
        ({"data": []}, "there is no picture in it"),
        ({"data": [{"ws": 0}], "total_time": 2}, "1 rows of data, total_time is 2"),
        ({"data": [{"ws": 2}]}, r"data\[0\].ws is 2; it must be 0 to 1"),
        ({"data": [dict.fromkeys(("ws", "ad", "ud", "lr"), 3)]}, "ws is 3; it must be 0 to 2"),
        ({"data": [{"actor_rpy": angles(0, 0)}, {}]}, r"data\[1\] has no actor_rpy, as others"),
        ({"data": [{"actor_rpy": [0, 0, 0]}]}, "actor_rpy is a list, not an object"),
    ],
    "abot": [
        ({"frames": [], "fps": 16}, "there is no picture in it"),
        ({"frames": [{"keys": {}}]}, "nothing says how many pictures a second it has"),
        ({"frames": [{"keys": {}}], "fps": 0}, "fps=0"),
        ({"frames": [{"keys": {"W": 1}}], "fps": 1}, "W is 1, not true or false"),
        ({"frames": [{"keys": {"Jump": True}}], "fps": 1}, r"frames\[0\] has key 'Jump', which"),
        ({"frames": [{"keys": {}}], "fps": 1, "total_frames": 2}, "1 frames, total_frames is 2"),
        ({"frames": [{"keys": {}, "frame_id": 0}, {"keys": {}, "frame_id": 2}], "fps": 1},
         r"frames\[1\] is frame 2, after 0; they must follow each other"),
    ],
    "vpt": [
        ([{}], r"\[0\] has no 'mouse'; it is no recording of VPT"),
        ([], "there is no picture in it"),
        ("{", "cannot be read: .*; one object a line"),
        ([row(buttons=[9])], "picture 0 has button 9; known are 0 to 4"),
        ([row(), row(keys=["jump"])], "picture 1 has key 'key.keyboard.jump', which has no W3C"),
        ([row(dx=1e308), row(dy=float("nan"))], "mouse is nan in picture 1"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"), [(name, *case) for name in BAD for case in BAD[name]]
)
def test_damaged_recordings_are_refused_by_name(tmp_path, name, content, message):
    path = write(tmp_path / ("r.jsonl" if name == "vpt" else "r.json"), content)
    with pytest.raises(InputError, match=f"{re.escape(str(path))}.*({message})"):
        read(name, path)


def test_pickles_are_refused_and_nothing_runs(tmp_path, capsys):
    path = tmp_path / "evil.npy"
    np.save(path, np.asarray({"keyboard": Evil()}, object), allow_pickle=True)
    with pytest.raises(InputError, match=r"evil.npy: holds pickled objects.*np\.savez\('NEW.npz'"):
        read("fastvideo", path, fps=25.0)
    with pytest.raises(InputError, match=r"not a .npy file of an array"):
        read("fastvideo", write(tmp_path / "p.npy", pickle.dumps(Evil())), fps=25.0)
    assert "it ran" not in capsys.readouterr().out


def test_arrays_that_do_not_fit_are_refused(tmp_path):
    for name, content, options, message in (
        ("a.npy", np.zeros((3, 4)), {}, "nothing says how many pictures a second"),
        ("b.npy", np.zeros((3, 7)), {"fps": 25.0}, "7 columns, and 0 keys are known.*--keys"),
        ("c.npy", np.zeros(3), {"fps": 25.0}, r"keyboard is float64\[3\]"),
        ("d.npz", {"mouse": np.zeros((3, 2))}, {"fps": 25.0}, "'keyboard' is missing"),
        ("e.npz", {"keyboard": np.zeros((3, 4)), "mouse": np.zeros((2, 2))}, {"fps": 25.0},
         "3 rows of keyboard, 2 rows of mouse"),
        ("f.parquet", b"PAR1", {"fps": 25.0}, "only .npz and .npy are read"),
        ("g.npz", {"keyboard": np.zeros((3, 4)), "mouse": np.full((3, 2), "a")}, {"fps": 25.0},
         "mouse is <U1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            read("fastvideo", write(tmp_path / name, content), **options)
    whole = write(tmp_path / "h.npy", np.zeros((30, 4))).read_bytes()
    for name, data, message in (
        ("i.npy", whole[:-8], r"cannot be read: it declares 960 bytes, \(30, 4\)"),
        ("j.npy", whole.replace(b"(30, 4), ", b"(30**9,4),"), "cannot be read"),
        ("k.npy", b"", "it is empty"),
    ):
        with pytest.raises(InputError, match=f"{name}: .*{message}"):
            load_npy(write(tmp_path / name, data))
    with pytest.raises(InputError, match=r"none.npy: no such file"):
        load_npy(tmp_path / "none.npy")


def test_folders_without_recordings_are_named(tmp_path):
    for name, module in FORMATS.items():
        with pytest.raises(InputError, match=r"no recording of this format in it.*--format"):
            module.find(tmp_path)
        with pytest.raises(InputError, match=f"none-{name}: no such file or folder"):
            module.find(tmp_path / f"none-{name}")
