"""What accelerators can do, by their makers' data sheets: the ceilings of forecasts and of utilisation."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of JAX.

    bf16: dense bfloat16 FLOP/s. memory: bytes. bandwidth: bytes/s of that memory. link: bytes/s that one chip can send
    to its neighbours over the fast interconnect (one direction).
    """

    name: str
    bf16: float
    memory: float
    bandwidth: float
    link: float
    source: str


_TPU = "Cloud TPU documentation, system architecture of "
_NVIDIA = "NVIDIA data sheet of "
# Google gives interconnect in Gbit/s a chip, both directions; NVIDIA gives NVLink in bytes/s, both directions.
CHIPS = (
    Chip("TPU v4", 275e12, 32 * 2**30, 1228e9, 2400e9 / 8 / 2, _TPU + "v4"),
    Chip("TPU v5 lite", 197e12, 16 * 2**30, 819e9, 1600e9 / 8 / 2, _TPU + "v5e"),
    Chip("TPU v5", 459e12, 95 * 2**30, 2765e9, 4800e9 / 8 / 2, _TPU + "v5p"),
    Chip("TPU v6 lite", 918e12, 32 * 2**30, 1640e9, 3584e9 / 8 / 2, _TPU + "v6e"),
    Chip("A100", 312e12, 80e9, 2039e9, 300e9, _NVIDIA + "the A100 80GB SXM"),
    Chip("H100", 989e12, 80e9, 3350e9, 450e9, _NVIDIA + "the H100 SXM"),
    Chip("H200", 989e12, 141e9, 4800e9, 450e9, _NVIDIA + "the H200 SXM"),
    # Without NVLink: PCIe 4.0 x16. Of GeForce the rate with float32 accumulation, half of that with float16.
    Chip("RTX 3090", 71e12, 24e9, 936e9, 32e9, "NVIDIA Ampere GA102 whitepaper, appendix A"),
    Chip("RTX 4090", 165.2e12, 24e9, 1008e9, 32e9, "NVIDIA Ada whitepaper, appendix A"),
    Chip("L4", 121e12, 24e9, 300e9, 32e9, _NVIDIA + "the L4"),
    Chip("A10G", 70e12, 24e9, 600e9, 32e9, _NVIDIA + "the A10G"),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`; None for one that is not listed (such as a CPU)."""
    # JAX knows two of them by two names each.
    device_kind = {"TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}.get(device_kind, device_kind)
    # "TPU v5p" and "NVIDIA H100 80GB HBM3" say more than the table, "TPU v5 lite" must not be taken for "TPU v5", nor
    # an L40 for an L4. A laptop's GPU is another one than its name says.
    named = [chip for chip in CHIPS if re.search(rf"{chip.name}(?!\d)", device_kind) and "Laptop" not in device_kind]
    return max(named, key=lambda chip: len(chip.name), default=None)


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler wants to know of an NVIDIA GPU that is not there (CUDA programming guide, data sheets).

    shared_memory: bytes that one block can have. fpus: float32 units of a multiprocessor, and threads: the most that it
    holds. l2_cache: bytes.
    """

    chip: Chip
    capability: tuple[int, int]
    multiprocessors: int
    fpus: int
    threads: int
    shared_memory: int
    l2_cache: int
    clock_ghz: float


_GPUS: dict[str, tuple[Any, ...]] = {
    "a100": ("A100", (8, 0), 108, 64, 2048, 163 * 1024, 40 * 2**20, 1.41),
    "h100": ("H100", (9, 0), 132, 128, 2048, 227 * 1024, 50 * 2**20, 1.98),
    "h200": ("H200", (9, 0), 132, 128, 2048, 227 * 1024, 50 * 2**20, 1.98),
    "rtx3090": ("RTX 3090", (8, 6), 82, 128, 1536, 99 * 1024, 6 * 2**20, 1.7),
    "rtx4090": ("RTX 4090", (8, 9), 128, 128, 1536, 99 * 1024, 72 * 2**20, 2.52),
    "l4": ("L4", (8, 9), 58, 128, 1536, 99 * 1024, 48 * 2**20, 2.04),
    "a10g": ("A10G", (8, 6), 80, 128, 1536, 99 * 1024, 6 * 2**20, 1.71),
}


def find_gpu(name: str) -> Gpu | None:
    """The GPU called `name` on the command line, such as h100."""
    if name not in _GPUS:
        return None
    known, *rest = _GPUS[name]
    chip = find_chip(known)
    assert chip is not None, known
    return Gpu(chip, *rest)
