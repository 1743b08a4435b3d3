"""What a server counts, in the form that Prometheus reads."""

import pathlib
import time

import jax
import prometheus_client as prometheus

CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST
_SECONDS = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1, 1.33, 2, 3, 5, 10, 30)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        registry = self.registry = prometheus.CollectorRegistry()
        self.streams = prometheus.Gauge(
            "longlive_streams", "Streams by their state", ["state"], registry=registry
        )
        self.viewers = prometheus.Gauge("longlive_viewers", "Open WebSockets", registry=registry)
        self.ended = prometheus.Counter(
            "longlive_streams_ended", "Streams that ended, by reason", ["reason"], registry=registry
        )
        self.first_frame = prometheus.Histogram(
            "longlive_first_frame_seconds", "From a stream's request to its first picture",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.chunk = prometheus.Histogram(
            "longlive_chunk_seconds", "Time that a chunk takes", registry=registry,
            buckets=_SECONDS,
        )  # fmt: skip
        self.action = prometheus.Histogram(
            "longlive_action_to_picture_seconds", "From a message to the first picture it shaped",
            registry=registry, buckets=_SECONDS,
        )  # fmt: skip
        self.chunks = prometheus.Counter("longlive_chunks", "Chunks made", registry=registry)
        self.in_time = prometheus.Counter(
            "longlive_chunks_in_time", "Chunks made in less time than they play", registry=registry
        )
        self.underruns = prometheus.Counter(
            "longlive_underruns", "Chunks that came after the one before had played",
            registry=registry,
        )  # fmt: skip
        self.pictures = prometheus.Counter(
            "longlive_pictures", "Pictures encoded", registry=registry
        )
        self.refused = prometheus.Counter(
            "longlive_refused", "Requests and messages refused, by status", ["status"],
            registry=registry,
        )  # fmt: skip
        self.memory = prometheus.Gauge(
            "longlive_memory_bytes", "Of the device; of the process where it tells none",
            registry=registry,
        )  # fmt: skip
        self.started = time.time()

    def text(self) -> bytes:
        self.memory.set(memory())
        return prometheus.generate_latest(self.registry)


def memory() -> int:
    """Bytes in use on the first device, or by this process where the device does not tell."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if used := stats.get("bytes_in_use"):
        return used
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
