"""Accelerators as their makers describe them: what a roofline divides by."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Link:
    """A network between devices. rate: bytes/s that one device sends, while it receives as much."""

    name: str
    rate: float


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator and its surroundings.

    Attributes:
      peak: dense bfloat16 FLOP/s.
      memory: bytes of its own memory. bandwidth: of it, bytes/s.
      inner: between the devices of one domain: a host with NVLink, or a slice of TPUs.
      outer: between domains.
      domain: the most devices of a domain.
      host: devices of a host.
      attention_products: matrix products of attention's backward kernels, where its gradient has 4:
        each kernel makes the logits again.
      sources: of the figures, addresses.
    """

    name: str
    peak: float
    memory: float
    bandwidth: float
    inner: Link
    outer: Link
    domain: int
    host: int
    attention_products: int
    sources: tuple[str, ...]


# The compiler for TPUs counts their memory in GiB, of which it leaves a program 95 to 98 %.
# Of the links of a TPU two are counted: a ring along one axis of the torus, both ways. A data
# sheet's "bidirectional" rate is of all ports and both directions: 1,200 GB/s of six on a v5p.
_V5P_PORT, _V6E_PORT, _V5E_PORT = 1200e9 / 6 / 2, 800e9 / 4 / 2, 400e9 / 4 / 2

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "H200", peak=989e12, memory=141e9, bandwidth=4.8e12,
            inner=Link("NVLink", 900e9 / 2), outer=Link("InfiniBand", 400e9 / 8),
            domain=8, host=8, attention_products=5,
            sources=(
                "https://www.nvidia.com/en-us/data-center/h200/",
                "https://github.com/mlcommons/inference_results_v4.1/blob/main/closed/NVIDIA/"
                "systems/H200-SXM-141GBx8_TRT_MaxQ.json",
            ),
        ),
        Chip(
            "v5p", peak=459e12, memory=95 * 2**30, bandwidth=2765e9,
            inner=Link("ICI", 2 * _V5P_PORT), outer=Link("DCN", 50e9 / 8),
            domain=6144, host=4, attention_products=7,
            sources=("https://docs.cloud.google.com/tpu/docs/v5p",),
        ),
        Chip(
            "v6e", peak=918e12, memory=32 * 2**30, bandwidth=1600e9,
            inner=Link("ICI", 2 * _V6E_PORT), outer=Link("DCN", 25.6e12 / 256 / 8),
            domain=256, host=4, attention_products=7,
            sources=("https://docs.cloud.google.com/tpu/docs/v6e",),
        ),
        Chip(
            "v5e", peak=197e12, memory=16 * 2**30, bandwidth=800e9,
            inner=Link("ICI", 2 * _V5E_PORT), outer=Link("DCN", 6.4e12 / 256 / 8),
            domain=256, host=4, attention_products=7,
            sources=("https://docs.cloud.google.com/tpu/docs/v5e",),
        ),
    )
}  # fmt: skip
