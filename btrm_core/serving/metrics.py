"""What a server counts, for Prometheus. Each server has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 150)
TOKENS = (64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 262144)
REWARDS = (-20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5, 10, 20)


class Metrics:
    """The counters of one server; `text` is what `/metrics` answers."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("btrm_requests", "Requests answered.", ["route", "code"], registry=registry)
        self.seconds = Histogram(
            "btrm_request_seconds", "From a request's headers to its answer.", ["route"], buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.waited = Histogram("btrm_wait_seconds", "Time in the queue.", buckets=SECONDS, registry=registry)
        self.computed = Histogram("btrm_compute_seconds", "Time of a batch.", buckets=SECONDS, registry=registry)
        self.batch = Histogram("btrm_batch_tokens", "Tokens of a batch.", buckets=TOKENS, registry=registry)
        self.tokens = Counter("btrm_tokens", "Tokens of the conversations scored.", registry=registry)
        self.model_tokens = Counter(
            "btrm_model_tokens", "Tokens that went through the model: common beginnings once, padding counted.",
            registry=registry,
        )  # fmt: skip
        self.rewards = Histogram("btrm_reward", "Rewards given.", buckets=REWARDS, registry=registry)
        self.not_finite = Counter("btrm_rewards_not_finite", "Rewards that were NaN or infinite.", registry=registry)
        self.truncated = Counter("btrm_truncated", "Conversations whose beginning was cut.", registry=registry)
        self.unterminated = Counter(
            "btrm_unterminated", "Texts and ids that do not end in the token where training read the reward.",
            registry=registry,
        )  # fmt: skip
        self.refused = Counter("btrm_refused", "Requests refused, by reason.", ["reason"], registry=registry)
        self.failed = Counter("btrm_failed", "Conversations whose computation failed.", registry=registry)
        self.ready = Gauge("btrm_ready", "1 once the self-test passed.", registry=registry)
        self.model = Gauge("btrm_model_info", "The model.", ["id", "sha", "template_sha256"], registry=registry)
        self._queue = Gauge("btrm_queue_tokens", "Tokens that wait for the device.", registry=registry)

    def watch_queue(self, tokens: Callable[[], float]) -> None:
        """Read the length of the queue from `tokens` whenever somebody asks.

        Args:
            tokens: returns the tokens that wait; called from the thread that answers `/metrics`.
        """
        self._queue.set_function(tokens)

    def text(self) -> bytes:
        """All counters in Prometheus' text format."""
        return generate_latest(self.registry)
