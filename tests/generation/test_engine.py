"""The engine: each request as if it were alone, whatever else is in flight; what is computed once; what is refused."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.errors import UserError
from silkie_jax.generation.engine import Engine
from silkie_jax.generation.generate import generate
from silkie_jax.generation.requests import CANCELLED, LENGTH, STOP, Request, sample_seed
from silkie_jax.hardware.kernel import attention_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of


def ask(engine: Engine, requests) -> dict[int, list[int]]:
    """Ids of requests with one sample each, by their number."""
    return {number: completion.tokens for number, completion in engine.run(requests)}


def alone(model, request: Request) -> list[int]:
    """What the plain `generate` gives, up to and with what ended it."""
    pixels = np.stack(request.images) if request.images else None
    options = {"temperature": request.temperature, "top_p": request.top_p, "seed": request.seed}
    tokens = np.asarray([request.tokens])
    out = generate(model, tokens, pixels, request.max_new_tokens, stop=request.stop, **options)
    ids = np.asarray(out)[0].tolist()
    if model.config.end_of_text in ids:
        ids = ids[: ids.index(model.config.end_of_text) + 1]
    for end, token in enumerate(ids, 1):
        if any(ids[max(end - len(stop), 0) : end] == list(stop) for stop in map(np.atleast_1d, request.stop)):
            return ids[: end - (token == model.config.end_of_text and end > 1 and ids[end - 2] in request.stop)]
    return ids


# As if alone


@pytest.mark.parametrize(
    "case", ["text", "image", "crossing_seq_length", "prompt_beyond_seq_length", "left_padded_batch"]
)
def test_golden_greedy(reference_data, golden_model, case):
    expected = reference_data.json("generation")["generate"][case]
    ids, mask = np.array(expected["prompt_ids"]), expected["attention_mask"]
    mask = np.ones_like(ids) if mask is None else np.array(mask)
    images = reference_data.images(ids)
    most = expected["kw"]["max_new_tokens"]
    requests = []
    for row, seen in zip(ids, mask, strict=True):
        prompt = row[seen == 1]
        count = int((prompt == golden_model.config.image_start).sum())
        requests.append(Request(prompt, list(images[:count]) if count else [], most))
        images = images[count:] if count else images
    engine = Engine(golden_model, context=max(len(r.tokens) for r in requests) + most, slots=2)
    got = ask(engine, requests)
    for number, (request, new) in enumerate(zip(requests, expected["new_ids"], strict=True)):
        if len(requests) > 1:  # the official batch counts positions and the NTK factor by its padded length
            new = np.asarray(generate(golden_model, request.ids[None], None, most))[0].tolist()
        assert got[number] == new[: len(got[number])]
        assert set(new[len(got[number]) :]) <= {golden_model.config.end_of_text}


def mixed(pair, count: int) -> tuple[list[Request], list[list[int]]]:
    """Requests of ten lengths, some with an image, and their greedy ids, found one length at a time."""
    random = np.random.default_rng(0)
    requests, expected = [], []
    kinds = [(1, 0), (2, 0), (7, 0), (30, 0), (64, 0), (65, 0), (100, 0), (150, 0), (270, 1), (300, 1)]
    most = 24
    for length, images in kinds:
        rows = random.integers(0, pair.model.config.end_of_text, (count // len(kinds), length))
        pixels = [pair.pixels(1, seed=int(n))[0] for n in random.integers(0, 3, len(rows))] if images else []
        if images:
            rows[:, 3 : 3 + 258] = pair.image_span()
        ids = np.asarray(generate(pair.model, rows, np.stack(pixels) if images else None, most))
        for n, row in enumerate(rows):
            asked = int(random.integers(1, most + 1))
            requests.append(Request(row, pixels[n : n + 1], asked))
            reply = ids[n].tolist()
            end = pair.model.config.end_of_text
            length_of = reply.index(end) + 1 if end in reply else most
            expected.append(reply[: min(asked, length_of)])
    order = random.permutation(len(requests))
    return [requests[i] for i in order], [expected[i] for i in order]


@pytest.mark.slow
def test_two_hundred_mixed_requests_equal_one_by_one(pair):
    requests, expected = mixed(pair, 200)
    for slots in (3, 16):
        engine = Engine(pair.model, context=330, slots=slots, steps=8)
        engine.warm_up()
        compiled = engine.compiled
        got = ask(engine, requests)
        assert [got[n] for n in range(len(requests))] == expected
        assert engine.compiled == compiled  # nothing was compiled on the way
    assert engine.meters.images + engine.meters.image_hits == 40
    assert engine.meters.images == 3  # the same three images are shown by forty requests
    assert engine.meters.tokens == sum(map(len, expected))


def test_dynamic_ntk_and_logn_follow_each_prompt(short_pair):
    """seq_length is 24: prompts of 10, 30 and 60 have the factors 1, 3 and 7, side by side."""
    requests = [Request(short_pair.text(length, seed=length), (), 20) for length in (10, 30, 60, 24, 25)]
    engine = Engine(short_pair.model, context=96, slots=5)
    got = ask(engine, requests)
    for number, request in enumerate(requests):
        assert got[number] == alone(short_pair.model, request)


def test_a_sample_follows_from_request_and_seed_alone(pair):
    prompt = pair.text(40)
    request = Request(prompt, (), 30, temperature=1.0, top_p=0.9, seed=7)
    crowd = [
        Request(pair.text(n + 1, seed=n), (), 5 * n + 1, temperature=float(n % 3), top_p=[1.0, 0.5][n % 2], seed=n)
        for n in range(9)
    ]
    by_itself = ask(Engine(pair.model, context=96, slots=1), [request])[0]
    assert by_itself == alone(pair.model, request)
    for slots in (2, 5):
        engine = Engine(pair.model, context=96, slots=slots, steps=3)
        assert ask(engine, [*crowd[:5], request, *crowd[5:]])[5] == by_itself
    other = ask(Engine(pair.model, context=96, slots=1), [dataclasses.replace(request, seed=8)])[0]
    assert other != by_itself


def test_n_samples_are_those_of_their_seeds_and_their_prompt_is_computed_once(pair):
    request = Request(pair.text(40), (), 12, temperature=1.0, seed=3, n=5)
    for slots in (2, 8):  # fewer slots than samples, and more
        engine = Engine(pair.model, context=64, slots=slots)
        got = {completion.sample: completion.tokens for _, completion in engine.run([request])}
        assert engine.meters.prompts == 1
        for sample in range(5):
            one = dataclasses.replace(request, n=1, seed=sample_seed(3, sample))
            assert got[sample] == alone(pair.model, one)
    assert len({tuple(tokens) for tokens in got.values()}) == 5


def test_stops(pair):
    greedy = Request(pair.text(12, seed=5), (), 20)
    engine = Engine(pair.model, context=64, slots=2)
    reply = ask(engine, [greedy])[0]
    one = dataclasses.replace(greedy, stop=[reply[3]])
    two = dataclasses.replace(greedy, stop=[[reply[5], reply[6]], [], [reply[0]] * 30])
    many = dataclasses.replace(greedy, stop=[*(t for t in range(20) if t not in reply), reply[8]])  # beyond STOPS
    completions = dict(engine.run([one, two, many]))
    assert completions[0].tokens == reply[: reply.index(reply[3]) + 1]
    assert completions[1].tokens == reply[:7]
    assert completions[2].tokens == reply[: reply.index(reply[8]) + 1]
    assert {c.finish for c in completions.values()} == {STOP}


def test_logprobs_are_the_models(pair):
    engine = Engine(pair.model, context=64, slots=2, top_logprobs=3)
    ((_, completion),) = engine.run([Request(pair.text(9), (), 6, temperature=1.0)])
    assert completion.finish == LENGTH
    ids = [*pair.text(9).tolist(), *completion.tokens]
    scores = np.asarray(jax.nn.log_softmax(pair.model(np.asarray([ids]))[0]))[8:-1]
    np.testing.assert_allclose(completion.logprobs, scores[range(6), completion.tokens], atol=2e-5)
    for place, best in enumerate(completion.top):
        assert [token for token, _ in best] == np.argsort(-scores[place])[:3].tolist()
        np.testing.assert_allclose([value for _, value in best], -np.sort(-scores[place])[:3], atol=2e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 1, 2)])
def test_over_a_mesh(pair, sizes):
    requests, expected = mixed(pair, 20)
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    model = load_model(pair.folder, sharding_of=partial(sharding_of, mesh))
    engine = Engine(model, context=330, slots=6, mesh=mesh, kernel=attention_kernel("plain", "float32", mesh))
    assert engine.slots % (sizes[0] * sizes[1]) == 0
    got = ask(engine, requests)
    assert [got[n] for n in range(len(requests))] == expected


@pytest.mark.slow
def test_with_the_one_pass_kernel_in_prefill(pair):
    requests, expected = mixed(pair, 10)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = load_model(pair.folder, sharding_of=partial(sharding_of, mesh))
    engine = Engine(model, context=330, slots=4, mesh=mesh, kernel=attention_kernel("flash", "float32", mesh))
    got = ask(engine, requests)
    assert [got[n] for n in range(len(requests))] == expected


# Computed once, kept within bounds


def test_images_that_do_not_fit_the_pool_are_encoded_again(pair):
    spans = [np.array([*pair.image_span(), 5, n]) for n in range(4)]
    images = pair.pixels(4)
    # Each ends in words of its own: of a prompt that a slot still holds not even the image is looked for.
    requests = [Request(np.array([*spans[n], 6 + k]), [images[n]], 2) for k, n in enumerate((0, 1, 2, 3, 0, 0))]
    expected = [alone(pair.model, request) for request in requests]
    for pool, encoded in ((4, 4), (2, 5)):
        engine = Engine(pair.model, context=270, slots=2, images=pool)
        got = ask(engine, requests)
        assert [got[n] for n in range(6)] == expected
        assert (engine.meters.images, engine.meters.image_hits) == (encoded, 6 - encoded)


def test_what_is_asked_waits_for_slots_and_comes_as_it_finishes(pair):
    engine = Engine(pair.model, context=64, slots=2, steps=4)
    long = engine.submit(Request(pair.text(5), (), 40))
    short = [engine.submit(Request(pair.text(5, seed=n), (), 2)) for n in range(1, 5)]
    assert engine.waiting == 5
    finished = []
    while not engine.idle:
        finished += [event.ticket for event in engine.step() if event.completion]
    assert finished == [*short, long]


def test_cancelled_requests_leave_their_slots_to_others(pair):
    engine = Engine(pair.model, context=64, slots=2, steps=4)
    first = engine.submit(Request(pair.text(5), (), 50, n=3))
    waiting = engine.submit(Request(pair.text(6), (), 50))
    last = engine.submit(Request(pair.text(7), (), 3))
    engine.step()
    engine.cancel(first)
    engine.cancel(waiting)
    news = []
    while not engine.idle:
        news += engine.step()
    ended = {(event.ticket, event.sample): event.completion.finish for event in news if event.completion}
    assert ended[last, 0] == LENGTH
    assert {finish for (ticket, _), finish in ended.items() if ticket is not last} == {CANCELLED}
    assert first.finished
    assert waiting.finished
    assert len(ended) == 5


def test_one_sample_is_cancelled_alone(pair):
    """One that runs and one that waits; the others get what they would have got."""
    request = Request(pair.text(5), (), 12, temperature=1.0, seed=3, n=4)
    engine = Engine(pair.model, context=64, slots=2, steps=4)
    expected = {completion.sample: completion.tokens for _, completion in engine.run([request])}
    ticket = engine.submit(request)
    news = engine.step()
    engine.cancel(ticket, 0)
    engine.cancel(ticket, 3)
    while not engine.idle:
        news += engine.step()
    ended = {event.sample: event.completion for event in news if event.completion}
    assert {sample: completion.finish for sample, completion in ended.items()} == {
        0: CANCELLED, 1: LENGTH, 2: LENGTH, 3: CANCELLED
    }  # fmt: skip
    assert {n: ended[n].tokens for n in (1, 2)} == {n: expected[n] for n in (1, 2)}
    assert ended[0].tokens == expected[0][:4]
    assert ticket.finished
    # What is reported of each id comes with it.
    pieces = [event for event in news if event.sample == 1]
    assert [value for event in pieces for value in event.logprobs] == ended[1].logprobs
    assert [token for event in pieces for token in event.tokens] == ended[1].tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 60}, "exceed the context of 64"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"n": 0}, "n must be at least 1"),
        ({"tokens": []}, "at least one id"),
        ({"tokens": [10**6]}, "outside the vocabulary"),
        ({"images": [np.zeros((56, 56, 3), np.uint8)]}, "0 <img> spans but 1 images"),
        ({"stop": [[[1]]]}, "stop must hold ids"),
    ],
)
def test_what_is_refused(pair, change, message):
    engine = Engine(pair.model, context=64, slots=1)
    request = Request(**{"tokens": list(range(9)), "max_new_tokens": 4} | change)
    with pytest.raises(UserError, match=message):
        engine.submit(request)
    assert engine.idle


def test_too_many_images_for_the_pool_are_refused(pair):
    engine = Engine(pair.model, context=600, slots=1, images=1)
    with pytest.raises(UserError, match="shows 2 images and the engine keeps 1"):
        engine.submit(Request([*pair.image_span()] * 2, list(pair.pixels(2)), 1))


def test_requests_of_one_prompt_that_come_together_compute_it_once(pair):
    """As samples of a pool are asked: each with its seed. What each gets is what it would get alone."""
    one = Request(pair.text(40), (), 12, temperature=1.0, seed=3)
    other = Request(pair.text(40, seed=1), (), 12, temperature=1.0, seed=3)
    asked = [*(dataclasses.replace(one, seed=n) for n in range(4)), other, dataclasses.replace(one, seed=9)]
    expected = [alone(pair.model, request) for request in asked]
    for slots, prompts in ((8, 2), (2, 2), (1, 3)):  # one slot holds the other prompt when the last request comes
        engine = Engine(pair.model, context=64, slots=slots)
        for request in asked:
            engine.submit(request).number = asked.index(request)
        got = {}
        while not engine.idle:
            got |= {e.ticket.number: e.completion.tokens for e in engine.step() if e.completion}
        assert [got[n] for n in range(len(asked))] == expected
        assert engine.meters.prompts == prompts
