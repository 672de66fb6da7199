"""`silkie serve`: a model behind the OpenAI protocol on this machine."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from silkie_jax.errors import UserError
from silkie_jax.generation.defaults import read_defaults
from silkie_jax.generation.opening import open_engine
from silkie_jax.hardware.mesh import make_mesh
from silkie_jax.scoring.scorer import Scorer
from silkie_jax.serving.limits import Limits, as_refused
from silkie_jax.serving.model import ServedModel

try:
    import uvicorn

    from silkie_jax.serving.app import make_app
    from silkie_jax.serving.house import House
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
        raise
    raise UserError(f"serving a model needs {error.name}: pip install 'silkie-jax[serve]'") from None

_STEPS = 8  # tokens between two looks at the queue, and of a streamed event
_LOCAL = ("127.0.0.1", "localhost", "::1")
_PATIENCE = 5.0  # seconds for the engine's thread to end what it computes


@dataclass(frozen=True)
class ServeOptions:
    """What is served, where and how.

    Attributes:
        model, adapter, dtype: the checkpoint, a PEFT folder, and the type to compute in.
        names: what clients may call it, first what it calls itself; none: the folder's name, with the adapter's after a
          plus.
        quantize: int8: large weights in 8 bits.
        host, port: where to listen; port 0 is any that is free.
        allow_hosts: other names by which clients may call this machine.
        api_key_env: the environment variable with the key that clients must show; None: they need none.
        slots: replies that are generated together; None: as many as there is memory for.
        context: the most tokens of a prompt and its reply.
        queue: replies that may wait beyond those in slots.
        top_logprobs: how many of the most probable tokens a request may ask for at each place.
        mesh: devices along data, fsdp and tensor, as in `make_mesh`.
        end_with_stdin: end when standard input does, with whoever started this.
    """

    model: str
    adapter: str | None = None
    dtype: str = "bfloat16"
    quantize: str | None = None
    names: Sequence[str] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    allow_hosts: Sequence[str] = ()
    api_key_env: str | None = None
    slots: int | None = None
    context: int = 2048
    queue: int = 256
    top_logprobs: int = 5
    mesh: tuple[int, int, int] = (-1, 1, 1)
    limits: Limits = field(default_factory=Limits)
    end_with_stdin: bool = False

    @property
    def called(self) -> str:
        return (
            self.names[0]
            if self.names
            else "+".join(Path(path).resolve().name for path in (self.model, self.adapter) if path)
        )


def serve(options: ServeOptions) -> None:
    """Serves until it is told to stop; prints `serving at URL` once requests are answered.

    Raises:
      UserError: an option or the checkpoint is not sound, or the engine failed.
    """
    _check(options)
    key = _read_key(options.api_key_env)
    with _listen(options.host, options.port) as listener:
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{listener.getsockname()[1]}/v1"
        if key is None and options.host not in _LOCAL:
            _say(f"whoever reaches {options.host} can use this server: --api-key-env asks for a key")

        def ready() -> None:
            print(f"serving at {url}", flush=True)

        load = partial(load_served, options)
        house = House(
            options.called, load, options.limits, queue=options.queue, ready=ready, ended=lambda: server.end()
        )
        server = make_server(house, hosts=[options.host, *options.allow_hosts], key=key)
        if options.end_with_stdin:
            threading.Thread(target=_end_with_stdin, daemon=True).start()
        # uvicorn raises a signal again when all requests have ended; it is no error then.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listener])
    ended = house.thread.stop(_PATIENCE)
    error = house.thread.error
    if error is not None and not isinstance(error, UserError):
        traceback.print_exception(error)
        error = UserError(f"the engine failed: {as_refused(error)}")
    if error is not None:
        raise error
    if not ended:  # it is loading or compiling, which nothing can interrupt
        sys.stdout.flush()
        os._exit(0)


class Server(uvicorn.Server):
    """uvicorn's, which tells the house when it is to stop."""

    def __init__(self, config: uvicorn.Config, house: House):
        super().__init__(config)
        self._house = house

    def end(self) -> None:
        """Stops letting clients in, and returns from `run` when those inside have their answers."""
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._house.stop()
        await super().shutdown(sockets)


def make_server(house: House, hosts: Sequence[str] = (), key: str | None = None) -> Server:
    """The HTTP server of a house; `run` it with a listening socket."""
    config = uvicorn.Config(
        make_app(house, hosts, key),
        http="h11",
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(house.drain) + 5,
    )
    return Server(config, house)


def load_served(options: ServeOptions) -> ServedModel:
    """Loads the model and compiles all that generation needs.

    Raises:
      UserError: what is wrong with the checkpoint or an option, in one line.
    """
    began = time.monotonic()
    defaults = read_defaults(options.model)
    mesh = make_mesh(*options.mesh)
    engine, tokenizer = open_engine(
        options.model,
        adapter=options.adapter,
        dtype=options.dtype,
        quantize=options.quantize,
        mesh=mesh,
        say=_say,
        context=options.context,
        slots=options.slots,
        steps=_STEPS,
        images=max(64, options.limits.images),
        top_logprobs=options.top_logprobs,
    )
    _say(f"loaded {options.called} in {time.monotonic() - began:.1f} s")
    engine.warm_up(_say)
    scorer = Scorer(
        engine.model,
        tokenizer,
        mesh,
        batch_rows=1,
        max_length=options.context,
        workers=1,
        kernel=engine.kernel,
        few_programs=True,
    )
    return ServedModel(options.called, tokenizer, engine, scorer, defaults, options.top_logprobs, tuple(options.names))


def _check(options: ServeOptions) -> None:
    limits = options.limits
    for name, value, least in (
        ("queue", options.queue, 0),
        ("top-logprobs", options.top_logprobs, 0),
        ("max-body", limits.body, 1),
        ("max-images", limits.images, 0),
        ("max-pixels", limits.pixels, 1),
        ("max-n", limits.n, 1),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}")
    if not limits.seconds > 0:
        raise UserError(f"--timeout must be more than 0 seconds, not {limits.seconds:g}")


def _read_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(f"--api-key-env: the environment variable {name} is not set: put the API key there")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything is loaded: a port that is taken is said at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port} ({reason}); choose another --port or --host") from None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _end_with_stdin() -> None:
    # Not sys.stdin: its lock, held by a thread that waits, would end a shutdown in an error.
    while os.read(0, 4096):
        pass
    os._exit(0)
