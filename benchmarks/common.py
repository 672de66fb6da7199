"""What the benchmarks share: where a measurement was made, and keeping it."""

import functools
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")


@functools.cache
def devices() -> str:
    """`N x KIND`, the devices that JAX finds. Another process asks: this one must not take their memory."""
    code = "import jax; print(jax.device_count(), 'x', jax.devices()[0].device_kind)"
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout.strip() or "no device"


def machine() -> str:
    """The devices, the processor and the versions, in one line."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{devices()}, {platform.machine()}, Python {platform.python_version()}, " + ", ".join(found)


def keep(name: str, text: str, out: str | None, *, finished: bool = True) -> None:
    """Writes a result to the file or into the folder `out`, where `results` is the one here; prints it when finished.

    Called after each part of a measurement, so that one which is cut off keeps what it has.
    """
    body = f"# {name}, {date.today()}\n\n{machine()}\n\n{text}\n"
    if finished:
        print(body)
    if out:
        path = Path(__file__).parent / "results" if out == "results" else Path(out)
        if out == "results" or path.is_dir():
            path /= f"{name}-{date.today()}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
        if finished:
            print(f"kept in {path.name}")
