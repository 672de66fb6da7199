"""The benchmarks by name: adding one is adding a file and a line here."""

import importlib
from typing import TYPE_CHECKING, cast

from silkie_jax.errors import UserError

if TYPE_CHECKING:
    from silkie_jax.evaluation.benchmark import Benchmark

BENCHMARKS = {
    "mme": "mme",
    "mmhal": "mmhal",
    "mmvet": "mmvet",
    "pope": "pope",
    "hallusionbench": "hallusionbench",
    "amber": "amber",
    "seedbench": "seedbench",
    "mathvista": "mathvista",
    "valor": "valor",
    "mrag": "mrag",
    "chair": "chair",
    "objects": "objects",
    "llava_bench": "llava_bench",
    "yesno": "yesno",
    "mcq": "mcq",
}
"""Name on the command line -> module of this package."""


def find_benchmark(name: str) -> "Benchmark":
    """The module of a benchmark.

    Raises:
        UserError: there is none of that name.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return cast("Benchmark", importlib.import_module(f"silkie_jax.evaluation.{BENCHMARKS[name]}"))
