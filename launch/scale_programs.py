"""Programs of docs/scale.md, compiled for slices of TPUs, and what is kept of that."""

import dataclasses
import datetime
import importlib.metadata
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from configs import sample_5b, train_ar_5b
from longlive_jax import collectives, topology
from longlive_jax import config as config_lib
from longlive_jax.errors import InputError
from longlive_jax.files import versioned
from longlive_jax.sampling import programs as programs_lib
from longlive_jax.training.objectives.teacher_forcing import MODEL, TeacherForcing
from longlive_jax.training.step import Step

STEP = "step"  # of training; other programs have the sampler's names
_FORM, _VERSION = "longlive_jax.scale", 1
_SCHEMA = {
    "programs": [
        {
            "name": str, "topology": str, "mesh": [int], "batch": int, "remat": str,
            "arguments": int, "temporaries": int, "refused": str, "collectives": {str: [int]},
            "seconds": float, "cpu_seconds": float, "jax": str, "libtpu": str, "date": str,
        }
    ]
}  # fmt: skip
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Program:
    """A program, by the sampler's name or STEP, for a slice like v5p:2x2x4."""

    name: str
    topology: str
    mesh: config_lib.Mesh
    remat: str = ""

    @property
    def key(self) -> str:
        return f"{self.name}@{self.topology}"

    @property
    def batch(self) -> int:
        """The smallest."""
        return self.mesh.data * self.mesh.fsdp

    @property
    def cfg(self) -> config_lib.Config:
        file = train_ar_5b if self.name == STEP else sample_5b
        cfg = config_lib.from_config_dict(file.get_config())
        if self.name != STEP:
            return dataclasses.replace(cfg, mesh=self.mesh)
        train = dataclasses.replace(cfg.train, batch_size=self.batch, remat=self.remat)
        return dataclasses.replace(cfg, mesh=self.mesh, train=train)


@dataclasses.dataclass(frozen=True)
class Record:
    """What the compiler said of a program. Bytes are of one chip.

    refused: its message where the program does not fit; temporaries are then what it asked for, in
      all, less the arguments. collectives: [times, bytes sent] by "kind over axes", of the jaxpr.
    cpu_seconds: of all threads. date: of the compilation.
    """

    name: str
    topology: str
    mesh: list[int]
    batch: int
    remat: str
    arguments: int
    temporaries: int
    refused: str
    collectives: dict[str, list[int]]
    seconds: float
    cpu_seconds: float
    jax: str
    libtpu: str
    date: str

    @property
    def key(self) -> str:
        return f"{self.name}@{self.topology}"

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]


PROGRAMS = {
    program.key: program
    for program in (
        Program(STEP, "v5p:2x2x4", config_lib.Mesh(data=2, fsdp=2, seq=4), remat="block"),
        Program(STEP, "v6e:8x8", config_lib.Mesh(fsdp=16, seq=4), remat="block"),
        Program("chunk_step", "v6e:2x4", config_lib.Mesh(seq=8)),
        Program("decode 2", "v6e:2x4", config_lib.Mesh(seq=8)),
        Program("chunk_step", "v5e:4x4", config_lib.Mesh(data=2, seq=8)),
    )
}


def compile_one(program: Program) -> Record:
    """Compiles for TPUs that are not here; minutes, for the 5B model.

    Raises:
      InputError: there is no libtpu.
    """
    mesh = topology.mesh(program.mesh, program.topology)
    start, cpu = time.monotonic(), time.process_time()
    traced = _trace(program, mesh)
    lowered, refused = traced.lower(), ""
    try:
        memory = lowered.compile().memory_analysis()
        assert memory is not None
        arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        refused = str(error)
        if "RESOURCE_EXHAUSTED" not in refused:
            raise
        arguments, temporaries = asked(refused)
    sent = collectives.traffic(traced.jaxpr, mesh.shape)
    return Record(
        program.name, program.topology, list(mesh.devices.shape), program.batch, program.remat,
        arguments, temporaries, refused.partition("\n")[0][:200],
        {f"{k.name} over {'+'.join(k.axes)}": list(v) for k, v in sent.items()},
        round(time.monotonic() - start, 1), round(time.process_time() - cpu, 1),
        jax.__version__, importlib.metadata.version("libtpu"), str(datetime.date.today()),
    )  # fmt: skip


def _trace(program, mesh):
    if program.name == STEP:
        return Step(TeacherForcing(program.cfg, mesh)).trace((MODEL,))
    return programs_lib.programs(program.cfg, mesh, mesh, program.batch)[program.name]()


def asked(message: str) -> tuple[int, int]:
    """Arguments and the rest, in bytes, of the compiler's message that a program does not fit."""

    def size(words):
        found = re.search(words + r"\D*?([\d.]+)([KMG])", message)
        return round(float(found[1]) * _UNITS[found[2]]) if found else 0

    total, arguments = size(r"Used "), size(r"arguments")
    return arguments, max(0, total - arguments)


def read(file: str | pathlib.Path) -> dict[str, Record]:
    """The records of a file that `write` made, by key.

    Raises:
      InputError: it is damaged, or of another version.
    """
    content = versioned.read(
        pathlib.Path(file), _FORM, _VERSION, "make it again, with --compile=all", schema=_SCHEMA
    )
    fields = [field.name for field in dataclasses.fields(Record)]
    records = [Record(**{name: one[name] for name in fields}) for one in content["programs"]]
    return {record.key: record for record in records}


def write(file: str | pathlib.Path, records: Mapping[str, Record]) -> None:
    """Writes records, in the order of `PROGRAMS`."""
    kept: list[dict[str, Any]] = [dataclasses.asdict(records[k]) for k in PROGRAMS if k in records]
    versioned.write(pathlib.Path(file), _FORM, _VERSION, {"programs": kept})


def chosen(names: str) -> list[Program]:
    """The programs of a comma-separated list of keys, or of "all".

    Raises:
      InputError: one is unknown.
    """
    keys = list(PROGRAMS) if names == "all" else [n for n in names.split(",") if n]
    for key in keys:
        if key not in PROGRAMS:
            raise InputError(f"--compile={key}: must be all, or some of {', '.join(PROGRAMS)}")
    return [PROGRAMS[key] for key in keys]
