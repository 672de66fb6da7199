"""One thread owns the engine: all that is computed is computed in it, and requests reach it through an inbox.

The event loop makes a job, hands it over, and waits for its news; neither side touches what is the other's.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from silkie_jax.corpus import Record
from silkie_jax.generation.engine import Event, Ticket
from silkie_jax.scoring.scorer import Scored
from silkie_jax.serving.chat_request import ChatRequest
from silkie_jax.serving.model import ServedModel
from silkie_jax.serving.reply import Delta, ReplyText

_RATE_SECONDS = 5.0  # tokens a second are those of the last five to ten


class Job:
    """A request on its way.

    news: what came of it, in order: a chat's deltas, or the log-probabilities of a record; an error is the last.
    """

    def __init__(self, asked: ChatRequest | Record):
        self.asked = asked
        self.news: asyncio.Queue[Delta | Scored | Exception] = asyncio.Queue()
        self.dropped = False  # set on the event loop, read by the engine's thread
        # What follows is the engine thread's own.
        self.ticket: Ticket | None = None
        self.replies: list[ReplyText] = []


class EngineThread:
    """Loads a model and works for it until it is stopped.

    Args:
      load: makes the model, in the thread.
      ready, ended: called on the event loop, once each: the model is there; the thread works no more.
    """

    def __init__(self, load: Callable[[], ServedModel], ready: Callable[[], object], ended: Callable[[], object]):
        self.model: ServedModel | None = None
        self.error: BaseException | None = None
        self._load, self._ready, self._ended = load, ready, ended
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._jobs: dict[Ticket, Job] = {}
        self._to_score: deque[Job] = deque()
        self._heard: list[tuple[Job, Delta | Scored | Exception]] = []
        self._marks = ((time.monotonic(), 0), (time.monotonic(), 0))

    # For the event loop

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """Ends the thread, waiting so long; says whether it has ended. May be called from any thread."""
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def begin(self, job: Job) -> None:
        self._inbox.put(partial(self._begin, job))

    def drop(self, job: Job) -> None:
        """Ends a job that nobody waits for any more; what it held is free at once."""
        job.dropped = True
        self._inbox.put(partial(self._drop, job))

    @property
    def waiting(self) -> int:
        """Requests that have not begun."""
        engine = self.model.engine if self.model else None
        return self._inbox.qsize() + len(self._to_score) + (engine.waiting if engine else 0)

    @property
    def tokens_per_second(self) -> float:
        """Of the last seconds."""
        (began, before), _ = self._marks
        now = self.model.engine.meters.tokens if self.model else 0
        return (now - before) / max(time.monotonic() - began, 1e-3)

    # In the thread

    def _work(self) -> None:
        try:
            self.model = self._load()
            self._call(self._ready)
            while self._turn(self.model):
                pass
        except BaseException as error:
            self.error = error
        self._call(self._ended)

    def _turn(self, model: ServedModel) -> bool:
        """Takes what came in, computes a little, and tells what came of it; false once it is to end."""
        idle = model.engine.idle and not self._to_score
        try:
            order = self._inbox.get(block=idle)
            while order is not None:
                order()
                order = self._inbox.get_nowait()
            return False
        except queue.Empty:
            pass
        if self._to_score:  # one at a time, between two steps of the engine
            self._score(model, self._to_score.popleft())
        if not model.engine.idle:
            for event in model.engine.step():
                self._hear(model, event)
        self._mark(model.engine.meters.tokens)
        if self._heard:
            self._call(partial(self._deliver, self._heard))
            self._heard = []
        return True

    def _begin(self, job: Job) -> None:
        assert self.model is not None
        if job.dropped:
            return
        if isinstance(job.asked, Record):
            self._to_score.append(job)
            return
        asked = job.asked
        try:
            job.ticket = self.model.engine.submit(asked.request)
        except Exception as error:
            self._heard.append((job, error))
            return
        job.replies = [
            ReplyText(self.model.tokenizer, sample, asked.stops, asked.continued, asked.keep_stop)
            for sample in range(asked.request.n)
        ]
        self._jobs[job.ticket] = job

    def _drop(self, job: Job) -> None:
        assert self.model is not None
        if job.ticket is not None and job.ticket in self._jobs:
            del self._jobs[job.ticket]
            self.model.engine.cancel(job.ticket)

    def _hear(self, model: ServedModel, event: Event) -> None:
        job = self._jobs.get(event.ticket)
        if job is None:
            return  # dropped, or all said
        reply = job.replies[event.sample]
        if reply.finish:
            return
        finish = event.completion.finish if event.completion else None
        delta = reply.feed(event.tokens, event.logprobs, event.top, finish)
        if delta is not None:
            self._heard.append((job, delta))
        if reply.finish and event.completion is None:  # at a text that the engine does not know
            model.engine.cancel(event.ticket, event.sample)
        if all(reply.finish for reply in job.replies):
            del self._jobs[event.ticket]

    def _score(self, model: ServedModel, job: Job) -> None:
        assert isinstance(job.asked, Record)
        if job.dropped:
            return
        try:
            (scored,) = model.scorer([job.asked])
            self._heard.append((job, scored))
        except Exception as error:  # the engine has its own arrays: it is not harmed
            self._heard.append((job, error))

    def _mark(self, tokens: int) -> None:
        now, (_, newer) = time.monotonic(), self._marks
        if now - newer[0] > _RATE_SECONDS:
            self._marks = newer, (now, tokens)

    def _deliver(self, heard: list[tuple[Job, Delta | Scored | Exception]]) -> None:
        for job, news in heard:
            if not job.dropped:
                job.news.put_nowait(news)

    def _call(self, function: Callable[[], object]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the event loop has ended, and everyone who waited with it
            self._loop.call_soon_threadsafe(function)
