"""`silkie compile`: the real training step, compiled for a machine that is not there, and what it will need.

The real compilers of TPUs and NVIDIA GPUs run on a machine that has neither (topologies.py); `cpu:N` is a dry run on N
pretended devices.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError
from silkie_jax.hardware.topologies import find_devices
from silkie_jax.training.config import TrainConfig

EFFICIENCY = 0.5  # of the chip's peak that a real run reaches; published figures of large models are 0.45 to 0.65
INSTRUCTIONS = 80_258  # of VLFeedback as published, for hours of a whole run
PAIRS_EACH = 4.75
GPU_SHARE = 0.9  # of a GPU's memory for arrays (XLA_PYTHON_CLIENT_MEM_FRACTION): libraries and fragments take the rest


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The row that a forecast is for: what it is padded to, and what it holds."""

    tokens: int = 1024
    labels: int = 640
    prompt: int = 330
    responses: tuple[int, ...] = (150, 150, 150, 150)

    @classmethod
    def of(cls, tokens: int) -> "Lengths":
        """A row of the published corpus, with responses so long that it fills `tokens` as the default fills 1,024."""
        from silkie_jax.preference.batches import bucket

        most = 4 * ((tokens * 930 // 1024 - cls.prompt) // 4)
        if most < 4 * 8:
            raise UserError(
                f"--tokens {tokens}: too few for a prompt with an image and four responses; give 512 or more"
            )
        return cls(tokens, bucket(most), responses=(most // 4,) * 4)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What compiling showed (bytes are of one chip), and what follows from it by formula."""

    topology: str
    chips: int
    chip: str
    rows: int  # that a step has room for
    instructions: float  # that it holds, if `batch_pairs` limits them
    compile_seconds: float
    argument_bytes: float
    temporary_bytes: float
    peak_bytes: float
    memory_bytes: float | None
    flops: float
    collectives: dict[str, float]
    seconds: dict[str, float]  # compute, memory, interconnect

    @property
    def fits(self) -> bool:
        return self.memory_bytes is None or self.peak_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the three, the compute at EFFICIENCY of the peak."""
        return max(self.seconds.values(), default=float("nan"))

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for a program."""
        return dataclasses.asdict(self) | {"fits": self.fits, "step_seconds": self.step_seconds}

    def lines(self, epochs: float) -> list[str]:
        """The report."""
        gib = 2**30
        used = f"{self.peak_bytes / gib:.2f} GiB a chip at the peak"
        room = verdict = ""
        if self.memory_bytes is not None:
            room = f" of {self.memory_bytes / gib:.0f} GiB ({self.chip})"
            verdict = " -> fits" if self.fits else " -> DOES NOT FIT: fewer batch_rows, or remat=full"
        chips = f"{self.chips} chip{'s' * (self.chips > 1)}"
        out = [
            f"{self.topology}: {chips}, {self.rows} rows a step, compiled in {self.compile_seconds:.0f} s",
            f"memory: {used}{room}: arguments {self.argument_bytes / gib:.2f}, temporaries "
            f"{self.temporary_bytes / gib:.2f} GiB{verdict}",
            f"work: {self.flops / 1e15:.2f} PFLOP a step, rematerialisation included, by formula",
        ]
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(self.collectives.items()))
        out.append(f"received by each chip a step: {sent or 'nothing'}")
        if self.seconds:
            parts = ", ".join(f"{name} {value:.3f} s" for name, value in self.seconds.items())
            rate = self.instructions / self.step_seconds
            hours = epochs * INSTRUCTIONS / rate / 3600
            whole = f"{hours:.1f} h for {epochs:g} epochs of {INSTRUCTIONS:,} instructions"
            out += [
                f"FORECAST (roofline, not a measurement; compute at {EFFICIENCY:.0%} of the peak): {parts}",
                f"FORECAST: {self.step_seconds:.2f} s a step, {rate:.1f} instructions/s, "
                f"{rate * PAIRS_EACH:.0f} pairs/s, {whole}",
            ]
        return out


def forecast(config: TrainConfig, topology: str, lengths: Lengths) -> Forecast:
    """Compiles the training step of a configuration for a topology such as v5e:4x4, h100:8 or cpu:8.

    Where the model's folder is not there, the published Qwen-VL-Chat is meant.

    Raises:
      UserError: the topology is unknown, its compiler is not installed, or the step does not fit the chip's memory.
    """
    from silkie_jax.forecast.collectives import collective_bytes
    from silkie_jax.hardware.chips import find_chip
    from silkie_jax.hardware.mesh import batch_shards, make_mesh
    from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
    from silkie_jax.preference.batches import Shape, round_up
    from silkie_jax.training.trainer import Program

    devices = find_devices(topology)
    model = QwenVLConfig.from_folder(config.model) if Path(config.model).exists() else QWEN_VL_CHAT
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    program = Program(config, model, mesh, steps=1000)
    shape = Shape(
        sequences=round_up(config.batch_rows, batch_shards(mesh)),
        tokens=lengths.tokens,
        labels=lengths.labels,
        pairs=6,
        images=1,
        branches=round_up(len(lengths.responses), 4),
    )
    began = time.monotonic()
    try:
        compiled = program.lower(shape).compile()
    except Exception as e:  # the TPU compiler raises its own type when memory is exceeded
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(f"{topology}: does not fit the chip: {_first_line(e)}; use fewer batch_rows") from None
    took = time.monotonic() - began
    memory: Any = compiled.memory_analysis()
    config = dataclasses.replace(config, attention=program.step.kernel.name)
    collectives = collective_bytes(compiled.as_text() or "")
    chip = find_chip(mesh.devices.flat[0].device_kind)
    flops = _flops(config, model, lengths)
    seconds = {}
    if chip:
        chips = mesh.devices.size
        seconds = {
            "compute": flops / chips / chip.bf16 / EFFICIENCY,
            "memory": _traffic(config, program, lengths) / chip.bandwidth,
            "interconnect": sum(collectives.values()) / chip.link,
        }
    rows = config.batch_rows * config.accumulate
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    peak += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Forecast(
        topology=topology,
        chips=mesh.devices.size,
        chip=chip.name if chip else mesh.devices.flat[0].device_kind,
        rows=rows,
        instructions=min(rows, config.batch_pairs / PAIRS_EACH) if config.batch_pairs else rows,
        compile_seconds=took,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        peak_bytes=peak,
        memory_bytes=chip.memory * (1 if chip.name.startswith("TPU") else GPU_SHARE) if chip else None,
        flops=flops,
        collectives=collectives,
        seconds=seconds,
    )


def _flops(config: TrainConfig, model: Any, lengths: Lengths) -> float:
    from silkie_jax.models.qwen_vl.flops import step_flops
    from silkie_jax.preference.counts import row_work
    from silkie_jax.training.config import training_of

    labels = sum(max(n - 2, 0) for n in lengths.responses)
    work = row_work(lengths.prompt, lengths.responses, labels) * (config.batch_rows * config.accumulate)
    return step_flops(model, work, training_of(config)).hardware


def _traffic(config: TrainConfig, program: Any, lengths: Lengths) -> float:
    """Bytes a chip reads and writes a step: each pass reads all weights, a layer some tens of activations a token."""
    import jax
    import numpy as np

    state, mesh = program.shapes, program.mesh
    weights = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((state.trainable, state.frozen)))
    passes = 2 + (config.remat == "full") + (config.reference in ("adapter_off", "copy"))
    model = program.model_config
    rows = config.batch_rows / (mesh.shape["data"] * mesh.shape["fsdp"])
    width = 10 * model.hidden_size + 6 * model.mlp_width + 4 * model.attention_width
    layer = rows * lengths.tokens * width * 2
    if config.attention == "plain":
        layer += rows * model.num_attention_heads * lengths.tokens**2 * 12
    return config.accumulate * passes * (weights + model.num_hidden_layers * layer) / mesh.shape["tensor"]


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
