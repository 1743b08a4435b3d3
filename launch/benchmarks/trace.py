"""A jax.profiler trace, as milliseconds by kind of kernel."""

import pathlib
import re

from jax.profiler import ProfileData

# The first that fits counts. cuDNN's attention and cuBLAS's GEMMs name themselves; XLA's own
# kernels are named after their fusions.
KINDS = (
    ("collectives", r"nccl|all-?to-?all|all-?gather|reduce-?scatter|all-?reduce|SendRecv"),
    ("attention", r"fmha|flash|sdpa|attention|mha"),
    ("convolution", r"conv(?!ert)|fprop|dgrad|wgrad|implicit"),
    ("matrix_products", r"gemm|cublas|cutlass|nvjet|xmma|dot"),
    ("copies", r"memcpy|memset|copy|transpose|concatenate|slice|pad"),
    ("reductions", r"reduce|norm|softmax"),
    ("elementwise", r"."),
)


def shares(folder: str, top: int = 12) -> dict:
    """Milliseconds that device 0 spent on each kind, and the longest kernels of any kind.

    Kernels of different streams overlap, so the sum may be more than the wall time.
    """
    kinds = {f"{kind}_ms": 0.0 for kind, _ in KINDS}
    kernels: dict[str, float] = {}
    for name, milliseconds in _kernels(folder):
        kinds[f"{_kind(name)}_ms"] += milliseconds
        kernels[name] = kernels.get(name, 0.0) + milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:top]
    return {kind: round(ms, 1) for kind, ms in kinds.items()} | {
        "longest_kernels_ms": {name[:80]: round(ms, 1) for name, ms in longest}
    }


def _kind(name):
    return next(kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE))


def _kernels(folder):
    newest = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    for plane in ProfileData.from_file(str(newest)).planes:
        if plane.name != "/device:GPU:0":
            continue
        for line in plane.lines:
            if line.name.startswith("Stream"):
                for event in line.events:
                    yield event.name, event.duration_ns / 1e6
