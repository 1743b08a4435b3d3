"""Compiles all programs of a sampler, without weights, into JAX's compilation cache.

    python -m launch.compile --config=configs/sample_5b.py --cache=DIR
    python -m launch.sample --config=configs/sample_5b.py --compile_cache=DIR ...

Run it with the settings, `--batch` and `--vae_device` of the sampler. A second run compiles what is
missing, damaged or of another machine or version, and nothing else. See docs/compile.md.

    python -m launch.compile --config=configs/sample_5b.py --config.mesh.seq=8 --topology=v6e:2x4

compiles for a slice of TPUs that is not here, keeps nothing, and prints what a chip would hold and
send.
"""

import concurrent.futures
import os
import threading
import time

import jax
from absl import flags

from launch import command, compile_cache
from longlive_jax import collectives
from longlive_jax import topology as topology_lib
from longlive_jax.errors import InputError
from longlive_jax.pipeline import vae_mesh
from longlive_jax.sampling import programs as programs_lib

FLAGS = flags.FLAGS
flags.DEFINE_string("cache", None, "Folder for the programs; a JAX_COMPILATION_CACHE_DIR.")
flags.DEFINE_string("topology", None, "Compile for these TPUs, like v6e:2x4; needs libtpu.")
flags.DEFINE_string("only", "", "With --topology: the programs whose name begins so.")
flags.DEFINE_integer("batch", 1, "Videos denoised together.", lower_bound=1)
flags.DEFINE_integer("vae_device", None, "Index of a device that is the VAE's alone.")


def main() -> None:
    start = time.monotonic()
    cfg = command.config()
    if not FLAGS.cache and not FLAGS.topology:
        raise InputError(
            "--cache is missing; give the folder for the compiled programs, or --topology for the "
            "TPUs to compile for"
        )
    if FLAGS.cache and FLAGS.topology:
        raise InputError(
            f"--cache={FLAGS.cache}: keeps the programs of this machine, and "
            f"--topology={FLAGS.topology} compiles for another; give one of them"
        )
    mesh = topology_lib.mesh(cfg.mesh, FLAGS.topology)
    replicas = cfg.mesh.data * cfg.mesh.fsdp
    if FLAGS.batch % replicas:
        raise InputError(
            f"--batch={FLAGS.batch}: must be a multiple of mesh data x fsdp = {replicas}; change "
            "it or the mesh"
        )
    vae = mesh if FLAGS.topology else vae_mesh(mesh, FLAGS.vae_device)
    programs = programs_lib.programs(cfg, mesh, vae, FLAGS.batch)
    if FLAGS.topology:
        _for_topology(programs, mesh)
    else:
        _into_cache(cfg, programs, start)


def _for_topology(programs, mesh):
    del programs["noise"]  # of no mesh: it is compiled for this machine
    some = {name: p for name, p in programs.items() if name.startswith(FLAGS.only)}
    if not some:
        raise InputError(f"--only={FLAGS.only}: begins none of {', '.join(programs)}")
    for name, _, record, jaxpr in _compile(some):
        _show(name, False, record)
        for line in collectives.lines(jaxpr, mesh):
            print(f"  {line}", flush=True)


def _into_cache(cfg, programs, start):
    for line in compile_cache.renew(FLAGS.cache):
        print(f"stale: {line}", flush=True)
    manifest = compile_cache.Manifest.read(FLAGS.cache)
    compile_cache.point_jax_at(FLAGS.cache)
    # What is here must be found, however little time it takes.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    run = compile_cache.run_id(cfg, FLAGS.batch, FLAGS.vae_device)
    before = manifest.runs.get(run, {"programs": {}})["programs"]
    records, compiled = {}, 0
    for name, hit, record, _ in _compile(programs):
        records[name] = before.get(name, record) if hit else record
        compiled += not hit
        _show(name, hit, record)
    manifest.runs[run] = {
        "source": compile_cache.source(),
        "programs": {name: records[name] for name in programs},
    }
    manifest.write(FLAGS.cache)
    what = f"{compiled} compiled, {len(records) - compiled} found" if compiled else "up to date"
    print(f"{len(records)} programs: {what}, {time.monotonic() - start:.1f} s: {FLAGS.cache}")


def _compile(programs):
    """Yields (name, whether the cache had it, its record, its jaxpr) as each is done.

    XLA compiles outside of Python's lock, so threads use all cores; on a GPU it still measures
    one algorithm at a time.
    """
    here = threading.local()

    def listen(event, **_):  # called in the thread that compiles
        if event == "/jax/compilation_cache/cache_hits":
            here.hit = True

    def one(trace):
        start = time.monotonic()
        traced = trace()
        lowered = traced.lower()
        here.hit = False
        memory = lowered.compile().memory_analysis()
        record = {"seconds": round(time.monotonic() - start, 2)}
        if memory is not None:
            record |= {
                "argument_bytes": memory.argument_size_in_bytes,
                "output_bytes": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
            }
        return here.hit, record, traced.jaxpr

    jax.monitoring.register_event_listener(listen)
    with concurrent.futures.ThreadPoolExecutor(min(len(programs), os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(one, trace): name for name, trace in programs.items()}
        for job in concurrent.futures.as_completed(jobs):
            yield jobs[job], *job.result()


def _show(name, hit, record):
    sizes = (
        f"{key.removesuffix('_bytes')} {value / 2**30:.3g}"
        for key, value in record.items()
        if key.endswith("_bytes")
    )
    what = "found" if hit else "compiled"
    print(f"  {name:<30} {what:<8} {record['seconds']:7.1f} s  GiB: {', '.join(sizes)}", flush=True)


if __name__ == "__main__":
    command.run(main)
