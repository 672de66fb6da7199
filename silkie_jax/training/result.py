"""`silkie export` of a training run: which base and which adapter it comes from."""

import shutil
from pathlib import Path

from silkie_jax.checkpoints.export import export
from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.errors import UserError
from silkie_jax.training.config_file import load_config


def export_run(
    src: str | Path, dst: str | Path, adapter: str | Path | bool | None = None, dtype: str | None = None
) -> None:
    """Exports a model folder or a training run to Hugging Face form.

    Args:
      src: a run folder (its base model with its adapter merged), or any model folder that `load` reads.
      dst: the folder to make.
      adapter: a PEFT folder to merge; True: write the run's PEFT adapter by itself, nothing merged.
      dtype: type to store; None: as the base is stored.

    Raises:
      UserError: the run is unfinished, or the options do not fit `src`.
    """
    run = Path(src)
    if not (run / "checkpoints").is_dir():
        if adapter is True:
            raise UserError(f"--adapter without a folder needs a training run; {src} is not one")
        export(src, dst, adapter=adapter or None, dtype=dtype)
        return
    own, model = run / "adapter", run / "model"
    if not own.is_dir() and not model.is_dir():
        raise UserError(f"{run}: the training run is not finished; run `silkie train` again to complete it")
    if adapter not in (None, True):
        raise UserError(f"{run} is a training run with results of its own; export its base with --adapter instead")
    if adapter is True:
        if not own.is_dir():
            raise UserError(f"{run}: trained without LoRA, there is no adapter to write")
        with new_folder(dst) as folder:
            shutil.copytree(own, folder, dirs_exist_ok=True)
        return
    base = model if model.is_dir() else Path(load_config(run / "config.yaml").model)
    export(base, dst, adapter=own if own.is_dir() else None, dtype=dtype)
