"""A model with its tokenizer, from one folder."""

from pathlib import Path

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer


def load(
    path: str | Path,
    dtype: str = "float32",
    adapter: str | Path | None = None,
    quantize: str | None = None,
) -> tuple[QwenVL, Tokenizer]:
    """Loads a Hugging Face folder or one made by `silkie convert`.

    Args:
      path: the folder.
      dtype: "float32" or "bfloat16", of parameters and of computation.
      adapter: a PEFT folder to attach.
      quantize: "int8" keeps the large weights in 8 bits.

    Raises:
      UserError: what is wrong with the folder, in one line.
    """
    tokenizer = Tokenizer.from_folder(path)  # quick to fail, before gigabytes are read
    return load_model(path, dtype=dtype, adapter=adapter, quantize=quantize), tokenizer
