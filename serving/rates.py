"""Rates: how often each client may ask. Knows keys and a clock; knows no HTTP."""

import math
import time

from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from seqmodels.errors import SeqModelsError
from serving.auth import ApiKey


class RateError(SeqModelsError):
    """A client has asked too often. retry_after_s: when it may ask again."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Rates:
    """Counts the requests of each client in a sliding minute.

    Replicas do not speak with each other, so each allows its share: a client whose requests go to one replica alone,
    over a connection that it keeps, is held to that share.
    """

    def __init__(self, requests_per_minute: int | None, replicas: int) -> None:
        """requests_per_minute: of keys that have no number of their own; no bound where None."""
        self._requests_per_minute = requests_per_minute
        self._replicas = replicas
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def take(self, key: ApiKey) -> None:
        """Count one request. Raises RateError where it is one too many."""
        allowed = key.requests_per_minute or self._requests_per_minute
        if allowed is None:
            return
        share = RateLimitItemPerMinute(math.ceil(allowed / self._replicas))
        if self._limiter.hit(share, key.name):
            return
        wait_s = max(1, math.ceil(self._limiter.get_window_stats(share, key.name).reset_time - time.time()))
        message = f"this key may send {allowed} requests a minute; try again in {wait_s} s"
        raise RateError(message, wait_s)
