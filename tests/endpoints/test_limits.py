"""Limits by the minute, and what headers say of them."""

import asyncio
import time
from email.utils import format_datetime

import pytest

from silkie_jax.endpoints.limits import Limiter, Window, retry_after, seconds


def test_a_window_never_holds_more_than_its_limit():
    window, now, taken = Window(10, 60.0), 0.0, []
    for units in [1, 2, 3, 4, 5, 1, 1, 8, 10, 3] * 5:
        now += window.wait(units, now)
        assert window.wait(units, now) == 0
        window.take(units, now)
        taken.append((now, units))
        assert sum(u for when, u in taken if when > now - 60) <= 10
        now += 1.0
    assert now < 60 * sum(u for _, u in taken) / 10 + 300  # and the limit is used


def test_a_window_corrects_what_was_expected():
    window = Window(100, 60.0)
    entry = window.take(100, 0.0)
    assert window.wait(10, 1.0) == pytest.approx(59.0)
    window.settle(entry, 20, 2.0)
    assert window.wait(80, 2.0) == 0
    assert window.wait(81, 2.0) == pytest.approx(58.0)


def test_more_than_the_limit_goes_alone():
    window = Window(10, 60.0)
    assert window.wait(50, 0.0) == 0
    window.take(50, 0.0)
    assert window.wait(1, 30.0) == pytest.approx(30.0)
    assert Window(None).wait(1e9, 0.0) == 0


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("20ms", 0.02),
        ("6m0s", 360),
        ("1h2m3.5s", 3723.5),
        ("1s", 1),
        ("7", 7),
        ("", None),
        ("soon", None),
        ("1d", None),
    ],
)
def test_durations(value, expected):
    assert seconds(value) == expected


def test_retry_after():
    from datetime import UTC, datetime, timedelta

    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < retry_after({"retry-after": later}) <= 30
    assert retry_after({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}) == 0
    assert retry_after({"retry-after": "whenever"}) is None
    assert retry_after({"retry-after": "-3"}) is None
    assert retry_after({}) is None


def test_a_refusal_pauses_everything_and_halves_the_width():
    async def run():
        limiter = Limiter(8, None, None)
        turns = [await limiter.acquire(1) for _ in range(8)]
        sent = time.monotonic()
        limiter.refused({"retry-after-ms": "80"}, sent)
        assert limiter.width == 4
        limiter.refused({"retry-after-ms": "80"}, sent - 1)  # sent before the first was known: says nothing new
        assert limiter.width == 4
        for turn in turns:
            limiter.release(turn, 1)
        await limiter.acquire(1)
        assert time.monotonic() - sent >= 0.08
        for _ in range(100):
            limiter.answered({})
        assert limiter.width == 8

    asyncio.run(run())


def test_without_a_hint_the_pause_doubles():
    async def run():
        limiter = Limiter(8, None, None)
        pauses = []
        for _ in range(4):
            pauses.append(limiter.refused({}, time.monotonic()))
        assert pauses == [0.5, 1.0, 2.0, 4.0]
        limiter.answered({})
        assert limiter.refused({}, time.monotonic()) == 0.5

    asyncio.run(run())


def test_headers_narrow_the_limits_and_an_empty_account_waits():
    async def run():
        limiter = Limiter(8, 100, None)
        limiter.answered({"x-ratelimit-limit-requests": "20", "x-ratelimit-limit-tokens": "5000"})
        assert (limiter.requests.limit, limiter.tokens.limit) == (20, 5000)
        limiter.answered({"x-ratelimit-limit-requests": "900"})
        assert limiter.requests.limit == 100
        assert not limiter.waiting
        limiter.answered({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "60ms"})
        assert limiter.waiting
        began = time.monotonic()
        await limiter.acquire(1)
        assert time.monotonic() - began >= 0.05
        limiter.answered({"x-ratelimit-remaining-requests": "nonsense", "x-ratelimit-limit-requests": "-1"})
        assert limiter.requests.limit == 100

    asyncio.run(run())


def test_turns_are_first_come_first_served_and_survive_cancelling():
    async def run():
        limiter, order = Limiter(1, None, None), []

        async def one(n):
            turn = await limiter.acquire(1)
            order.append(n)
            await asyncio.sleep(0.001)
            limiter.release(turn, 1)

        tasks = [asyncio.create_task(one(n)) for n in range(6)]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == [0, 1, 3, 4, 5]
        assert limiter.in_flight == 0

    asyncio.run(run())
