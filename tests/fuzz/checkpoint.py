"""Our own files: checkpoints, cached datasets, the folder of a run."""

import dataclasses
import functools
import json
import pathlib
import random

import jax
import numpy as np

from longlive_jax import params as params_lib
from longlive_jax.checkpoints import store, workdir
from longlive_jax.checkpoints.store import checksums
from longlive_jax.data import records
from longlive_jax.data.progress import Progress
from longlive_jax.files import arrays as arrays_lib
from longlive_jax.training import metrics
from tests.fuzz import mutate
from tests.fuzz.kind import Kind

SPEC = {
    "blocks": {
        "weight": params_lib.ParamSpec((2, 4, 8), ("layer", None, None)),
        "bias": params_lib.ParamSpec((2, 8), ("layer", None)),
    },
    "table": {"weight": params_lib.ParamSpec((6, 8), (None, None))},
}


def _pieces(number):
    draw = np.random.default_rng(number)
    for i in range(2):
        for name, shape in (("weight", (1, 4, 8)), ("bias", (1, 8))):
            yield store.Piece(("blocks", name), i, draw.normal(size=shape).astype(np.float32))
    yield store.Piece(("table", "weight"), 0, draw.normal(size=(6, 8)).astype(np.float32))


def _checkpoint_seeds(folder):
    store.save(folder / "ckpt", "net", _pieces(0), SPEC)
    store.save(folder / "old", "net", _pieces(1), SPEC)  # of before there were checksums
    _without_checksums(folder / "old")
    return [folder / "ckpt", folder / "old"]


def _edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def _without_checksums(root):
    _edit(root / "net/index.json", lambda index: index.pop("checksums", None))
    _edit(root / "metadata.json", lambda m: m["parts"]["net"].pop("index_checksum", None))


def _read_checkpoint(path):
    store.parts(path)
    tree = params_lib.flatten(store.load(path, "net", SPEC))
    return {"/".join(p): (str(a.dtype), np.asarray(a).tobytes()) for p, a in tree.items()}


def _resealed(draw: random.Random, root: pathlib.Path) -> None:
    """Changes a file, and writes the checksums of what it is now: an attack, and no damage."""
    files = sorted(p for p in (root / "net").rglob("*") if p.is_file())
    texts = [p for p in files if p.read_bytes()[:1] == b"{"]
    file = draw.choice(draw.choice((files, texts)))
    data = file.read_bytes()
    by_json = file in texts and draw.random() < 0.7
    new = mutate.mutated_json(draw, data) if by_json else mutate.mutated(draw, data, [data])
    file.write_bytes(new)
    seal(root, file.name == "index.json")


def seal(root: pathlib.Path, index_changed: bool) -> None:
    """Writes the checksums of a checkpoint's files, as they are, where it has checksums."""
    index = root / "net/index.json"
    if not index_changed:
        content = json.loads(index.read_text())
        if "checksums" not in content:
            return
        for group in content["checksums"]:
            content["checksums"][group] = checksums.of_folder(root / "net" / group)
        index.write_text(json.dumps(content))
    seal_index(root)


def seal_index(root: pathlib.Path) -> None:
    def change(content):
        if "index_checksum" in content["parts"]["net"]:
            content["parts"]["net"]["index_checksum"] = checksums.of_file(root / "net/index.json")

    _edit(root / "metadata.json", change)


def _moved(draw: random.Random, root: pathlib.Path) -> None:
    """A file or folder is missing, empty, another one's copy, or a folder in place of a file."""
    files = sorted(p for p in root.rglob("*") if p.is_file())
    file, other = draw.choice(files), draw.choice(files)
    content = other.read_bytes()
    file.unlink()
    match draw.randrange(4):
        case 0:
            file.write_bytes(b"")
        case 1:
            file.write_bytes(content)
        case 2:
            file.mkdir()


# Cached datasets.


@functools.cache
def _records_config():
    from tests.data.test_records import ACTED, CONFIG

    return dataclasses.replace(CONFIG, model=ACTED)


def _records_seeds(folder):
    from tests.data.test_records import make

    make(folder / "cached", acted=True)
    return [folder / "cached"]


def _read_records(path):
    source = records.Records(path, _records_config())
    found = []
    for i in range(len(source)):
        s = source.sample(i, 0)
        arrays = np.asarray(s.latents).tobytes(), np.asarray(s.actions).tobytes()
        found.append((s.name, s.prompts, s.chunks, *arrays, str(s.text)))
    return found


def _repacked(draw: random.Random, root: pathlib.Path) -> None:
    """Records of other content with right checksums, in files of the right sizes."""
    manifest = json.loads((root / "manifest.json").read_text())
    kind = draw.choice(("latents", "text", "actions"))
    entry = draw.choice([e for e in manifest[kind] if e["count"]])
    shards = records.Shards(root, [records.Shard(**entry)])
    packed = []
    which = draw.randrange(len(shards))
    for i in range(len(shards)):
        fields, array = shards.read(i)
        if i != which:
            packed.append(records.pack(fields, array))
            continue
        text = mutate.mutated_json(draw, json.dumps(fields).encode())
        body = text + array.tobytes()[: draw.choice((None, None, -1, 8, 0))]
        crc = records.zlib.crc32(body)
        packed.append(records._HEAD.pack(records._MAGIC, crc, len(text)) + body)
    entry |= vars(records.write_shard(root / entry["file"], packed))
    (root / "manifest.json").write_text(json.dumps(manifest))


def _progress_seeds(folder):
    """A folder that is being encoded."""
    place = folder / "unfinished"
    with Progress(place, {"settings": {"train.seed": 0}, "clips_per_file": 2}) as progress:
        shard = {"file": "latents-00000.arrayrecord", "count": 1, "bytes": 9}
        (place / shard["file"]).write_bytes(b"x" * 9)
        line = {"kind": "latents", "read": [["one", [["a.mp4", "why"]]]], "prompts": ["a cat"]}
        progress.add(line | {"chunks": [1], "shard": shard})
    return [place]


def _read_progress(path):
    from launch import encode_dataset

    with Progress(path, {"settings": {"train.seed": 0}, "clips_per_file": 2}) as progress:
        done = encode_dataset._lines(progress, "latents")
        records.Shards(path, encode_dataset._shards(done))
        encode_dataset._prompts(progress)
        [(name, *map(str, failures)) for line in done for name, failures in line["read"]]


def _json_lines(draw: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")[:-1]
    if draw.random() < 0.3:
        lines = mutate.mutated_chunks(draw, lines)
    elif lines:
        i = draw.randrange(len(lines))
        lines[i] = mutate.mutated_json(draw, lines[i])
    return b"\n".join(lines) + b"\n"


# The folder of a run.


def _run_seeds(folder):
    run = folder / "run"
    state = {"networks": {"net": {"params": {"dit": {"w": np.ones((2, 3), np.float32)}}}}}
    from orbax.checkpoint import v1 as ocp

    run.mkdir()
    ocp.save(run / workdir.STATES / "2", state)
    settings = {"model.num_heads": 2, "train.steps": 2}
    workdir.write(run, workdir.Run(settings, "somewhere", "net"))
    lines = [{"step": i, "loss": 0.5, "samples": ["é"]} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return [run]


def _read_run(path):
    metrics.cut(path / "metrics.jsonl", 1)
    workdir.parts(path)
    state = workdir.State(path)
    spec = {"w": params_lib.ParamSpec((2, 3), (None, None))}
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "seq"),
                         (jax.sharding.AxisType.Explicit,) * 3)  # fmt: skip
    state.load("dit", spec, mesh, np.float32, {None: None}, "latest")


# Named arrays.


def _npz_seeds(folder):
    draw = np.random.default_rng(0)
    noise = draw.standard_normal((1, 2, 4, 2, 4)).astype(np.float32)
    arrays_lib.save_npz(folder / "noise.npz", noise=noise, init=noise[:, :1])
    ctx = draw.standard_normal((2, 3, 8)).astype(np.float32)
    arrays_lib.save_npz(folder / "text.npz", ctx=ctx, neg=ctx[:1], cut=np.array([False, True]))
    video = np.zeros((1, 3, 5, 16, 16), np.float32)
    np.savez_compressed(folder / "video.npz", video=video)
    return [folder / name for name in ("noise.npz", "text.npz", "video.npz")]


def _read_npz(path):
    from longlive_jax.prompts import embeddings, pictures
    from longlive_jax.sampling import batches
    from tests.fuzz.weights import CONFIG

    loaded = arrays_lib.load_npz(path)
    match path.name:
        case "noise.npz":
            batches.read_noise(path, CONFIG.model)
        case "text.npz":
            given = arrays_lib.load_npz(path, required=("ctx",))
            embeddings.from_embeddings(given, CONFIG, None)
        case "video.npz":
            pictures.ArrayClip(path)
    return {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in loaded.items()}


def _session_seeds(folder):
    from longlive_jax.sampling import saved

    leaves = {"state/0": np.arange(6, dtype=np.float32).reshape(2, 3), "noise": np.zeros(3)}
    saved.write(folder / "stream.session", {"start": {"seed": 1}, "script": []}, leaves)
    return [folder / "stream.session"]


def _read_session(path):
    from longlive_jax.sampling import saved

    facts, leaves = saved.read(path)
    like = {"state": [np.zeros((2, 3), np.float32)]}
    saved.tree(path, like, "", {k: v for k, v in leaves.items() if k != "noise"})
    return str(facts)


def _some(draw, data):
    return mutate.mutated(draw, data, [data])


def _session_head(draw, data):
    """The session's facts: JSON inside an array."""
    at = data.index(b'{"')
    return data[:at] + mutate.mutated_json(draw, data[at:])


def _kinds():
    from tests.fuzz.weights import members, repacked

    zipped = (repacked(".npy", _some), members)
    json_files = ((".json", mutate.mutated_json),)
    return (
        Kind("checkpoint", _checkpoint_seeds, _read_checkpoint, share=3, short=30,
             inner=json_files, outer=(_resealed, _resealed, _moved), silent=True),
        Kind("records", _records_seeds, _read_records, share=2, short=20,
             inner=json_files, outer=(_repacked, _moved), silent=True),
        Kind("progress", _progress_seeds, _read_progress, short=8, outer=(_moved,),
             inner=((".jsonl", _json_lines),)),
        Kind("run", _run_seeds, _read_run, short=8, outer=(_moved,),
             inner=(*json_files, (".jsonl", _json_lines), ("_METADATA", mutate.mutated_json))),
        Kind("npz", _npz_seeds, _read_npz, share=2, short=16,
             inner=tuple((".npz", change) for change in zipped), silent=True),
        Kind("session", _session_seeds, _read_session, short=6,
             inner=tuple((".session", c) for c in (*zipped, repacked("session.npy", _session_head)))),
    )  # fmt: skip


KINDS = _kinds()
