"""What Prometheus reads at /metrics: the engine's own counters, and what was observed of each choice.

Knows nothing of requests' content; one registry an app, so that two apps in a process do not add up.
Made by app.py, told by api/generation.py and api/audio.py, read by api/catalog.py.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from engine.sequence import SequenceOutput
from model_manager import GenerationRequest, ModelManager
from runtime.transcription import Finished, Recording, Segment, TranscriptionEvent

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

PREFIX = "transformers_openai:"
# Seconds, from one step of a small model on a GPU to a long prompt on a laptop.
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_BUCKETS = (*_STEP_BUCKETS, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)


class Metrics:
    """Everything counted; times are seconds, and every observation is of one choice (a sequence), or one recording.

    Only the event loop writes here.
    """

    def __init__(self, manager: ModelManager) -> None:
        self.num_prompt_tokens = 0
        self.num_generated_tokens = 0
        self.num_audio_seconds = 0.0
        self.num_audio_fallbacks = 0
        self.num_finished = {"stop": 0, "length": 0}
        self._first_token = _Histogram("time_to_first_token_seconds", "From arrival to the first token")
        self._inter_token = _Histogram("inter_token_latency_seconds", "Between two tokens", _STEP_BUCKETS)
        self._total = _Histogram("e2e_request_latency_seconds", "From arrival to the last token")
        self._queued = _Histogram("request_queue_time_seconds", "From arrival to the first step")
        self._prefill = _Histogram("request_prefill_time_seconds", "From the first step to the first token")
        self._decode = _Histogram("request_decode_time_seconds", "From the first token to the last")
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(manager, self))
        for histogram in (
            self._first_token, self._inter_token, self._total, self._queued, self._prefill, self._decode,
        ):  # fmt: skip
            self._registry.register(histogram)

    def on_first_output(self, request: GenerationRequest, output: SequenceOutput, now: float) -> None:
        """The first output of a choice has come."""
        self.num_prompt_tokens += len(request.input_token_ids)
        self.num_generated_tokens += len(output.token_ids)
        self._first_token.observe(now - request.arrival_time_s)

    def on_output(self, num_tokens: int, elapsed_s: float) -> None:
        """A later output of a choice has come, `elapsed_s` after the one before; slow readers get several tokens."""
        self.num_generated_tokens += num_tokens
        if num_tokens:
            self._inter_token.observe(elapsed_s / num_tokens, num_tokens)

    def on_finished(
        self, reason: str, arrival_s: float, scheduled_s: float | None, first_s: float | None, last_s: float
    ) -> None:
        """A choice has ended well; times are of time.monotonic()."""
        self.num_finished[reason] += 1
        self._total.observe(last_s - arrival_s)
        if first_s is None:
            return
        self._decode.observe(last_s - first_s)
        if scheduled_s is not None:
            self._queued.observe(max(0.0, scheduled_s - arrival_s))
            self._prefill.observe(max(0.0, first_s - scheduled_s))

    def on_transcribed(self, end: Finished, elapsed_s: float) -> None:
        """A recording has been transcribed to its end, `elapsed_s` after it had arrived."""
        self.num_audio_fallbacks += end.num_fallbacks
        self.num_generated_tokens += end.num_tokens
        self.num_finished["stop"] += 1
        self._total.observe(elapsed_s)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)


class RecordingTally:
    """Counts one recording while it is transcribed: an hour of audio must not turn up as one jump at its end.

    Args:
        metrics: of the app.
        arrival_s: time.monotonic() of its arrival.
    """

    def __init__(self, metrics: Metrics, arrival_s: float) -> None:
        self._metrics = metrics
        self._arrival_s = arrival_s
        self._heard_s = 0.0
        self.recording = Recording(0.0, None, 0)
        self.elapsed_s = 0.0

    def take(self, event: TranscriptionEvent) -> None:
        """The next event."""
        self.elapsed_s = time.monotonic() - self._arrival_s
        if isinstance(event, Recording):
            self.recording = event
        elif isinstance(event, Segment):
            self._hear(event.end_s)
        else:
            self._hear(self.recording.duration_s)
            self._metrics.on_transcribed(event, self.elapsed_s)

    def _hear(self, until_s: float) -> None:
        until_s = min(until_s, self.recording.duration_s)
        self._metrics.num_audio_seconds += max(0.0, until_s - self._heard_s)
        self._heard_s = max(self._heard_s, until_s)


class _Histogram(Collector):
    """A histogram that only the event loop writes to, and so needs none of the locks of prometheus-client's own."""

    def __init__(self, name: str, meaning: str, bounds: tuple[float, ...] = _REQUEST_BUCKETS) -> None:
        self._name = name
        self._meaning = meaning
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Adds `count` observations of a value."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        """The one family."""
        bounds = [*(repr(bound) for bound in self._bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(PREFIX + self._name, self._meaning, buckets=buckets, sum_value=self._sum)


class _EngineCollector(Collector):
    """Reads gauges and totals where they are kept, at the moment they are asked for."""

    def __init__(self, manager: ModelManager, metrics: Metrics) -> None:
        self._manager = manager
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        """The families that are not histograms of ours."""
        stats = self._manager.stats
        metrics = self._metrics
        for name, meaning, value in (
            ("num_requests_running", "Sequences in the engine's steps", stats.num_running),
            ("num_requests_waiting", "Sequences waiting for their first step", stats.num_waiting),
            ("num_compiled_batch_sizes", "Sizes of steps that are compiled", len(stats.compiled_batch_sizes)),
            (
                "num_compiled_encoder_batch_sizes",
                "Numbers of sources that a compiled encoder takes",
                len(stats.compiled_encoder_batch_sizes),
            ),
            ("num_graph_batch_sizes", "Sizes of steps that are CUDA graphs", len(stats.graph_batch_sizes)),
            ("kv_cache_usage_ratio", "Share of the KV budget that is allocated", stats.kv_cache_usage_ratio),
            ("num_audio_windows", "Windows of audio that are being written down", self._manager.num_audio_windows),
        ):
            yield GaugeMetricFamily(PREFIX + name, meaning, value)
        for name, meaning, value in (
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache", stats.prefix_cache_queries_total),
            ("prefix_cache_hits", "Prompt tokens found there", stats.prefix_cache_hits_total),
            ("num_preemptions", "Sequences put back to wait because memory was full", stats.preemptions_total),
            ("prompt_tokens", "Prompt tokens of sequences that were begun", metrics.num_prompt_tokens),
            ("generation_tokens", "Generated tokens", metrics.num_generated_tokens),
            ("audio_seconds", "Seconds of audio that were transcribed", metrics.num_audio_seconds),
            ("audio_fallbacks", "Windows tried again at a higher temperature", metrics.num_audio_fallbacks),
        ):
            yield CounterMetricFamily(PREFIX + name, meaning, value)
        finished = CounterMetricFamily(
            PREFIX + "request_success", "Choices and recordings that ended well", labels=["finished_reason"]
        )
        for reason, count in metrics.num_finished.items():
            finished.add_metric([reason], count)
        yield finished
        yield HistogramMetricFamily(
            PREFIX + "iteration_tokens_total",
            "Tokens computed in one step of the engine",
            buckets=[("+Inf", stats.steps_total)],
            sum_value=stats.step_tokens_total,
        )
