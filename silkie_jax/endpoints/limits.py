"""Limits of an endpoint: requests and tokens a minute, concurrency, and what its replies say about all three."""

import asyncio
import re
import time
from collections import deque
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|h|m|s)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
LONGEST_WAIT = 120.0  # seconds; a server that asks for more is asked again after this long
FIRST_WAIT = 0.5  # seconds after the first error, doubled with each that follows


class Window:
    """At most `limit` units within any `period` seconds; None: no limit known."""

    def __init__(self, limit: int | None, period: float = 60.0):
        self.limit = limit
        self._period = period
        self._taken: deque[list[float]] = deque()  # [when, units]
        self._total = 0.0

    def wait(self, units: float, now: float) -> float:
        """Seconds until `units` fit; 0 when they do now. More than the whole limit fits into an empty window."""
        self._forget(now)
        if self.limit is None:
            return 0.0
        excess = self._total + min(units, self.limit) - self.limit
        for when, freed in self._taken:
            if excess <= 0:
                break
            excess -= freed
            if excess <= 0:
                return max(when + self._period - now, 1e-3)
        return 0.0

    def take(self, units: float, now: float) -> list[float]:
        """Uses units up; the entry returned can be corrected with `settle`."""
        entry = [now, units]
        self._taken.append(entry)
        self._total += units
        return entry

    def settle(self, entry: list[float], units: float, now: float) -> None:
        """Replaces an estimate by what was used, at the time when the reply was in."""
        if now - entry[0] < self._period:
            self._total += units - entry[1]
            entry[1] = units

    def _forget(self, now: float) -> None:
        while self._taken and now - self._taken[0][0] >= self._period:
            self._total -= self._taken.popleft()[1]


class Limiter:
    """When the next request may go to an endpoint. One for each agent, within one event loop.

    Concurrency adapts as congestion control does: halved by a refused request, regained one by one.

    Args:
        concurrency: requests in flight at most.
        requests, tokens: a minute; what the server's headers say narrows them, and replaces None.
        period: of the limits, seconds.
    """

    def __init__(self, concurrency: int, requests: int | None, tokens: int | None, period: float = 60.0):
        self.concurrency = concurrency
        self.width = float(concurrency)
        self.in_flight = 0
        self.requests = Window(requests, period)
        self.tokens = Window(tokens, period)
        self._configured = (requests, tokens)
        self._resume = 0.0  # nothing is sent before
        self._refused_at = 0.0
        self._refusals = 0  # in a row
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @property
    def waiting(self) -> bool:
        """Whether the server has asked for a pause."""
        return time.monotonic() < self._resume

    async def acquire(self, tokens: float) -> list[float]:
        """Waits for a turn, first come first served; returns what `release` takes."""
        async with self._turn:
            while True:
                now = time.monotonic()
                if self.in_flight >= max(1, int(self.width)):
                    self._freed.clear()
                    await self._freed.wait()
                    continue
                pause = max(self._resume - now, self.requests.wait(1, now), self.tokens.wait(tokens, now))
                if pause <= 0:
                    break
                await asyncio.sleep(min(pause, 1.0))  # limits may widen meanwhile
            self.in_flight += 1
            self.requests.take(1, now)
            return self.tokens.take(tokens, now)

    def release(self, entry: list[float], tokens: float | None) -> None:
        """Ends a turn; `tokens` as billed, or None where that is unknown."""
        self.in_flight -= 1
        if tokens is not None:
            self.tokens.settle(entry, tokens, time.monotonic())
        self._freed.set()

    def answered(self, headers: Mapping[str, str]) -> None:
        """After a reply that was not refused for its rate."""
        self._refusals = 0
        self.width = min(float(self.concurrency), self.width + 1 / max(self.width, 1))
        self._follow(headers)

    def refused(self, headers: Mapping[str, str], started: float) -> float:
        """After a 429: pauses all requests of the endpoint. Returns the pause in seconds.

        Args:
            started: when the refused request was sent (monotonic); one sent before the last refusal says nothing new.
        """
        now = time.monotonic()
        if started >= self._refused_at:
            self._refused_at = now
            self._refusals += 1
            self.width = max(1.0, self.width / 2)
        asked = retry_after(headers)
        pause = min(FIRST_WAIT * 2 ** (self._refusals - 1), 60.0) if asked is None else asked
        pause = min(pause, LONGEST_WAIT)
        self._resume = max(self._resume, now + pause)
        self._follow(headers)
        return pause

    def _follow(self, headers: Mapping[str, str]) -> None:
        """Takes over `x-ratelimit-{limit,remaining,reset}-{requests,tokens}` where the server sends them."""
        for name, window, configured in zip(
            ("requests", "tokens"), (self.requests, self.tokens), self._configured, strict=True
        ):
            limit = _number(headers.get(f"x-ratelimit-limit-{name}"))
            if limit and limit >= 1:
                window.limit = int(limit) if configured is None else min(int(limit), configured)
            remaining = _number(headers.get(f"x-ratelimit-remaining-{name}"))
            reset = seconds(headers.get(f"x-ratelimit-reset-{name}"))
            if remaining is not None and remaining <= 0 and reset:
                self._resume = max(self._resume, time.monotonic() + min(reset, LONGEST_WAIT))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, from `retry-after-ms` or `retry-after` (seconds or a date)."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return max(milliseconds / 1000, 0.0)
    value = headers.get("retry-after")
    if value is None:
        return None
    if (number := _number(value)) is not None:
        return max(number, 0.0)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def seconds(value: str | None) -> float | None:
    """A duration as OpenAI writes it ("20ms", "6m0s", "1h2m3.5s"), or plain seconds."""
    if value is None:
        return None
    if (number := _number(value)) is not None:
        return number
    parts = _DURATION.findall(value)
    if not parts or "".join(number + unit for number, unit in parts) != value.strip():
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in parts)


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else None
    except ValueError:
        return None
    return number if number is not None and 0 <= number < 1e12 else None
