"""A tiny model, and servers of it in threads of this process."""

import base64
import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest

from silkie_jax.generation.requests import Request
from silkie_jax.models.qwen_vl.chat import chat_prompt
from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.serving.limits import Limits
from tests.training.support import image_bytes, make_tiny

pytest.importorskip("uvicorn")

from silkie_jax.serving.house import READY, House
from silkie_jax.serving.serve import ServeOptions, load_served, make_server

CONTEXT = 704  # two images and some words
SLOTS = 4


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("served"), layers=1, vision_layers=1)


@pytest.fixture(scope="session")
def served(checkpoint):
    """Its engine works for one server at a time."""
    options = ServeOptions(str(checkpoint), dtype="float32", slots=SLOTS, context=CONTEXT, mesh=(1, 1, 1))
    return load_served(options)


class Running:
    """A server in a thread; `url` and `house` are what tests ask."""

    def __init__(self, served, checkpoint=None, key=None, hosts=(), **house):
        self.served, self.checkpoint = served, checkpoint
        ready = threading.Event()
        options = {"limits": Limits(), "ready": ready.set, "ended": lambda: self.server.end(), **house}
        self.house = House(served.name, lambda: served, **options)
        self.server = make_server(self.house, hosts, key)
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        assert ready.wait(30)
        assert self.house.state == READY

    def stop(self):
        self.server.end()
        self.thread.join(30)
        assert self.house.thread.stop(30)

    def idle(self, seconds=20.0):
        """Waits until nobody is inside and nothing is computed."""
        end = time.monotonic() + seconds
        while self.house.health()["replies"] or not self.served.engine.idle:
            assert time.monotonic() < end, self.house.health()
            time.sleep(0.02)

    def alone(self, text, *images, most=12, prefix="", **options):
        """The completions of a request that has the engine for itself, in the thread that owns it."""
        self.idle()
        model = self.served.tokenizer
        tokens = chat_prompt(model, text, len(images)).tokens + model.encode(prefix)
        pixels = [read_image(image_bytes(number), self.served.image_size) for number in images]
        request = Request(tokens, pixels, most, stop=(model.im_end, model.im_start), **options)
        found = concurrent.futures.Future()
        self.house.thread._inbox.put(lambda: found.set_result(list(self.served.engine.run([request]))))
        return sorted((reply for _, reply in found.result(60)), key=lambda reply: reply.sample)


@pytest.fixture
def running(served):
    """Makes servers that end with the test."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Running(served, **options)
            stack.callback(made.stop)
            return made

        yield make


@pytest.fixture(scope="module")
def server(served, checkpoint):
    made = Running(served, checkpoint)
    yield made
    made.stop()


def data_url(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(image_bytes(number)).decode()


def user(text: str, *images: int) -> dict:
    """A message with the images of these numbers."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(number)}} for number in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
