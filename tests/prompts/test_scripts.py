"""A stream's script as a file of shots."""

import json

import pytest

from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.prompts import scripts, shots
from longlive_jax.sampling.chunk import Direction

CUT = "The scene transitions. "


def read(path, **options):
    options = dict(chunks=4, chunk_frames=8, scene_cut_prefix=CUT) | options
    (video,) = shots.read(path, **options)
    return video


def test_a_script_is_read_as_what_was_directed(tmp_path):
    no, yes = (False,), (True,)
    directions = [
        Direction(0, ("a",), no),
        Direction(2, (CUT + "b",), yes),
        Direction(3, ("b",), no),
        Direction(5, ("c",), no, True),
        Direction(6, ("c",), no, False, ("d",), (0.5,)),
        Direction(7, ("d",), no),
    ]
    script = scripts.make(config_lib.Config(), directions, 9, seed=4)
    path = tmp_path / "s.json"
    path.write_text(json.dumps(script))
    video = read(path)
    rows = [(c.prompt, c.cut, c.recaches(True), c.toward, c.weight) for c in video.chunks]
    plain = [("a", False)] * 2 + [(CUT + "b", True), ("b", False), ("b", False)]
    assert rows == [
        *((*row, False, "", 0) for row in plain),
        ("c", False, True, "", 0),
        ("c", False, False, "d", 0.5),
        *[("d", False, False, "", 0)] * 2,
    ]
    assert video.script is not None and video.script["seed"] == 4
    assert video.script["settings"]["sample.steps"] == 4


@pytest.mark.parametrize("entry", [{"toward": "b"}, {"weight": 0.5}, {"toward": "b", "weight": 2}])
def test_a_blend_needs_both(entry):
    with pytest.raises(InputError, match='a blend needs "toward", a prompt, and "weight"'):
        read([{"prompt": "a"} | entry])
