"""Who may come in: the server's state, its seats, and the jobs that are being worked for. All on the event loop."""

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from silkie_jax.serving.limits import Limits, Refused, as_refused
from silkie_jax.serving.loop import EngineThread, Job
from silkie_jax.serving.model import ServedModel

_READERS = 4  # bodies that are parsed, and their images decoded, at once
LOADING, READY, STOPPING, FAILED = "loading", "ready", "stopping", "failed"


class Visit:
    """One request from its arrival to its end: its seats, its job, and the time it has."""

    def __init__(self, house: "House"):
        self._house = house
        self._seats = 0
        self.job: Job | None = None
        self.began = time.monotonic()
        self.deadline = asyncio.get_running_loop().time() + house.limits.seconds

    def take(self, seats: int) -> None:
        """Takes so many seats in all.

        Raises:
          Refused: there is none left.
        """
        self._house.seat(seats - self._seats)
        self._seats = seats

    def begin(self, job: Job) -> None:
        self.job = job
        self._house.jobs.add(job)
        self._house.thread.begin(job)

    async def news(self) -> Any:
        """What comes next of the job.

        Raises:
          Refused: it failed, or its time is over.
        """
        assert self.job is not None
        try:
            async with asyncio.timeout_at(self.deadline):
                found = await self.job.news.get()
        except TimeoutError:
            raise self.too_late() from None
        if isinstance(found, Exception):
            raise as_refused(found)
        return found

    def too_late(self) -> Refused:
        seconds = self._house.limits.seconds
        message = f"the request took longer than {seconds:g} s: ask for fewer tokens, or serve with a larger --timeout"
        return Refused(message, 504, code="timeout", headers={"x-should-retry": "false"})

    def close(self, whole: bool = False) -> None:
        """Gives everything back; work that is still done for it ends. `whole`: it has what it asked for."""
        self._house.seat(-self._seats)
        self._seats = 0
        if self.job is not None:
            self._house.jobs.discard(self.job)
            self._house.thread.drop(self.job)
            self.job = None
        if whole:
            self._house.took(time.monotonic() - self.began)


class House:
    """The state of the server.

    Args:
      name: of the model.
      load: loads it.
      queue: replies that may wait beyond those in slots; a request with `n` counts n times.
      drain: seconds that requests have to end in after `stop`.
      ready: called on the event loop when the model is there.
      ended: called on the event loop when there is nothing left to serve with.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], ServedModel],
        limits: Limits,
        *,
        queue: int = 256,
        drain: float = 5.0,
        ready: Callable[[], object] = lambda: None,
        ended: Callable[[], object] = lambda: None,
    ):
        self.name, self.limits, self.queue, self.drain = name, limits, queue, drain
        self.created = int(time.time())
        self.state = LOADING
        self.jobs: set[Job] = set()
        self.thread = EngineThread(load, self._loaded, self._thread_ended)
        self.readers = asyncio.Semaphore(_READERS)
        self._ready, self._ended = ready, ended
        self._taken = 0
        self._seconds = 1.0  # that a request takes, about

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """From now on nobody is let in; who is inside has `drain` seconds."""
        if self.state in (LOADING, READY):
            self.state = STOPPING
            asyncio.get_running_loop().call_later(self.drain, self._end_all)

    def enter(self) -> tuple[Visit, ServedModel]:
        """A seat for a request, and the model.

        Raises:
          Refused: the server is not ready, or full.
        """
        if self.state != READY or self.thread.model is None:
            raise self._not_ready()
        visit = Visit(self)
        visit.take(1)
        return visit, self.thread.model

    def seat(self, more: int) -> None:
        """Takes or gives back seats.

        Raises:
          Refused: there are none left.
        """
        slots = self.thread.model.engine.slots if self.thread.model else 0
        if more > 0 and self._taken + more > slots + self.queue:
            message = f"the server is full: {self._taken} replies are in progress or waiting; try again later"
            after = math.ceil(min(max(self._seconds * self.queue / max(slots, 1) / 2, 1), 30))
            raise Refused(message, 429, code="queue_full", headers={"retry-after": str(after)})
        self._taken += more

    def took(self, seconds: float) -> None:
        """A request was served in so many seconds."""
        self._seconds += 0.1 * (seconds - self._seconds)

    def health(self) -> dict[str, object]:
        model = self.thread.model
        return {
            "status": self.state,
            "model": self.name,
            "slots": model.engine.slots if model else 0,
            "replies": self._taken,
            "waiting": self.thread.waiting,
            "queue": self.queue,
            "tokens_per_second": round(self.thread.tokens_per_second, 1),
        }

    def _not_ready(self) -> Refused:
        message = f"the server is {self.state}"
        return Refused(message, 503, code=self.state, headers={"retry-after": "5"})

    def _loaded(self) -> None:
        if self.state == LOADING:
            self.state = READY
            self._ready()

    def _thread_ended(self) -> None:
        if self.thread.error is not None:
            self.state = FAILED
        self._end_all()
        self._ended()

    def _end_all(self) -> None:
        """Everyone inside gets an answer now."""
        error = self.thread.error
        for job in self.jobs:
            job.news.put_nowait(self._not_ready() if error is None else as_refused(error))  # type: ignore[arg-type]
