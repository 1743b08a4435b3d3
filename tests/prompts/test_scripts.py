"""A stream's script as a file of shots."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


@st.composite
def directions(draw):
    """Of up to six chunks; every one is said, so that what lasts is what is the same twice."""
    made, chunks = [], draw(st.integers(1, 6))
    for chunk in range(chunks):
        cut = chunk > 0 and draw(st.booleans())
        prompt = (CUT if cut else "") + draw(st.sampled_from("ab"))
        steps = draw(st.sampled_from([None, 1, 2]))
        guidance = draw(st.sampled_from([(), (2.0,), (3.5,)]))
        made.append(
            Direction(chunk, (prompt,), (cut,), False, (), (), steps=steps, guidance=guidance)
        )
    return made, chunks


@given(directions())
def test_steps_and_guidance_are_those_of_each_chunk(made):
    made, chunks = made
    cfg = config_lib.Config()
    script = scripts.make(cfg, made, chunks, seed=0)
    (video,) = shots.read(script["shots"], chunks=4, chunk_frames=8, scene_cut_prefix=CUT)
    assert [(c.prompt, c.cut, c.steps, c.guidance) for c in video.chunks] == [
        (d.prompts[0], d.cut[0], d.steps, d.guidance[0] if d.guidance else None) for d in made
    ]


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"steps": 0}, '"steps": 0 must be 1 to 1000'),
        ({"steps": 2.5}, "must be a whole number"),
        ({"steps": True}, "must be a whole number"),
        ({"guidance": "3"}, "must be a number"),
        ({"guidance": float("nan")}, '"guidance": nan must be 1000 or less'),
        ({"guidance": 10**400}, "must be 1000 or less"),
    ],
)
def test_bad_steps_and_guidance(entry, words):
    with pytest.raises(InputError, match=words):
        read([{"prompt": "a"} | entry])


@pytest.mark.parametrize("entry", [{"toward": "b"}, {"weight": 0.5}, {"toward": "b", "weight": 2}])
def test_a_blend_needs_both(entry):
    with pytest.raises(InputError, match='a blend needs "toward", a prompt, and "weight"'):
        read([{"prompt": "a"} | entry])
