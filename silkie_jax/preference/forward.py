"""From a batch of rows to the log-probability of each response: the forward pass of training and of scoring."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from silkie_jax.hardware.mesh import batch_sharding, sharding_of
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.nn.attention import PLAIN, Kernel
from silkie_jax.nn.flash import FLASH
from silkie_jax.nn.lora import LINEAR
from silkie_jax.preference.logprobs import Through, branch_sums, mixed_scores, token_scores


class Scores(NamedTuple):
    """Of each branch's labels: the summed log-probability, and how many a greedy decoder would have said."""

    logps: Float[Array, "B K"]
    greedy: Float[Array, "B K"]


class MixedSums(NamedTuple):
    """The same, with the log-probabilities of another model and of the extrapolated one (logprobs.mixed_scores)."""

    logps: Float[Array, "B K"]
    greedy: Float[Array, "B K"]
    against: Float[Array, "B K"]
    mixed: Float[Array, "B K"]


class Hidden(NamedTuple):
    """What a model makes of a batch before its tokens meet the vocabulary, and the matrix that they then meet."""

    states: Float[Array, "B T W"]
    head: Float[Array, "V W"]


def hidden_states(
    model: QwenVL,
    batch: dict[str, Array],
    features: Array | None,
    *,
    adapter: bool,
    wrap: Callable,
    kernel: Kernel = PLAIN,
    frozen_head: bool = False,
) -> Hidden:
    """The model's pass over rows, in training mode.

    `features` are of each sequence's images [B, M, 256, W], encoded once each, however often a sequence shows them.
    """
    if features is not None and "spans" in batch:
        features = jax.vmap(lambda images, spans: images[spans])(features, batch["spans"])
    states = model.hidden(
        batch["tokens"],
        batch["positions"],
        batch["branches"],
        features,
        train=True,
        adapter=adapter,
        wrap=wrap,
        kernel=kernel,
    )
    head = model.language.lm_head.weight[...]
    if frozen_head and kernel.mesh is not None:  # gathered once, and not again for every chunk
        where = sharding_of(kernel.mesh, ("vocab", None), head.shape)
        head = jax.lax.with_sharding_constraint(head, where)
    return Hidden(states, head)


def response_scores(batch: dict[str, Array], hidden: Hidden, *, branches: int, frozen_head: bool = False) -> Scores:
    """Scores of each branch's labels."""
    found = token_scores(hidden.states, batch["predecessors"], batch["labels"], hidden.head, frozen_head=frozen_head)
    return Scores(*(branch_sums(values, batch["label_branches"], branches) for values in found))


def extrapolated_scores(
    batch: dict[str, Array],
    hidden: Hidden,
    against: Hidden,
    factor: float,
    through: Through,
    *,
    branches: int,
    frozen_head: bool = False,
) -> MixedSums:
    """Those of a model, of another one, and of the first one's scores extrapolated away from the other's."""
    found = mixed_scores(
        hidden.states,
        against.states,
        batch["predecessors"],
        batch["labels"],
        hidden.head,
        against.head,
        factor,
        through,
        frozen_head=frozen_head,
    )
    return MixedSums(*(branch_sums(values, batch["label_branches"], branches) for values in found))


def image_features(
    model: QwenVL, batch: dict[str, Array], wrap: Callable, kernel: Kernel = PLAIN
) -> Float[Array, "B M 256 W"] | None:
    """What stands for each row's images: stored, or encoded now; None where no row has any."""
    if "features" in batch:
        return batch["features"]
    images = batch.get("images")
    return None if images is None else model.encode_images(images, wrap, kernel)


def block_wrapper(remat: str, mesh: Mesh | None) -> Callable:
    """What goes around each layer: rematerialisation, and rows kept over the batch axes of the mesh."""
    keep = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_only_these_names(LINEAR, FLASH),
    }.get(remat)

    def wrap(body: Callable) -> Callable:
        def constrained(x: Array, layer: Any) -> tuple[Array, None]:
            if mesh is not None:
                x = jax.lax.with_sharding_constraint(x, batch_sharding(mesh))
            return body(x, layer)

        # `prevent_cse` only matters outside of a scan.
        return constrained if keep is None else jax.checkpoint(constrained, policy=keep, prevent_cse=False)

    return wrap
