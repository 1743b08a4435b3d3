"""Settings: every bad one is refused with its value and the way out."""

import dataclasses

import pytest

from configs import sample_5b, tiny
from longlive_jax import config as lib
from longlive_jax.errors import InputError


@pytest.mark.parametrize("module", [tiny, sample_5b])
def test_config_files_build(module):
    config_dict = module.get_config()
    cfg = lib.from_config_dict(config_dict)
    assert lib.to_config_dict(cfg) == config_dict
    assert hash(cfg) == hash(lib.from_config_dict(config_dict))
    assert config_dict.is_locked


def test_5b_is_the_published_model():
    cfg = lib.from_config_dict(sample_5b.get_config())
    assert (cfg.model.dim, cfg.model.num_layers, cfg.model.head_dim) == (3072, 30, 128)
    assert cfg.video.height // 32 * (cfg.video.width // 32) * cfg.model.chunk_frames == 7040


def test_an_unknown_key_names_the_known_ones():
    config_dict = tiny.get_config().unlock()
    config_dict.model.dimm = 3
    with pytest.raises(
        InputError, match=r"config.model: unknown key 'dimm'; known keys: dim, ffn_dim"
    ):
        lib.from_config_dict(config_dict)


@pytest.mark.parametrize("value", ["3", 3.5, True, None])
def test_a_wrong_type_is_named(value):
    config_dict = tiny.get_config().unlock()
    config_dict.model = dict(config_dict.model.to_dict(), num_layers=value)
    with pytest.raises(InputError, match=r"config.model.num_layers=.* must be of type int"):
        lib.from_config_dict(config_dict)


def test_a_whole_number_is_a_float():
    config_dict = tiny.get_config().unlock()
    config_dict.sample = dict(config_dict.sample.to_dict(), guidance_scale=3)
    assert lib.from_config_dict(config_dict).sample.guidance_scale == 3.0


REFUSED = [
    ("model", dict(dim=65), r"model.dim=65 must be a multiple of model.num_heads=8; nearest: \[64, 72\]"),
    ("model", dict(num_heads=16), r"= 4 must be even and at least 6"),
    ("model", dict(freq_dim=31), r"freq_dim=31 must be even"),
    ("model", dict(out_dim=8), r"in_dim=4, model.out_dim=8 must be equal"),
    ("model", dict(num_layers=0), r"model.num_layers=0 must be at least 1"),
    ("vae", dict(z_dim=5), r"vae.latent_mean of 4 values needs .* vae.z_dim=5"),
    ("vae", dict(latent_std=(1.0, 1.0, 0.0, 1.0)), r"latent_std=.* must be positive"),
    ("umt5", dict(num_heads=5), r"umt5.dim_attn=32 must be a multiple of umt5.num_heads=5"),
    ("umt5", dict(num_buckets=7), r"num_buckets=7 must be even"),
    ("mesh", dict(seq=3), r"model.num_heads=8 must be a multiple of mesh.seq=3"),
    ("mesh", dict(seq=0), r"mesh.seq=0 must be at least 1"),
    ("video", dict(height=72), r"video.height=72 must be a multiple of .*=32; nearest: \[64, 96\]"),
    ("sample", dict(steps=0), r"sample.steps=0 must be at least 1"),
    ("video", dict(shift=0.0), r"video.shift=0.0 must be above 0 and at most 1000; the published"),
    ("sample", dict(guidance_scale=float("nan")), r"guidance_scale=nan must be finite"),
    ("sample", dict(rope_offset=2.5), r"rope_offset=2.5 must be a whole number"),
    ("sample", dict(window_frames=30), r"window_frames=30 must be a multiple of .*=8; nearest: \[24, 32\]"),
    ("sample", dict(sink_frames=4), r"sink_frames=4 must be a multiple"),
    ("sample", dict(sink_frames=-8), r"sample.sink_frames=-8"),
    ("sample", dict(window_frames=24), r"window_frames=24 with sample.sink_frames=8 .* at least 32"),
    ("sample", dict(sink_frames=24), r"sample.sink_frames=24 .* at least 48"),
]  # fmt: skip


@pytest.mark.parametrize("section, change, message", REFUSED, ids=[str(r[1]) for r in REFUSED])
def test_what_cannot_work_is_refused(section, change, message):
    cfg = lib.from_config_dict(tiny.get_config())
    with pytest.raises(InputError, match=message):
        changed = dataclasses.replace(getattr(cfg, section), **change)
        dataclasses.replace(cfg, **{section: changed})


def test_dtype_is_one_of_two():
    with pytest.raises(
        InputError, match="config: dtype='float16' must be one of float32, bfloat16"
    ):
        lib.Config(dtype="float16")


FLOATS = [
    (section, name)
    for section, kind in lib.section.hints(lib.Config).items()
    if hasattr(kind, "NAME")
    for name, limits in lib.section.hints(kind).items()
    if lib.section.plain(limits) is float
]


@pytest.mark.parametrize("section, name", FLOATS, ids=map(".".join, FLOATS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_no_setting_is_nan_or_infinite(section, name, value):
    with pytest.raises(InputError, match=rf"{section}\.{name}=-?(nan|inf)"):
        type(getattr(lib.Config(), section))(**{name: value})


@pytest.mark.parametrize(
    "section, change",
    [
        (lib.Sample, dict(rope_offset=2.0**31)), (lib.Sample, dict(steps=2**31)),
        (lib.Model, dict(num_layers=1001)), (lib.UMT5, dict(num_layers=2**31 - 1)), (lib.Video, dict(width=2**20)),
        (lib.Train, dict(seed=2**31)), (lib.Video, dict(shift=1e30)),
        (lib.VAE, dict(latent_mean=(float("nan"),) * 48)), (lib.Train, dict(beta2=1.0)),
    ],
    ids=str,
)  # fmt: skip
def test_limits_of_arithmetic_are_limits_of_settings(section, change):
    (name,) = change
    with pytest.raises(InputError, match=rf"{section.NAME}\.{name}=.* must be "):
        section(**change)


def test_a_file_that_sets_a_moved_name_is_told_the_new_one():
    config_dict = tiny.get_config().unlock()
    config_dict.sample.height = 32
    with pytest.raises(InputError, match=r"unknown key 'height'; it is now config.video.height"):
        lib.from_config_dict(config_dict)


def test_load_config_reads_a_file_and_overrides_it(tmp_path):
    cfg = lib.load_config("configs/tiny.py", {"video.height": 32, "sample.width": 64})
    assert (cfg.video.height, cfg.video.width, cfg.model.dim) == (32, 64, 64)
    with pytest.raises(InputError, match=r"unknown key 'model.dimm'"):
        lib.load_config("configs/tiny.py", {"model.dimm": 32})
    for name, text in (("none.py", None), ("empty.py", "x = 1"), ("words.txt", "x")):
        file = tmp_path / name
        if text is not None:
            file.write_text(text)
        with pytest.raises(InputError, match=f"{name}: is no config file"):
            lib.load_config(file)
