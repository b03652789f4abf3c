"""A process that counts every metric of ours, and tells an engine's: `python -m tests.support.counted_metrics PORT`."""

from __future__ import annotations

import itertools
import signal
import sys
import threading
import time

from runtime.children import die_with_parent
from runtime.metrics import CATALOGUE, Metric, open_metrics, serve_metrics
from runtime.settings import MetricsSettings

EVERY_S = 0.1
LABELS = {
    "found": ("exact", "none"),
    "kind": ("prompt", "completion", "cached"),
    "outcome": ("succeeded", "failed", "ok"),
    "status": ("200", "500"),
}
# What is taken of the engines' own metrics, as they write it; a test holds the dashboard and the alerts to these names.
ENGINE_GAUGES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "llamacpp:requests_processing",
    "llamacpp:requests_deferred",
)
ENGINE_COUNTERS = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prefix_cache_queries_total",
    "llamacpp:tokens_predicted_total",
    "llamacpp:prompt_tokens_total",
)
ENGINE_HISTOGRAMS = (
    "vllm:time_to_first_token_seconds",
    "vllm:inter_token_latency_seconds",
    "vllm:request_queue_time_seconds",
)


def engine_text(count: int) -> str:
    """What an engine's /metrics would say after so many of everything."""
    lines = [f"# TYPE {name} gauge\n{name} 1" for name in ENGINE_GAUGES]
    lines += [f"# TYPE {name} counter\n{name} {count}" for name in ENGINE_COUNTERS]
    for name in ENGINE_HISTOGRAMS:
        lines.append(f"# TYPE {name} histogram")
        lines += [f'{name}_bucket{{le="{bound}"}} {count}' for bound in ("0.1", "1.0", "+Inf")]
        lines += [f"{name}_sum {count / 20}", f"{name}_count {count}"]
    return "\n".join(lines) + "\n"


def count(metric: Metric) -> None:
    """One more of a metric, for several values of its labels."""
    for values in itertools.product(*(LABELS.get(name, ("some",)) for name in metric.labels)):
        labels = dict(zip(metric.labels, values, strict=True))
        if metric.kind == "counter":
            metric.add(1, **labels)
        elif metric.kind == "histogram":
            metric.observe(0.2, **labels)
        else:
            metric.set(time.time() if metric.name.endswith("_timestamp_seconds") else 1, **labels)


def main() -> None:
    """Count until this process is ended."""
    die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = MetricsSettings(port=int(sys.argv[1]))
    folder = open_metrics(settings)
    assert folder is not None
    rounds = 0
    server = serve_metrics(settings, folder, foreign=lambda: engine_text(rounds))
    assert server is not None
    forever = threading.Event()
    try:
        while not forever.wait(EVERY_S):
            rounds += 1
            for metric in CATALOGUE:
                count(metric)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
