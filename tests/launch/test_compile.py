"""launch.compile: what launch.sample runs is there before it starts; what is stale is renewed."""

import functools
import json
import pathlib
import shutil

import jax
import pytest

from launch import compile_cache
from longlive_jax import config as config_lib
from longlive_jax import mesh as mesh_lib
from longlive_jax.data.video import VideoWriter
from longlive_jax.data.video_reader import read_video
from longlive_jax.errors import InputError
from longlive_jax.sampling import programs
from tests.launch.commands import PROMPTS, ROOT, TINY, run, tiny_config, write

# Of videos from a first frame.
PICTURED = [*TINY, "--config.video.image_to_video=True", "--config.sample.steps=1"]
PROGRAMS = {
    "chunk_step after a first frame", "denoise_chunk after a first frame",
    "commit_chunk after a first frame", "decode first", "decode 1", "encode first", "text 8x32",
    "text 1x32", "init_state", "noise",
}  # fmt: skip


def keep_all(directory):
    """In a command's process: no program is too small for the cache that the command chooses."""
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def files(folder):
    return {file.name for file in folder.glob("*-cache")}


def names(entries):
    """The functions that cache entries are programs of."""
    return {entry.rsplit("-", 2)[0] for entry in entries}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder that launch.compile filled; what it printed is in `printed`."""
    folder = tmp_path_factory.mktemp("compiled") / "cache"
    done = run("compile", *PICTURED, f"--cache={folder}")
    (folder / "printed").write_text(done.stdout)
    return folder


def test_every_program_is_in_the_manifest(cache):
    manifest = json.loads((cache / "manifest.json").read_text())
    (one,) = manifest["runs"].values()
    assert set(one["programs"]) == PROGRAMS
    assert all(record["seconds"] > 0 for record in one["programs"].values())
    assert all("temp_bytes" in record for record in one["programs"].values())
    assert set(manifest["entries"]) == files(cache)
    assert len(manifest["entries"]) == len(PROGRAMS)
    assert manifest["machine"]["jax"] == jax.__version__
    lines = (cache / "printed").read_text().splitlines()
    assert len(lines) == len(PROGRAMS) + 1
    assert lines[-1].startswith(f"{len(PROGRAMS)} programs: {len(PROGRAMS)} compiled, 0 found, ")


def check_nothing_is_compiled(cache, checkpoint, tmp_path, *args, devices=1):
    """launch.sample with a copy of the cache, where whatever it compiles shows as a new file."""
    own = tmp_path / "copy"
    shutil.copytree(cache, own)
    done = run(
        "sample", f"--checkpoint={checkpoint}", *args, f"--compile_cache={own}",
        f"--prompts={write(tmp_path / 'one.txt', PROMPTS[0])}", f"--output={tmp_path}/out.mp4",
        patch=functools.partial(keep_all, tmp_path / "other"), devices=devices,
    )  # fmt: skip
    assert "warning" not in done.stderr
    new = files(own) - files(cache)
    assert new  # small programs around ours; the cache was in use
    assert not names(new) & names(files(cache))
    assert not files(tmp_path / "other")


def test_the_sampler_compiles_nothing_of_it(cache, checkpoint, tmp_path):
    photo = ROOT / "assets/photo.jpg"
    check_nothing_is_compiled(cache, checkpoint, tmp_path, *PICTURED, f"--image={photo}")


@pytest.mark.slow
def test_a_continued_video_on_a_mesh_compiles_nothing_of_it(checkpoint, tmp_path):
    settings = [*TINY, "--config.mesh.seq=2", "--config.sample.recache=True"]
    run("compile", *settings, f"--cache={tmp_path}/cache", devices=2)
    with VideoWriter(tmp_path / "clip.mp4", 32, 64) as writer:
        writer.write(read_video(ROOT / "assets/clip.mp4", 32, 64)[:29])
    check_nothing_is_compiled(
        tmp_path / "cache", checkpoint, tmp_path, *settings,
        f"--continue_from={tmp_path}/clip.mp4", devices=2,
    )  # fmt: skip


TEXT = {f"text {batch}x{tokens}" for batch in (1, 8) for tokens in (32, 64, 128, 256, 512)}
STEPS = {"chunk_step", "denoise_chunk", "commit_chunk"}
ALWAYS = {"decode first", "encode first", "init_state", "noise"} | TEXT


@pytest.mark.parametrize(
    "sample, more",
    [
        (
            {},
            "decode 2,decode 1,encode 2,encode 1",
        ),
        (
            dict(vae_latents_per_call=3),
            "decode 3,decode 1,encode 3,encode 2,encode 1",
        ),
        (
            dict(recache=True, vae_latents_per_call=8),
            "recache after a first frame,decode 7,decode 1",
        ),
    ],
)
def test_programs_of_the_5b(sample, more):
    video = config_lib.Video(image_to_video="recache" in more)
    cfg = config_lib.Config(video=video, sample=config_lib.Sample(**sample))
    mesh = mesh_lib.make_mesh(cfg.mesh)
    after = {f"{name} after a first frame" for name in STEPS}
    steps = after if video.image_to_video else after | STEPS
    assert set(programs.programs(cfg, mesh, mesh, 1)) == ALWAYS | steps | set(more.split(","))


def test_programs_of_a_decoder_alone():
    cfg = config_lib.Config(vae=config_lib.VAE(kind="taehv", dec_dim=64))
    mesh = mesh_lib.make_mesh(cfg.mesh)
    expected = ALWAYS - {"encode first"} | STEPS | {"decode 2", "decode 1"}
    assert set(programs.programs(cfg, mesh, mesh, 1)) == expected


def test_a_damaged_entry_alone_is_compiled_anew(cache, tmp_path):
    own = tmp_path / "cache"
    shutil.copytree(cache, own)
    (entry,) = own.glob("jit_noise-*-cache")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1])
    done = run("compile", *PICTURED, "--config.sample.chunks=7", f"--cache={own}")
    assert f"stale: {entry.name} was missing or damaged" in done.stdout
    assert f"{len(PROGRAMS)} programs: 1 compiled, {len(PROGRAMS) - 1} found, " in done.stdout
    assert files(own) == files(cache)
    first, second = (json.loads((f / "manifest.json").read_text()) for f in (cache, own))
    (one,), (two,) = (m["runs"].values() for m in (first, second))
    assert len(first["runs"] | second["runs"]) == 1  # the number of chunks is no program's matter
    changed = {n for n in PROGRAMS if one["programs"][n] != two["programs"][n]}
    assert changed <= {"noise"}


# The manifest, on its own.


@pytest.fixture
def made(tmp_path):
    """A cache with one entry, its manifest written here and now."""
    (tmp_path / "jit_f-00-cache").write_bytes(b"program")
    cfg = tiny_config()
    one = {"source": compile_cache.source(), "programs": {}}
    runs = {compile_cache.run_id(cfg, 1, None): one}
    compile_cache.Manifest(compile_cache.machine(), runs).write(tmp_path)
    return tmp_path


@pytest.fixture
def directory():
    """Reads JAX's cache folder; puts it back after the test."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def alter(folder: pathlib.Path, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_driver(manifest):
    manifest["machine"] |= {"driver": "550.1", "nvidia-cudnn": "9.9"}


def test_a_fitting_cache_is_used_without_a_word(made, directory, capsys):
    compile_cache.use(made, tiny_config(), 1, None)
    assert directory() == str(made)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        (other_driver, "driver is absent, was 550.1; nvidia-cudnn is absent, was 9.9"),
        (lambda m: m["entries"].update({"jit_f-00-cache": "0"}), "jit_f-00-cache missing or damaged"),
        (lambda m: m["entries"].update({"jit_g-00-cache": "0"}), "jit_g-00-cache missing or damaged"),
    ],
)  # fmt: skip
def test_a_stale_cache_is_not_used(made, directory, capsys, change, message):
    before = directory()
    alter(made, change)
    compile_cache.use(made, tiny_config(), 1, None)
    assert directory() == before
    error = capsys.readouterr().err
    assert f"not used: {message}; renew it with python -m launch.compile" in error


def test_other_settings_and_other_source_are_said(made, directory, capsys):
    compile_cache.use(made, tiny_config(), 2, None)
    assert "made for other settings, --batch or --vae_device" in capsys.readouterr().err
    alter(made, lambda m: next(iter(m["runs"].values())).update(source="older"))
    compile_cache.use(made, tiny_config(), 1, None)
    assert "made by another version of the source" in capsys.readouterr().err
    assert directory() == str(made)


def test_renewing_drops_what_another_machine_made(made):
    alter(made, other_driver)
    (made / "xla_gpu_per_fusion_autotune_cache_dir").mkdir()
    (made / "mine.txt").write_text("kept")
    assert compile_cache.renew(made) == [
        "driver is absent, was 550.1", "nvidia-cudnn is absent, was 9.9", "all is compiled anew",
    ]  # fmt: skip
    manifest = compile_cache.Manifest.read(made)
    assert manifest.machine == compile_cache.machine()
    assert not manifest.runs and not manifest.entries
    assert {f.name for f in made.iterdir()} == {"manifest.json", "mine.txt"}


def test_renewing_keeps_what_is_whole_and_known(made):
    assert not compile_cache.renew(made)
    (made / "jit_g-00-cache").write_bytes(b"of an interrupted run, or of another program")
    assert compile_cache.renew(made) == ["jit_g-00-cache was not in the manifest"]
    manifest = compile_cache.Manifest.read(made)
    assert len(manifest.runs) == 1
    assert set(manifest.entries) == files(made) == {"jit_f-00-cache"}


def test_programs_of_unknown_origin_are_refused(made):
    (made / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"has 1 compiled programs and no manifest.json that says"):
        compile_cache.renew(made)


def test_settings_that_change_programs_change_the_run():
    def run_id(batch=1, vae_device=None, **settings):
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        cfg = config_lib.with_overrides(config_lib.Config(), settings)
        return compile_cache.run_id(cfg, batch, vae_device)

    base, texts = run_id(), dict(sample__negative_prompt="x", sample__scene_cut_prefix="y")
    assert run_id(sample__chunks=9, **texts) == base
    others = (
        run_id(2), run_id(vae_device=0), run_id(sample__steps=2), run_id(video__width=128),
        run_id(quant__recipe="fp8"), run_id(quant__kv="fp8"), run_id(quant__all_to_all="nvfp4"),
    )  # fmt: skip
    assert len({base, *others}) == 8


@pytest.mark.parametrize("text", ["{", "[]", '{"machine": {}, "more": 1}', '{"machine": 1}'])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=r"manifest.json: is not a manifest .*launch.compile"):
        compile_cache.renew(tmp_path)


def test_bad_flags_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for flags, message in (
        ([], "--cache is missing"),
        ([f"--cache={tmp_path}/file/x"], "cannot be written"),
        ([f"--cache={tmp_path}", "--vae_device=3"], "--vae_device=3: must be 0 to 0"),
    ):
        done = run("compile", *TINY, *flags, check=False)
        assert done.code == 2 and message in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(InputError, match=r"no manifest.json in it; make it with python -m launch"):
        compile_cache.use(str(tmp_path), tiny_config(), 1, None)
