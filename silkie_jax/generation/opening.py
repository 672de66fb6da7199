"""An engine with its tokenizer, from one folder."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh

from silkie_jax.checkpoints.weights import load_model
from silkie_jax.generation.engine import Engine
from silkie_jax.hardware.kernel import sound_keeper, sound_kernel
from silkie_jax.hardware.mesh import make_mesh, sharding_of
from silkie_jax.models.qwen_vl.tokenizer import Tokenizer


def open_engine(
    path: str | Path,
    *,
    adapter: str | Path | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
    mesh: Mesh | None = None,
    say: Callable[[str], None] = print,
    **options: int | None,
) -> tuple[Engine, Tokenizer]:
    """Loads a Hugging Face folder, or one made by `silkie convert`, onto a mesh and makes an engine of it.

    Args:
      mesh: all devices along its data axis by default.
      options: `context`, `slots`, `images`, `steps`, `top_logprobs` of `Engine`.

    Raises:
      UserError: what is wrong with the folder or the options, in one line.
    """
    tokenizer = Tokenizer.from_folder(path)  # quick to fail, before gigabytes are read
    mesh = make_mesh() if mesh is None else mesh
    where = partial(sharding_of, mesh)
    model = load_model(path, dtype=dtype, adapter=adapter, sharding_of=where, quantize=quantize)
    quiet = say if jax.process_index() == 0 else lambda line: None
    kernel, keeper = sound_kernel("auto", dtype, mesh, say=quiet), sound_keeper(dtype, mesh, say=quiet)
    engine = Engine(model, mesh=mesh, kernel=kernel, keeper=keeper, own=True, **options)  # type: ignore[arg-type]
    return engine, tokenizer
