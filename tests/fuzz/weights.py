"""Weights of others: safetensors, the torch formats of since and before 1.6, LoRAs, 4/6 files."""

import functools
import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from longlive_jax import config as config_lib
from longlive_jax.checkpoints import from_torch, layout, safetensors, sources
from longlive_jax.models import dit, umt5
from tests.checkpoints import torch_file
from tests.fuzz import mutate
from tests.fuzz.kind import Kind, Mutation

CONFIG = config_lib.Config(
    model=config_lib.Model(
        dim=16, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=8,
        freq_dim=8, chunk_frames=2,
    ),
    umt5=config_lib.UMT5(
        vocab_size=16, dim=8, dim_attn=8, dim_ffn=8, num_heads=2, num_layers=1, num_buckets=4
    ),
    vae=config_lib.VAE(dim=8, dec_dim=8, z_dim=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4),
    video=config_lib.Video(height=32, width=64),
    sample=config_lib.Sample(window_frames=8, sink_frames=2),
    dtype="float32",
)  # fmt: skip


@functools.cache
def tensors(part: str) -> dict[str, np.ndarray]:
    """The original's keys and shapes, with random values."""
    draw = np.random.default_rng(0)
    spec = {"dit": dit.spec(CONFIG.model), "umt5": umt5.spec(CONFIG.umt5)}[part]
    shapes = layout.torch_shapes(spec)
    return {k: draw.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def _write(file, arrays, metadata=None):
    kinds = {k: (a.shape, a.dtype) for k, a in arrays.items()}
    safetensors.write(file, kinds, arrays.items(), metadata)
    return file


def _values(content) -> list[bytes]:
    """All tensors of a file's content, with their names."""
    found, waiting = [], [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(f"{name}/{k!r:.200}", v) for k, v in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(f"{name}/{i}", v) for i, v in enumerate(value)]
        elif hasattr(value, "read"):
            array = value.read()
            found.append(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sorted(found)


def _read(path):
    values = _values(sources.read(str(path)))
    pieces = from_torch.open_part("umt5", str(path), CONFIG).pieces()
    return values, [(p.path, p.start, p.array.tobytes()) for p in pieces]


# Safetensors.


def _header(change):
    """A change of the header, with its length."""

    def mutation(draw: random.Random, data: bytes) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        new = change(draw, data[8 : 8 + size].rstrip())
        return struct.pack("<Q", len(new)) + new + data[8 + size :]

    return mutation


def _safetensors_seeds(folder):
    arrays = tensors("umt5")
    half = {k: a.astype(ml_dtypes.bfloat16) for k, a in arrays.items()}
    return [
        _write(folder / "umt5.safetensors", arrays, {"format": "pt"}),
        _write(folder / "half.safetensors", half),
    ]


def _folder_seeds(folder):
    arrays, place = tensors("umt5"), folder / "text_encoder"
    place.mkdir()
    keys = sorted(arrays)
    where = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        file = f"model-{i + 1:05d}-of-00002.safetensors"
        _write(place / file, {k: arrays[k] for k in part})
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 4}, "weight_map": where}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    return [place]


# torch.save.


def repacked(name: str, change) -> Mutation:
    """A change of a zip archive's member, with its lengths and CRC."""

    def mutation(draw: random.Random, data: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for info in old.infolist():
                content = old.read(info)
                changed = change(draw, content) if info.filename.endswith(name) else content
                new.writestr(zipfile.ZipInfo(info.filename), changed)
        return out.getvalue()

    return mutation


def members(draw: random.Random, data: bytes) -> bytes:
    """Members of a zip archive left out, twice or under each other's names."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        for name, source in zip(mutate.mutated_chunks(draw, names), names):
            new.writestr(zipfile.ZipInfo(name), old.read(source))
    return out.getvalue()


def _some(draw, data):
    return mutate.mutated(draw, data, [data])


def _opcodes(draw: random.Random, program: bytes) -> bytes:
    """A pickle with opcodes of any kind in it."""
    at = draw.randrange(len(program))
    new = b"".join(draw.choice(_PIECES) for _ in range(draw.randint(1, 4)))
    new *= draw.choice((1, 1, 1, 50, 5000))
    return program[:at] + new + program[at + draw.choice((0, 0, len(new))) :]


_PIECES = [
    *(bytes([i]) for i in b"012()[]}{aubdeltsQPR.N\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x81\x92"),
    b"h\x00", b"q\x00", b"j\xff\xff\xff\xff", b"r\xff\xff\xff\x7f", b"K\x01", b"M\xff\xff",
    b"J\xff\xff\xff\x7f", b"\x8a\x09" + b"\xff" * 8 + b"\x7f", b"X\x01\x00\x00\x00a",
    b"G\x7f\xf0\x00\x00\x00\x00\x00\x00", b"cos\nsystem\n", b"ctorch\nSize\n", b"I9\n", b"L9L\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ccollections\nOrderedDict\n", b"\x8c\x01a",
    b"c__builtin__\nset\n", b"ctorch\nfloat8_e5m2\n", b"ctorch\ndevice\n", b"\x95" + b"\xff" * 8,
]  # fmt: skip


def _torch_seeds(folder):
    arrays = dict(tensors("umt5"))
    storage = np.arange(64, dtype=np.float32)
    extra = {"step": 7, "betas": (0.9, 0.999), "tied": torch_file.Strided(storage, (4, 4), (1, 8))}
    torch_file.save(folder / "umt5.pth", arrays)
    torch_file.save(folder / "run.pt", {"model": arrays, "extra": extra})
    return [folder / "umt5.pth", folder / "run.pt"]


def save_legacy(file, arrays) -> None:
    """Writes as torch.save did before 1.6; checked against fixtures/legacy.pt by its reader."""
    items, storages = [], []
    for name, a in arrays.items():
        key, kind = str(len(storages)), torch_file.STORAGES[a.dtype]
        strides = [s // a.itemsize for s in a.strides]
        storages.append((key, a))
        items.append(
            torch_file._scalar(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
            + torch_file._scalar("storage") + f"ctorch\n{kind}\n".encode()
            + torch_file._scalar(key) + torch_file._scalar("cpu") + torch_file._scalar(a.size)
            + b"NtQ" + torch_file._scalar(0) + torch_file._ints(a.shape)
            + torch_file._ints(strides) + b"\x89ccollections\nOrderedDict\n)RtR"
        )  # fmt: skip
    machine = {"protocol_version": 1001, "little_endian": True,
               "type_sizes": {"short": 2, "int": 4, "long": 4}}  # fmt: skip
    program = b"\x80\x02ccollections\nOrderedDict\n)R(" + b"".join(items) + b"u."
    pickles = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, machine)]
    pickles += [program, pickle.dumps([key for key, _ in storages], 2)]
    body = b"".join(struct.pack("<q", a.size) + a.tobytes() for _, a in storages)
    file.write_bytes(b"".join(pickles) + body)


def _legacy_seeds(folder):
    save_legacy(folder / "legacy.pt", tensors("umt5"))
    return [folder / "legacy.pt"]


def _legacy_opcodes(draw, data):
    """Opcodes among the pickles, which come before the storages."""
    end = data.index(b"cpu", 400) if b"cpu" in data[400:] else len(data)
    return _opcodes(draw, data[: 2 * end]) + data[2 * end :]


# LoRAs.


@functools.cache
def _base(file):
    return from_torch.sources.read(file)


def _lora_seeds(folder):
    draw = np.random.default_rng(1)
    peft, kohya = {}, {}
    for module in ("blocks.0.self_attn.q", "blocks.0.ffn.0"):
        rows, columns = tensors("dit")[f"{module}.weight"].shape
        a = draw.standard_normal((2, columns)).astype(np.float32)
        b = draw.standard_normal((rows, 2)).astype(np.float32)
        peft |= {f"diffusion_model.{module}.lora_A.weight": a}
        peft |= {f"diffusion_model.{module}.lora_B.weight": b}
        name = f"lora_unet_{module.replace('.', '_')}"
        kohya |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        kohya |= {f"{name}.alpha": np.float32(4).reshape(())}
    kohya["diffusion_model.blocks.0.ffn.0.diff_b"] = np.ones(32, np.float32)
    settings = {"transformer.r": 2, "lora_alpha": 8, "use_rslora": False,
                "alpha_pattern": {"ffn.0": 4}}  # fmt: skip
    torch_file.save(folder / "lora.pt", {"generator_lora": peft, "lora_alpha": 4})
    return [
        _write(folder / "peft.safetensors", peft, {"lora_adapter_metadata": json.dumps(settings)}),
        _write(folder / "kohya.safetensors", kohya, {"ss_network_alpha": "4"}),
        folder / "lora.pt",
    ]


def _read_lora(path):
    base = path.with_name("base.safetensors")
    _write(base, tensors("dit"))
    source = from_torch.open_part("dit", str(base), CONFIG, lora_source=str(path))
    for _ in source.pieces():
        pass


def _lora_header(draw, data):
    """The header's fields, of which some are JSON themselves."""
    header = json.loads(data)
    fields = header.setdefault("__metadata__", {})
    name = draw.choice((*fields, "lora_alpha", "alpha", "use_dora", "adapter_config"))
    try:
        inner = json.dumps(json.loads(fields.get(name, '"8"')))
    except ValueError:
        inner = '"8"'
    fields[name] = mutate.mutated_json(draw, inner.encode()).decode(errors="replace")
    return json.dumps(header).encode()


_LINEAR = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q",
           "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def _packed_seeds(folder):
    """A `model_4o6.pt`; see tests/checkpoints/test_quantized.py for the layout."""
    draw, found = np.random.default_rng(0), {}
    for key, t in tensors("dit").items():
        module = key.removesuffix(".weight")
        if key == module or not module.endswith(_LINEAR):
            found[f"model.{key}"] = t.astype(ml_dtypes.bfloat16)
            continue
        (n, k), rows, columns = t.shape, -(-t.shape[0] // 128) * 128, -(-t.shape[1] // 64) * 64
        values = np.zeros((rows, columns // 2), np.uint8)
        values[:n, : k // 2] = draw.integers(0, 256, (n, k // 2))
        arrays = {
            "values": values,
            "scale_factors": np.ones(rows * columns // 16, ml_dtypes.float8_e4m3fn),
            "amax": np.ones(1, np.float32),
            "metadata": np.array([n, k, rows, columns], np.int32),
        }
        found |= {f"model.{module}.quantized_weight_{name}": a for name, a in arrays.items()}
    content = {
        "generator": found,
        "checkpoint_format": "longlive_generator_nvfp4",
        "checkpoint_version": 1,
        "quantization": {"format": "nvfp4", "scale_rule": "static_4", "weight_scale_rule": "mse"},
    }
    torch_file.save(folder / "model_4o6.pt", content)
    return [folder / "model_4o6.pt"]


def _read_packed(path):
    for _ in from_torch.open_part("dit", str(path), CONFIG).pieces():
        pass


_PICKLE = (
    (".p", repacked("data.pkl", _some)), (".p", repacked("data.pkl", _opcodes)), (".p", members),
)  # fmt: skip
_TORCH = tuple((end, change) for end in (".pt", ".pth") for _, change in _PICKLE)
_SAFE = (
    (".safetensors", _header(mutate.mutated_json)), (".safetensors", _header(_some)),
)  # fmt: skip
_INDEX = (".index.json", mutate.mutated_json)

KINDS = (
    Kind("safetensors", _safetensors_seeds, _read, share=2, short=30, inner=_SAFE),
    Kind("safetensors-folder", _folder_seeds, _read, short=12, inner=(*_SAFE, _INDEX)),
    Kind("torch", _torch_seeds, _read, share=3, short=40, inner=_TORCH, silent=True),
    Kind("torch-old", _legacy_seeds, _read, short=20, inner=((".pt", _legacy_opcodes),)),
    Kind("lora", _lora_seeds, _read_lora, share=2, short=12,
         inner=(*_SAFE, (".safetensors", _header(_lora_header)), *_TORCH)),
    Kind("packed", _packed_seeds, _read_packed, short=4, inner=_TORCH),
)  # fmt: skip
