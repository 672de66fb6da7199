"""The one attention function, and the masks of the row layout."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from silkie_jax.qwen_vl.lora import precision

PADDING = -1  # the branch of a padding token
PROMPT = 0  # the branch of the prompt; responses are 1..63
ROW = 64  # rows that are packed one after the other in one sequence add 0, 64, 128, ... to their branches


def branch_mask(branches: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Who sees whom: a token sees its row's prompt and its own branch, up to itself.

    `branches` is 0 for the prompt, k for response k, -1 for padding. With b = [0 0 1 1 2 -1]:

        query \\ key   0 0 1 1 2 -
        prompt        x
        prompt        x x
        branch 1      x x x
        branch 1      x x x x
        branch 2      x x . . x         branch 2 does not see branch 1
        padding       . . . . . .       never seen, and what comes of it does not matter

    One sequence is the special case of zeros: the causal mask. Padding may stand on either side. In a packed sequence,
    [0 0 1 | 64 64 65], the second row (prompt 64, branch 65) does not see the first.
    """
    query, key = branches[:, :, None], branches[:, None, :]
    index = jnp.arange(branches.shape[1])
    causal = index[:, None] >= index[None, :]
    return causal & (key != PADDING) & ((key == query) | (key == query - query % ROW))


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S H D"],
    v: Float[Array, "B S H D"],
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T H D"]:
    """softmax(q k^T / sqrt(D)) v, the softmax in float32. A query that sees nothing gets finite nonsense."""
    with jax.default_matmul_precision("highest" if precision(q.dtype) is not None else "default"):
        return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None])
