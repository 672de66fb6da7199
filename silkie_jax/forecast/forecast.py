"""`silkie compile`: the real training step, compiled for a machine that is not there, and what it will need.

The real compilers of TPUs and NVIDIA GPUs run on a machine that has neither (topologies.py); `cpu:N` is a dry run on N
pretended devices. A run has one program for each length that rows are padded to. Compiled are those that decide: the
one that most steps take, the one with the longest rows, and the one with the most tokens at once if that is a third.
"""

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from silkie_jax.hardware.topologies import find_devices
from silkie_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from silkie_jax.forecast.lengths import Steps
    from silkie_jax.preference.grid import Grid, Shape
    from silkie_jax.training.trainer import Program

EFFICIENCY = 0.5  # of the chip's peak that a real run reaches; published figures of large models are 0.45 to 0.65
GPU_SHARE = 0.9  # of a GPU's memory for arrays (XLA_PYTHON_CLIENT_MEM_FRACTION): libraries and fragments take the rest
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program of the step, and what compiling it showed (bytes are of one chip).

    Where the compiler itself says that the memory does not suffice, `refused` is its line and the bytes are unknown.
    """

    name: str  # most common, longest or fullest
    steps: tuple[int, int]  # that have this shape, of an epoch's
    shape: "Shape"
    compile_seconds: float
    memory_bytes: float | None  # that a chip has; None: not known
    argument_bytes: float = math.nan
    temporary_bytes: float = math.nan
    peak_bytes: float = math.nan
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    refused: str = ""

    @property
    def fits(self) -> bool:
        return not self.refused and (self.memory_bytes is None or self.peak_bytes <= self.memory_bytes)

    @property
    def most_tokens(self) -> float:
        """Tokens at once that would fit, if temporaries grow with them; half of these where nothing is known."""
        if self.memory_bytes is None or self.refused:
            return self.shape.at_once / 2
        return 0.97 * self.shape.at_once * max(self.memory_bytes - self.argument_bytes, 0) / self.temporary_bytes

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for a program."""
        known = {key: None if value != value else value for key, value in dataclasses.asdict(self).items()}  # no NaN
        return known | {"shape": self.shape._asdict(), "fits": self.fits}

    def line(self) -> str:
        """Whether it fits."""
        about = f"{self.name}, {self.steps[0]:,} of {self.steps[1]:,} steps: {self.shape}: "
        if self.refused:
            return f"{about}DOES NOT FIT: {self.refused}"
        used = f"{self.peak_bytes / GIB:.2f} GiB a chip at the peak"
        parts = f"arguments {self.argument_bytes / GIB:.2f}, temporaries {self.temporary_bytes / GIB:.2f} GiB"
        if self.memory_bytes is None:
            return f"{about}{used}: {parts}"
        return f"{about}{used} of {self.memory_bytes / GIB:.0f}: {parts} -> {'fits' if self.fits else 'DOES NOT FIT'}"


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What compiling showed, and what follows from it by formula.

    Attributes:
      lengths: in words, whose rows they are.
      instructions: of a step, the mean; `rows` is what it has room for.
      in_all: instructions of an epoch.
      pairs_each, responses_each: of an instruction, the means.
      shapes: programs of a run. `compiled`: those that were compiled, the most common one first.
      batch_tokens: where they do not all fit, the limit under which they do (compiled, too); None: there is none.
      flops: of a step.
      seconds: compute, memory, interconnect of a step.
    """

    topology: str
    chips: int
    chip: str
    lengths: str
    rows: int
    instructions: float
    in_all: int
    pairs_each: float
    responses_each: float
    shapes: int
    compiled: list[Compiled]
    batch_tokens: int | None
    flops: float
    seconds: dict[str, float]

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.compiled)

    @property
    def step_seconds(self) -> float:
        """The roofline: the slowest of the three, the compute at EFFICIENCY of the peak."""
        return max(self.seconds.values(), default=float("nan"))

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for a program."""
        own = dataclasses.asdict(self) | {"compiled": [program.as_dict() for program in self.compiled]}
        return own | {"fits": self.fits, "step_seconds": self.step_seconds if self.seconds else None}

    def lines(self, epochs: float) -> list[str]:
        """The report."""
        chips = f"{self.chips} chip{'s' * (self.chips > 1)} ({self.chip})"
        took = " + ".join(f"{program.compile_seconds:.0f}" for program in self.compiled)
        out = [
            f"{self.topology}: {chips}, {self.rows} rows a step, {self.lengths}",
            f"{self.shapes} shapes, {len(self.compiled)} of them compiled in {took} s",
            *(program.line() for program in self.compiled),
        ]
        if not self.fits:
            mend = "no batch_tokens would fit, not even one row a device: set remat=full, mesh.tensor or max_length"
            if self.batch_tokens is not None:
                mend = f"batch_tokens={self.batch_tokens} would fit: its shapes were compiled, too"
            out.append(mend)
        out.append(f"work: {self.flops / 1e15:.2f} PFLOP a step, rematerialisation included, by formula")
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(self.compiled[0].collectives.items()))
        out.append(f"received by each chip in the most common step: {sent or 'nothing'}")
        if self.seconds:
            parts = ", ".join(f"{name} {value:.3f} s" for name, value in self.seconds.items())
            rate = self.instructions / self.step_seconds
            compared = f"{rate * self.pairs_each:.0f} pairs/s"
            if not self.pairs_each:  # sft compares nothing
                compared = f"{rate * self.responses_each:.0f} responses/s"
            hours = epochs * self.in_all / rate / 3600
            whole = f"{hours:.1f} h for {epochs:g} epochs of {self.in_all:,} instructions"
            out += [
                f"FORECAST (roofline, not a measurement; compute at {EFFICIENCY:.0%} of the peak): {parts}",
                f"FORECAST: {self.step_seconds:.2f} s a step, {rate:.1f} instructions/s, {compared}, {whole}",
            ]
        return out


def forecast(
    config: TrainConfig, topology: str, tokens: int | None = None, say: Callable[[str], None] = print
) -> Forecast:
    """Compiles the training step of a configuration for a topology such as v5e:4x4, h100:8 or cpu:8.

    Where the model's folder is not there, the published Qwen-VL-Chat is meant; lengths.py says which rows are.

    Args:
      tokens: rows that are all padded to so many tokens are meant.
      say: is told what is compiled: each takes a minute or two at full size.

    Raises:
      UserError: the topology is unknown, its compiler is not installed, or the corpus is not sound.
    """
    from silkie_jax.forecast.lengths import find_steps, work_of
    from silkie_jax.hardware.chips import find_chip
    from silkie_jax.hardware.mesh import make_mesh
    from silkie_jax.models.qwen_vl.config import QWEN_VL_CHAT, QwenVLConfig
    from silkie_jax.models.qwen_vl.flops import step_flops
    from silkie_jax.training.config import training_of
    from silkie_jax.training.trainer import Program

    devices = find_devices(topology)
    model = QwenVLConfig.from_folder(config.model) if Path(config.model).exists() else QWEN_VL_CHAT
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    program = Program(config, model, mesh, steps=1000)
    chip = find_chip(mesh.devices.flat[0].device_kind)
    memory = chip.memory * (1 if chip.name.startswith("TPU") else GPU_SHARE) if chip else None
    steps = find_steps(config, mesh, tokens)
    compiler = _Compiler(program, memory, say)
    counts = _an_epoch(steps.grid)
    compiled = compiler.compile(counts)
    fitting = None if all(one.fits for one in compiled) else compiler.find_limit(steps, compiled)
    config = dataclasses.replace(config, attention=program.step.kernel.name)
    plan = steps.grid.plan
    work, epoch = work_of(plan.sizes), plan.steps_per_epoch
    flops = step_flops(model, work, training_of(config)).hardware / epoch
    seconds = {}
    if chip:
        seconds = {
            "compute": flops / mesh.devices.size / chip.bf16 / EFFICIENCY,
            "memory": _traffic(config, program, compiled[0].shape) / chip.bandwidth,
            "interconnect": sum(compiled[0].collectives.values()) / chip.link,
        }
    return Forecast(
        topology=topology,
        chips=mesh.devices.size,
        chip=chip.name if chip else mesh.devices.flat[0].device_kind,
        lengths=steps.what,
        rows=config.batch_rows * config.accumulate,
        instructions=work.rows / epoch,
        in_all=work.rows,
        pairs_each=work.pairs / work.rows,
        responses_each=work.responses / work.rows,
        shapes=len(counts),
        compiled=compiled,
        batch_tokens=fitting,
        flops=flops,
        seconds=seconds,
    )


class _Compiler:
    """Compiles the shapes of a run that decide, each once."""

    def __init__(self, program: "Program", memory: float | None, say: Callable[[str], None]):
        self._program, self._memory, self._say = program, memory, say
        self._known: dict[Shape, Compiled] = {}

    def compile(self, counts: Counter["Shape"]) -> list[Compiled]:
        """The most common shape, the longest one, and the one with the most tokens at once."""
        ((common, _),) = counts.most_common(1)
        longest = max(counts, key=lambda s: (s.tokens, s.sequences))
        chosen = {common: "most common", longest: "longest"}
        if longest == common:
            chosen = {common: "most common and longest"}
        fullest = max(counts, key=lambda s: s.at_once)
        if fullest.at_once > max(shape.at_once for shape in chosen):
            chosen[fullest] = "fullest"
        return [
            dataclasses.replace(self._of(shape, name), name=name, steps=(counts[shape], counts.total()))
            for shape, name in chosen.items()
        ]

    def find_limit(self, steps: "Steps", compiled: list[Compiled]) -> int | None:
        """The `batch_tokens` under which everything fits, tried until it does; None: not even a row a device would."""
        from silkie_jax.preference.grid import Grid

        old = steps.grid
        limit = max(one.shape.at_once for one in compiled)
        while limit > old.least_tokens:
            limit = min([limit - 1, *(int(one.most_tokens) for one in compiled if not one.fits)])
            limit = max(limit // 1024 * 1024, old.least_tokens)
            grid = Grid(
                old.plan,
                rows=old.rows,
                accumulate=old.accumulate,
                shards=old.shards,
                pack=old.pack,
                tokens=limit,
                fine=old.fine,
            )
            compiled = self.compile(_an_epoch(grid))
            if all(one.fits for one in compiled):
                return limit
        return None

    def _of(self, shape: "Shape", name: str) -> Compiled:
        from silkie_jax.forecast.collectives import collective_bytes

        if shape in self._known:
            return self._known[shape]
        self._say(f"compiling the {name} shape: {shape}")
        began = time.monotonic()
        try:
            compiled = self._program.lower(shape).compile()
        except Exception as e:  # the TPU compiler raises its own type when memory is exceeded
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            took = time.monotonic() - began
            found = Compiled(name, (0, 0), shape, took, self._memory, refused=_first_line(e))
        else:
            took = time.monotonic() - began
            sizes: Any = compiled.memory_analysis()
            peak = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
            peak += sizes.output_size_in_bytes - sizes.alias_size_in_bytes
            found = Compiled(
                name,
                (0, 0),
                shape,
                took,
                self._memory,
                sizes.argument_size_in_bytes,
                sizes.temp_size_in_bytes,
                peak,
                collective_bytes(compiled.as_text() or ""),
            )
        self._known[shape] = found
        return found


def _an_epoch(grid: "Grid") -> Counter["Shape"]:
    """How many steps of an epoch have each shape."""
    return grid.shapes(range(grid.plan.steps_per_epoch))


def _traffic(config: TrainConfig, program: "Program", shape: "Shape") -> float:
    """Bytes a chip reads and writes a step: each pass reads all weights, a layer some tens of activations a token."""
    import jax
    import numpy as np

    from silkie_jax.training.config import training_of

    state, mesh = program.shapes, program.mesh
    weights = sum(np.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((state.trainable, state.frozen)))
    passes = 2 + (config.remat == "full") + (config.reference in ("adapter_off", "copy"))
    passes += training_of(config).null_passes
    model = program.model_config
    rows = shape.sequences / (mesh.shape["data"] * mesh.shape["fsdp"])
    width = 10 * model.hidden_size + 6 * model.mlp_width + 4 * model.attention_width
    layer = rows * shape.tokens * width * 2
    if config.attention == "plain":
        layer += rows * model.num_attention_heads * shape.tokens**2 * 12
    return shape.batches * passes * (weights + model.num_hidden_layers * layer) / mesh.shape["tensor"]


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:300]
