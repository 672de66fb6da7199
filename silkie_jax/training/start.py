"""The check of a run's start: before its first update the policy is its own reference, unless another one is asked for.

Otherwise a run would silently begin somewhere else than at a loss of log 2 and be pulled to what nobody named: the bare
base of an adapter, or stored log-probabilities of other weights.
"""

import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from silkie_jax.errors import UserError
from silkie_jax.nn.quantize import METHODS
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.step import MARGINS

# Two passes over the same weights differ where a compiler fuses them differently, or a batch is padded to another
# length. A label's log-probability is then off by some units in the last place of the type that is computed in, and a
# pair's margin by that times the square root of its labels. Margins of random weights, 148 labels a response, were
# measured to be 4.5 to 13 units a label away from float32's in bfloat16; in float32 such sums agree to 5e-4. With
# products of e4m3 they were up to 7 units of that type away, and a stored reference is of another program.
_UNITS = {"bfloat16": 16, "float32": 256, "float8_e4m3fn": 8}


class Start:
    """Looks at the first step of a run, which reports margins as they are before its update.

    `stored` is where the reference's log-probabilities were read, if they were.
    """

    def __init__(self, config: TrainConfig, done: int, stored: Path | None, say: Callable[[str], None]):
        self._config, self._stored, self._say = config, stored, say
        self._todo = done == 0 and config.reference is not None

    def check(self, metrics: dict[str, jax.Array]) -> None:
        """Takes the margins out of a step's metrics and looks at those of the first step that changes anything.

        Raises:
          UserError: policy and reference differ, and the configuration names no other reference than the policy.
        """
        square, labels = (metrics.pop(name, jnp.nan) for name in MARGINS)
        if not self._todo or float(metrics["skipped"]):  # what was not finite is not for this check to explain
            return
        self._todo = False
        config = self._config
        margin = math.sqrt(float(square))
        kind = METHODS[config.compute].name if config.compute else config.dtype
        rounding = _UNITS[kind] * float(jnp.finfo(kind).eps) * math.sqrt(float(labels))
        found = f"margins of {margin:.2g} nats a pair, of which {rounding:.2g} can be rounding in {kind}"
        if margin <= rounding:
            self._say(f"policy and reference agree at the start: {found}")
        elif config.adapter and config.reference == "adapter_off":
            self._say(f"policy and reference differ at the start, as reference: adapter_off with adapter asks: {found}")
        else:
            mend = "try attention=plain"  # they are one set of weights, or ought to be
            if self._stored is not None:
                mend = f"what is stored is of something else: remove {self._stored} and run `silkie reference` again"
            raise UserError(f"policy and reference differ at the start: {found}; {mend}")
