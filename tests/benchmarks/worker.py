"""A variant without a model, for the tests of turns: measures nothing, or fails as it is told."""

import argparse
from typing import Any

from benchmarks import turns


def measure(options: dict[str, Any]) -> turns.Measured:
    match options["do"]:
        case "fill":
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 99 GiB")
        case "fail":
            raise ValueError("no such attention")
    return turns.Measured(
        device="1 x abacus",
        seconds=[options["seconds"]],
        busy=[options["seconds"]],
        matmul=1.0,
        pairs=19,
        tokens=3720,
        flops=1e12,
        peak_flops=1e13,
        peak=2**30,
        loss=(0.7, 0.6),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--worker")
    turns.worker(measure, parser.parse_args().worker)
