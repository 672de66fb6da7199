"""What the benchmarks share: where a measurement was made, and keeping it."""

import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "peft")


def machine() -> str:
    """The accelerator that JAX sees, the processor and the versions, in one line."""
    import jax

    device = jax.devices()[0]
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return (
        f"{jax.device_count()} x {device.device_kind}, {platform.machine()}, Python {platform.python_version()}, "
        + (", ".join(found))
    )


def keep(name: str, text: str, out: str | None) -> None:
    """Prints a result, and writes it to `out`, or to benchmarks/results where `out` is `results`."""
    body = f"# {name}, {date.today()}\n\n{machine()}\n\n{text}\n"
    print(body)
    if out:
        path = Path(__file__).parent / "results" / f"{name}-{date.today()}.md" if out == "results" else Path(out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body)
        print(f"kept in {path.name}")
