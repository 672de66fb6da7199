"""What the programs of this folder stand on that take a road of public commands: stages that are done once, the world's
server while it is needed, and how figures are shown."""

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from examples.world.base import SHIPPED, fingerprint
from silkie_jax.evaluation.report.runs import Measured, changed_figures

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SILKIE = Path(sys.executable).with_name("silkie")
BASE = Path(os.path.relpath(SHIPPED))
DONE = ".done"
CORES = 2
"""JAX takes each for a device. Another number gives other sums in training, and so another table."""

SizesT = TypeVar("SizesT", bound="DataclassInstance")


class Road(Generic[SizesT]):
    """Stages in a folder; each is done once, and a file in `.done` says so.

    Args:
        name: of the program under `examples`.
        folder: of all that it makes.
        seed: of everything.
        sizes: a dataclass: how much of everything.
        settings: files that decide what comes of it.

    Raises:
        SystemExit: the folder holds something else, or what was begun with other arguments, settings or another base.
    """

    def __init__(self, name: str, folder: Path, seed: int, sizes: SizesT, settings: Iterable[Path] = ()):
        self.name, self.folder, self.seed, self.sizes = name, folder, seed, sizes
        marker = marker_of(name, folder)
        asked = {"seed": seed, **asdict(sizes), "base": fingerprint(BASE)}
        asked["settings"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(settings)}
        if marker.exists():
            begun = json.loads(marker.read_text() or "{}")
            if begun != asked:
                others = ", ".join(_differing(begun, asked))
                sys.exit(f"{name}: {folder} was begun with another {others}: remove it or name another folder")
            print(f"{name}: going on in {folder}")
        elif folder.exists() and any(folder.iterdir()):
            sys.exit(f"{name}: {folder} is not empty and was not made by this program; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        part = folder.with_name(f"{folder.name}{marker.name}")  # beside it: the marker is there whole or not at all
        part.write_text(json.dumps(asked))
        part.replace(marker)
        (folder / DONE).mkdir(exist_ok=True)

    def stage(self, name: str, about: str, work: Callable[[], None]) -> None:
        """Do a stage, unless it was done."""
        done = self.folder / DONE / name
        print(f"\n== {about}{' (done before)' if done.exists() else ''}", flush=True)
        if done.exists():
            return
        began = time.monotonic()
        work()
        done.write_text(f"{time.monotonic() - began:.1f} s\n")

    def silkie(self, *arguments: str | Path) -> None:
        """Show a `silkie` command and run it; end here if it fails."""
        self.show_and_run("silkie", [SILKIE], arguments)

    def python(self, module: str, *arguments: str | Path) -> None:
        """Show a program of the examples and run it; end here if it fails."""
        self.show_and_run(f"python -m {module}", [sys.executable, "-m", module], arguments)

    def show_and_run(self, shown: str, program: list[str | Path], arguments: tuple[str | Path, ...]) -> None:
        words = [str(argument) for argument in arguments]
        print(f"$ {shown} {shlex.join(words)}", flush=True)
        if status := subprocess.run([*program, *words]).returncode:
            sys.exit(f"{self.name}: `{shown}` ended with status {status}; the same command continues from here")


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Keys of which the values differ; of a table in it, those keys."""
    found = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(b, dict):
            found += _differing(a if isinstance(a, dict) else {}, b)
        elif a != b:
            found.append(key)
    return found


def marker_of(name: str, folder: Path) -> Path:
    """The file that says that a program made a folder, and what it was asked for, as JSON."""
    return folder / f".made-by-{name}"


def seconds(folder: Path, stage: str) -> float:
    """What a stage took that is done; a stage that was killed counts from where it went on."""
    return float((folder / DONE / stage).read_text().split()[0])


def use_two_cores(folder: Path) -> None:
    """Has the commands take CORES devices and keep what they compile in the folder, unless the environment says
    otherwise."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str((folder / "compiled").resolve()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # the small ones, too, by dozens
    os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count={CORES}")


@contextlib.contextmanager
def pool_of(world: Path, seed: int) -> Iterator[str]:
    """The models and the judge behind a URL, until the block ends."""
    command = [sys.executable, "-m", "examples.world.pool", str(world), "--port", "0", "--seed", str(seed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.stdin.close()


# Tables


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table, its first line being its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(rows) + "\n"


def shown(measured: Measured | None, name: str) -> str:
    """A figure; empty where the benchmark was not asked."""
    if measured is None:
        return ""
    figure: dict[str, Any] | None = measured.figure(name)
    value = figure["value"] if figure else None
    return "–" if value is None else f"{value:.1f}" if value >= 2 else f"{value:.3f}"


def change(before: Measured, after: Measured, name: str) -> str:
    """How a figure has changed, with its 95 % interval by bootstrap over scenes."""
    found = changed_figures(before, after)[name]
    digits = 1 if abs(found.value) >= 1 or name == "words" else 3
    return f"{found.value:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"
