"""The engine: many requests at once through one model, each as if it were alone.

A fixed number of slots hold keys and values. A request takes a slot for each of its samples as slots become free, and
gives it back when the sample ends; meanwhile the others go on. Its prompt is computed once for all its samples, and for
other requests of the same prompt that come while a slot still holds it; an image once for all requests that show it
while its features are kept. What a request gets follows from the request alone (its length decides the dynamic NTK
factor, its seed the draws), never from what else is in flight. With another number of slots arithmetic differs by
rounding, as between any two programs.

On several hosts every host runs the same requests in the same order.
"""

import dataclasses
import hashlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh

from silkie_jax.errors import UserError
from silkie_jax.generation.meters import EngineMeters
from silkie_jax.generation.programs import STOPS, Decoded, Lanes, Programs
from silkie_jax.generation.requests import (
    CANCELLED,
    LENGTH,
    STOP,
    Completion,
    Request,
    check_sampling,
    sample_seed,
    stop_sequences,
)
from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.models.qwen_vl.language import frequencies, ntk_alpha
from silkie_jax.models.qwen_vl.model import QwenVL, check_spans, feature_places
from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.nn.kept import Keeper

_MEMORY_SHARE = 0.8  # of what the weights leave of a device's memory: for keys and values; the rest is for the programs
_SLOTS_ON_CPU = 16
_MOST_SLOTS = 128  # beyond it a decoding step is no longer bound by reading the weights


@dataclass(eq=False)
class Ticket:
    """A request in the engine: what has come so far of each sample, and how it ended."""

    request: Request
    stops: tuple[tuple[int, ...], ...]
    turns: np.ndarray
    waiting: deque[int]  # samples that have no slot yet
    prompt: bytes  # a hash of its ids and images
    number: int = -1  # in `Engine.run`
    running: int = 0
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.done == self.request.n


@dataclass(eq=False)
class _Lane:
    """A slot at work: one sample of a ticket."""

    ticket: Ticket
    sample: int
    length: int  # places filled
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)

    @property
    def token(self) -> int:
        return self.tokens[-1] if self.tokens else int(self.ticket.request.ids[-1])

    def completion(self, finish: str) -> Completion:
        return Completion(self.sample, self.tokens, self.logprobs, self.top, finish)


@dataclass(frozen=True)
class Event:
    """News of one sample: the ids that came with what is reported of each, and its completion once it has ended."""

    ticket: Ticket
    sample: int
    tokens: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]]
    completion: Completion | None


class Engine:
    """Continues prompts in slots.

    Args:
      model: with or without an adapter; `load_model` placed it on `mesh` where there is one.
      context: the most tokens of a prompt and its completion.
      slots: sequences in flight; None: as many as the device's memory has room for.
      images: how many images' features are kept.
      steps: tokens between two looks at the queue.
      top_logprobs: how many of the most probable ids are reported at each place.
      mesh, kernel, keeper: where the model lies, how prompts and images attend, and how a token attends to what is kept
        (hardware.kernel.sound_kernel and sound_keeper).
      own: take the memory of the model, which is of no use afterwards; otherwise its decoder is held twice.

    Raises:
      UserError: sizes that make no sense, or no room for a single slot.
    """

    def __init__(
        self,
        model: QwenVL,
        *,
        context: int = 2048,
        slots: int | None = None,
        images: int = 64,
        steps: int = 16,
        top_logprobs: int = 0,
        mesh: Mesh | None = None,
        kernel: Kernel = PLAIN,
        keeper: Keeper | None = None,
        own: bool = False,
    ):
        for name, value, least in (("context", context, 2), ("images", images, 0), ("steps", steps, 1)):
            if value < least:
                raise UserError(f"the engine's {name} must be at least {least}, not {value}")
        rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        if slots is None:
            slots = fitting_slots(model.config, context, model.dtype.itemsize, mesh)
        if slots < 1:
            raise UserError(f"the engine's slots must be at least 1, not {slots}")
        self.config = model.config
        self.context = context
        self.meters = EngineMeters()
        self._programs = Programs(
            model,
            slots=-(-slots // rows) * rows,
            context=context,
            images=images,
            steps=steps,
            top_logprobs=top_logprobs,
            mesh=mesh,
            kernel=kernel,
            keeper=keeper or Keeper(dataclasses.replace(kernel, name="plain")),
            own=own,
        )
        self._lanes: list[_Lane | None] = [None] * self._programs.count
        self._holds: list[bytes | None] = [None] * self._programs.count  # each slot's prompt, also when it is free
        self._queue: deque[Ticket] = deque()
        self._started: list[Ticket] = []  # their prompts are in slots; some samples wait for one
        self._pool: OrderedDict[bytes, int] = OrderedDict()  # an image's number, the one used last at the end
        self._news: list[Event] = []
        self._lengths = _lengths(context)

    @property
    def model(self) -> QwenVL:
        """The model with its decoder's layers apart (`QwenVL.apart`), for whoever computes something else with it."""
        return self._programs.model

    @property
    def kernel(self) -> Kernel:
        return self._programs.kernel

    @property
    def slots(self) -> int:
        return self._programs.count

    @property
    def compiled(self) -> int:
        """How many programs have been compiled so far."""
        return self._programs.compiled

    @property
    def waiting(self) -> int:
        """Requests that no slot has been found for yet."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight or waiting."""
        return not (self._queue or self._started or self._news or any(self._lanes))

    # Asking

    def submit(self, request: Request) -> Ticket:
        """Takes a request, which waits until slots are free.

        Raises:
          UserError: options out of range, images that do not fit the tokens, or more tokens than `context`.
        """
        check_sampling(request.max_new_tokens, request.temperature, request.top_p, request.seed)
        if request.n < 1:
            raise UserError(f"n must be at least 1, not {request.n}")
        ids = request.ids
        if ids.ndim != 1 or not ids.size:
            raise UserError("a prompt must be a list of at least one id")
        if ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise UserError(f"a prompt has an id outside the vocabulary of {self.config.vocab_size}")
        check_spans(self.config, ids[None], len(request.images))
        if len(set(request.image_keys)) > self._programs.images:
            raise UserError(
                f"a prompt shows {len(set(request.image_keys))} images and the engine keeps {self._programs.images}"
            )
        if len(ids) + request.max_new_tokens > self.context:
            raise UserError(
                f"a prompt of {len(ids)} tokens and {request.max_new_tokens} new ones exceed the context of "
                f"{self.context}; ask for fewer, or make the engine with a longer context"
            )
        turns = frequencies(self.config, ntk_alpha(self.config, len(ids)))
        prompt = hashlib.blake2b(b"".join((ids.tobytes(), *request.image_keys)), digest_size=16).digest()
        ticket = Ticket(request, stop_sequences(request.stop), turns, deque(range(request.n)), prompt)
        self._queue.append(ticket)
        return ticket

    def cancel(self, ticket: Ticket, sample: int | None = None) -> None:
        """Ends a request, or one sample of it; its slots are free at once.

        What it got so far comes as cancelled completions.
        """

        def gone(number: int, completion: Completion) -> None:
            self._news.append(Event(ticket, number, [], [], [], completion))

        for number in [n for n in ticket.waiting if sample in (None, n)]:
            ticket.waiting.remove(number)
            ticket.done += 1
            gone(number, Completion(number, [], [], [], CANCELLED))
        if not ticket.waiting and ticket in self._queue:
            self._queue.remove(ticket)
        if not ticket.waiting and ticket in self._started:
            self._started.remove(ticket)
        for slot, lane in enumerate(self._lanes):
            if lane is not None and lane.ticket is ticket and sample in (None, lane.sample):
                gone(lane.sample, lane.completion(CANCELLED))
                self._end(slot, lane)

    def run(
        self, requests: Iterable[Request], done: Callable[[int], object] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """Completions with their request's number, as they finish.

        Requests are taken as slots need them, so that they may be made (and their images decoded) on the way; `done`
        is told the number of each request that is finished.
        """
        source = enumerate(requests)
        left: dict[int, int] = {}  # samples of a request that are to come
        more = True
        while True:
            while more and len(self._queue) < max(self.slots // 4, self._programs.rows):
                number, request = next(source, (-1, None))
                if request is None:
                    more = False
                else:
                    self.submit(request).number = number
                    left[number] = request.n
            if self.idle:
                return
            for event in self.step():
                if event.completion is None:
                    continue
                number = event.ticket.number
                yield number, event.completion
                left[number] -= 1
                if not left[number]:
                    del left[number]
                    if done is not None:
                        done(number)

    def forget_images(self) -> None:
        """Empties the pool of features, and forgets the prompts that free slots hold."""
        self._pool.clear()
        self._holds = [held if lane else None for held, lane in zip(self._holds, self._lanes, strict=True)]

    # Working

    def warm_up(self, say: Callable[[str], object] = lambda line: None, images: bool = True) -> None:
        """Compiles all programs; afterwards no request compiles anything."""
        p, began, rows = self._programs, time.monotonic(), self._programs.rows
        if images:
            side = self.config.visual.image_size
            p.encode(np.zeros((rows, side, side, 3), np.uint8), np.full(rows, p.images, np.int32))
        turns = np.zeros((rows, 1, self.config.head_dim), np.float32)
        for length in self._lengths:
            tokens = np.zeros((rows, length), np.int32)
            nowhere = np.full(rows, p.count, np.int32)
            p.prefill(tokens, np.full_like(tokens, -1), np.zeros(rows, np.int32), turns, nowhere)
        p.fork(0, [])
        p.decode(self._say_lanes(), eager=False)
        took = time.monotonic() - began
        say(f"engine: {p.count} slots of {self.context} tokens; {p.compiled} programs in {took:.1f} s")

    def step(self) -> list[Event]:
        """Lets waiting requests begin, adds some tokens to all that are in flight, and says what came of it."""
        began = time.perf_counter()
        self._admit()
        middle = time.perf_counter()
        self.meters.prefill_seconds += middle - began
        if any(self._lanes):
            waiting = bool(self._queue) or any(ticket.waiting for ticket in self._started)
            self._take(self._programs.decode(self._say_lanes(), eager=waiting))
            self.meters.decode_seconds += time.perf_counter() - middle
        news, self._news = self._news, []
        return news

    def _admit(self) -> None:
        """Gives free slots to samples: first to those whose prompts are in slots already, then to new prompts."""
        free = deque(number for number, lane in enumerate(self._lanes) if lane is None)
        for ticket in list(self._started):
            source = next(n for n, lane in enumerate(self._lanes) if lane is not None and lane.ticket is ticket)
            self._fork(ticket, source, free)
        while free and self._queue:
            if self._queue[0].prompt in self._holds:
                ticket = self._queue.popleft()
                slot = self._holds.index(ticket.prompt)
                self._started.append(ticket)
                if slot in free:
                    free.remove(slot)
                    self._start(ticket, slot)
                self._fork(ticket, slot, free)
                continue
            tickets = self._next_prompts(len(free))
            first = [free.popleft() for _ in tickets]
            self._prefill(tickets, first)
            for ticket, slot in zip(tickets, first, strict=True):
                self._start(ticket, slot)
                self._started.append(ticket)
                self._fork(ticket, slot, free)

    def _next_prompts(self, most: int) -> list[Ticket]:
        """The first that waits, and others of its padded length: as many as one call of `prefill` takes."""
        head = self._queue.popleft()
        group = [head]
        if self._programs.rows > 1:
            for ticket in list(self._queue):
                if len(group) >= min(most, self._programs.rows):
                    break
                known = ticket.prompt in (*self._holds, *(other.prompt for other in group))
                if self._padded(ticket) == self._padded(head) and not known:
                    self._queue.remove(ticket)
                    group.append(ticket)
        return group

    def _padded(self, ticket: Ticket) -> int:
        """The length that `prefill` is compiled for; 0 where there is nothing before the last token."""
        before = len(ticket.request.ids) - 1
        return next(length for length in self._lengths if length >= before) if before else 0

    def _prefill(self, tickets: list[Ticket], slots: list[int]) -> None:
        p = self._programs
        self.meters.prompts += len(tickets)
        self.meters.prompt_tokens += sum(len(ticket.request.ids) for ticket in tickets)
        length = self._padded(tickets[0])
        if not length:
            return
        numbers = self._encode(tickets)
        tokens, places = np.zeros((p.rows, length), np.int32), np.full((p.rows, length), -1, np.int32)
        lengths, where = np.zeros(p.rows, np.int32), np.full(p.rows, p.count, np.int32)
        turns = np.zeros((p.rows, 1, self.config.head_dim), np.float32)
        for row, (ticket, slot) in enumerate(zip(tickets, slots, strict=True)):
            ids = ticket.request.ids
            tokens[row, : len(ids) - 1] = ids[:-1]
            at = feature_places(self.config, ids, [numbers[key] for key in ticket.request.image_keys])
            places[row, : len(ids) - 1] = at[:-1]
            lengths[row], where[row], turns[row] = len(ids) - 1, slot, ticket.turns
        p.prefill(tokens, places, lengths, turns, where)

    def _encode(self, tickets: list[Ticket]) -> dict[bytes, int]:
        """The numbers in the pool of all images of some prompts, whose features are there afterwards."""
        p = self._programs
        pixels = {
            key: image
            for ticket in tickets
            for key, image in zip(ticket.request.image_keys, ticket.request.images, strict=True)
        }
        shown = sum(len(ticket.request.images) for ticket in tickets)
        for key in pixels:
            if key in self._pool:
                self._pool.move_to_end(key)
        missing = [key for key in pixels if key not in self._pool]
        for first in range(0, len(missing), p.rows):
            some = missing[first : first + p.rows]
            images = np.zeros((p.rows, *pixels[some[0]].shape), np.uint8)
            numbers = np.full(p.rows, p.images, np.int32)
            for row, key in enumerate(some):
                number = len(self._pool) if len(self._pool) < p.images else self._pool.popitem(last=False)[1]
                self._pool[key], numbers[row], images[row] = number, number, pixels[key]
            # A number beyond the pool is dropped by whole rows.
            p.encode(images, numbers)
        self.meters.images += len(missing)
        self.meters.image_hits += shown - len(missing)
        return {key: self._pool[key] for key in pixels}

    def _fork(self, ticket: Ticket, source: int, free: deque[int]) -> None:
        """Starts further samples of a prompt that is in slot `source`, while slots are free."""
        targets = [free.popleft() for _ in range(min(len(ticket.waiting), len(free)))]
        if targets:
            self._programs.fork(source, targets)
        for target in targets:
            self._start(ticket, target)
        if not ticket.waiting and ticket in self._started:
            self._started.remove(ticket)

    def _start(self, ticket: Ticket, slot: int) -> None:
        """The next sample of a ticket begins in a slot that holds its prompt."""
        self._lanes[slot] = _Lane(ticket, ticket.waiting.popleft(), len(ticket.request.ids) - 1)
        self._holds[slot] = ticket.prompt
        ticket.running += 1

    def _say_lanes(self) -> Lanes:
        count = self._programs.count
        lanes = Lanes(
            token=np.zeros(count, np.int32),
            length=np.zeros(count, np.int32),
            left=np.zeros(count, np.int32),
            turns=np.zeros((count, 1, self.config.head_dim), np.float32),
            temperature=np.zeros(count, np.float32),
            top_p=np.ones(count, np.float32),
            seed=np.zeros(count, np.uint32),
            drawn=np.zeros(count, np.int32),
            stops=np.full((count, STOPS), -1, np.int32),
        )
        for i, lane in enumerate(self._lanes):
            if lane is None:
                continue
            request = lane.ticket.request
            lanes.token[i], lanes.length[i] = lane.token, lane.length
            lanes.left[i] = request.max_new_tokens - len(lane.tokens)
            lanes.turns[i] = lane.ticket.turns
            lanes.temperature[i], lanes.top_p[i] = request.temperature, request.top_p
            lanes.seed[i], lanes.drawn[i] = sample_seed(request.seed, lane.sample), len(lane.tokens)
            single = [stop[0] for stop in lane.ticket.stops if len(stop) == 1][:STOPS]
            lanes.stops[i, : len(single)] = single
        return lanes

    def _take(self, found: Decoded) -> None:
        """Gives every lane its new tokens and ends those that are done."""
        self.meters.steps += int((found.tokens >= 0).any(0).sum())
        for number, lane in enumerate(self._lanes):
            if lane is None:
                continue
            before, finish = len(lane.tokens), None
            for step, token in enumerate(found.tokens[number].tolist()):
                if token < 0 or finish:
                    break
                lane.tokens.append(token)
                lane.logprobs.append(float(found.logprobs[number, step]))
                ids, values = found.top_ids[number, step].tolist(), found.top_logprobs[number, step].tolist()
                lane.top.append(list(zip(ids, values, strict=True)))
                lane.length += 1
                finish = self._finish(lane)
            self.meters.tokens += len(lane.tokens) - before
            news = lane.tokens[before:], lane.logprobs[before:], lane.top[before:]
            self._news.append(Event(lane.ticket, lane.sample, *news, lane.completion(finish) if finish else None))
            if finish:
                self.meters.samples += 1
                self._end(number, lane)

    def _finish(self, lane: _Lane) -> str | None:
        """How the last token ended a sample, if it did."""
        if lane.tokens[-1] == self.config.end_of_text:
            return STOP
        if any(tuple(lane.tokens[-len(stop) :]) == stop for stop in lane.ticket.stops):
            return STOP
        return LENGTH if len(lane.tokens) >= lane.ticket.request.max_new_tokens else None

    def _end(self, slot: int, lane: _Lane) -> None:
        ticket = lane.ticket
        self._lanes[slot] = None
        ticket.running -= 1
        ticket.done += 1
        if ticket.waiting:  # the prompt is still in this slot
            self._start(ticket, slot)
        if not ticket.waiting and ticket in self._started:
            self._started.remove(ticket)


def fitting_slots(config: QwenVLConfig, context: int, itemsize: int, mesh: Mesh | None) -> int:
    """How many slots of `context` tokens the memory of the devices has room for, weights being there already.

    Raises:
      UserError: not even one.
    """
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" not in stats:
        return _SLOTS_ON_CPU
    each = 2 * config.num_hidden_layers * context * config.num_attention_heads * config.head_dim * itemsize
    room = (stats["bytes_limit"] - stats["bytes_in_use"]) * len(devices) * _MEMORY_SHARE
    count = int(room // each)
    if count < 1:
        raise UserError(
            f"no room for generation: {context} tokens take {each / 2**30:.2f} GiB and the weights leave "
            f"{room / 2**30:.2f} GiB; use a shorter context, or more devices"
        )
    return min(count, _MOST_SLOTS * (1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]))


def _lengths(context: int) -> list[int]:
    """Padded lengths of prompts: 64, 96, 128, 192, 256, 384, ... up to the context; two to a doubling."""
    found = []
    size = 64
    while size < context:
        found += [size, size * 3 // 2]
        size *= 2
    return [length for length in found if length < context] + [context]
