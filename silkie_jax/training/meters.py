"""Throughput: rates, utilisation, time spent waiting for input, memory."""

import contextlib
import time
from collections.abc import Iterable, Iterator

import jax

from silkie_jax.hardware.chips import find_chip
from silkie_jax.models.qwen_vl.flops import step_flops
from silkie_jax.preference.batches import Batch
from silkie_jax.preference.counts import Work
from silkie_jax.training.config import training_of
from silkie_jax.training.trainer import Program


class Meters:
    """Counts work and time between reports.

    Reported: step_seconds; tokens_, instructions_ and pairs_per_second (sft: responses_per_second); input_wait, the
    share of the time spent waiting for batches; mfu, model FLOPs / seconds / devices / peak bfloat16 rate, on known
    chips; and memory_gib, the peak of one device, where the platform tells.
    """

    def __init__(self, program: Program):
        self._model, self._training = program.model_config, training_of(program.config)
        self._counted = "responses" if program.config.objective == "sft" else "pairs"
        devices = program.mesh.devices.ravel()
        self._device, self._count = next(d for d in devices if d.process_index == jax.process_index()), len(devices)
        self._chip = find_chip(devices[0].device_kind)
        self._total, self._total_seconds, self._total_steps = Work(), 0.0, 0
        self._restart()

    def _restart(self) -> None:
        self._work, self._steps, self._waited, self._began = Work(), 0, 0.0, time.monotonic()

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Passes batches on and measures how long they let themselves be waited for."""
        iterator = iter(batches)
        while True:
            before = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - before
            yield batch

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        before = time.monotonic()
        yield
        self._began += time.monotonic() - before

    def count(self, batch: Batch) -> None:
        """One more step."""
        self._work += batch.work
        self._steps += 1

    def take(self) -> dict[str, float]:
        """Means since the last call. Call it when the device has finished the step."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        report = {"step_seconds": seconds / max(self._steps, 1), **self._rates(self._work, seconds)}
        report["input_wait"] = self._waited / seconds
        stats = self._device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            report["memory_gib"] = stats["peak_bytes_in_use"] / 2**30
        self._total, self._total_seconds = self._total + self._work, self._total_seconds + seconds
        self._total_steps += self._steps
        self._restart()
        return report

    def _rates(self, work: Work, seconds: float) -> dict[str, float]:
        rates = {
            "tokens_per_second": work.tokens / seconds,
            "instructions_per_second": work.rows / seconds,
            f"{self._counted}_per_second": getattr(work, self._counted) / seconds,
        }
        if self._chip:
            flops = step_flops(self._model, work, self._training).model
            rates["mfu"] = flops / seconds / self._count / self._chip.bf16
        return rates

    def summary(self) -> str:
        """One line on the whole run so far."""
        rates = self._rates(self._total, max(self._total_seconds, 1e-9))
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in rates.items())
        return f"{self._total_steps} steps in {self._total_seconds:.0f} s: {shown}"
