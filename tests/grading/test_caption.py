import itertools

import pytest

from longlive_jax.data.worlds import shapes
from longlive_jax.errors import InputError
from longlive_jax.grading.caption import Thing, parse

SHOTS = list(itertools.chain(*shapes.clips(3, 150), *shapes.clips(4, 100, held_out=True)))


def test_a_caption_says_what_its_shot_shows():
    for shot in SHOTS:
        asked = parse(shot.caption)
        assert asked.background == shot.background
        assert asked.things == tuple(Thing(o.shape, o.colour, o.motion) for o in shot.objects)


def test_case_and_white_space_do_not_matter():
    asked = parse("  over a BLACK background,  a red circle goes round and round. ")
    assert asked.things == (Thing("circle", "red", "orbit"),)


@pytest.mark.parametrize(
    "text",
    [
        "a boat on a lake", "", "A red circle over a black background.",
        "A red circle moves left over a pink background.",
        "A red circle moves left and a blue star spins and a pink ring falls over a black background.",
        "A red circle moves left over a black background. And more.",
    ],
)  # fmt: skip
def test_others_are_refused_by_name(text):
    with pytest.raises(InputError, match="is not of the world of shapes") as error:
        parse(text)
    assert text[:20] in str(error.value)
