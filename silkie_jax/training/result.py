"""What a training run leaves, its adapter or its model or both, and `silkie export` of it."""

import shutil
from pathlib import Path

from silkie_jax.checkpoints.export import export
from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.checkpoints.peft import read_adapter, save_adapter
from silkie_jax.checkpoints.sources import open_source
from silkie_jax.checkpoints.weights import save_model
from silkie_jax.errors import UserError
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.config_file import load_config
from silkie_jax.training.trainer import Trainer

MODEL, ADAPTER = "model", "adapter"


def results(config: TrainConfig) -> list[str]:
    """Folders of a finished run: model where weights of the base were trained, adapter where there is one."""
    whole = not config.lora or config.train_vision != "none"
    return [MODEL] * whole + [ADAPTER] * (config.lora is not None)


def is_finished(config: TrainConfig, run: Path) -> bool:
    """Whether a run's results are there and whole. A folder's name alone says nothing: half of it may be missing."""
    try:
        for name in results(config):
            (open_source if name == MODEL else read_adapter)(run / name)
    except UserError:
        return False
    return True


def save_result(trainer: Trainer, run: Path) -> None:
    """Writes the results of a run; every process of several must call this."""
    config, model = trainer.program.config, trainer.model()
    base = config.model
    for name in results(config):
        if name == MODEL:
            save_model(model, run / MODEL, like=config.model, dtype=config.dtype)
            base = str(run / MODEL)
        else:
            save_adapter(model, run / ADAPTER, base_model=base)


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
    if adapter not in (None, True):
        raise UserError(f"{run} is a training run with results of its own; export its base with --adapter instead")
    config = load_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    if config and adapter and ADAPTER not in results(config):
        raise UserError(f"{run}: trained without LoRA, there is no adapter to write")
    if config is None or not is_finished(config, run):
        raise UserError(f"{run}: the training run is not finished; run `silkie train` again to complete it")
    if adapter:
        with new_folder(dst) as folder:
            shutil.copytree(run / ADAPTER, folder, dirs_exist_ok=True)
        return
    base = run / MODEL if MODEL in results(config) else config.model
    export(base, dst, adapter=run / ADAPTER if ADAPTER in results(config) else None, dtype=dtype)
