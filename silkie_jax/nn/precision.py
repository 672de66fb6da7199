"""How exactly matrices are multiplied."""

import jax
import jax.numpy as jnp


def precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32: GPU and TPU would otherwise multiply in TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
