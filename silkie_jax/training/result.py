"""What a training run leaves, its adapter or its model or both, and `silkie export` of it."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from flax import nnx

from silkie_jax.checkpoints.convert import parse_dtype
from silkie_jax.checkpoints.export import CARD, export
from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.checkpoints.peft import open_adapter, read_adapter, save_adapter
from silkie_jax.checkpoints.sources import Piece, Source, open_source
from silkie_jax.checkpoints.weights import save_model
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.config import QwenVLConfig
from silkie_jax.models.qwen_vl.names import leaves
from silkie_jax.nn.lora import linears
from silkie_jax.training.card import model_card
from silkie_jax.training.checkpoint import kept_steps, read_trainable
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.config_file import load_config
from silkie_jax.training.trainer import Trainer, blank_policy, split_policy

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
    src: str | Path,
    dst: str | Path,
    adapter: str | Path | Sequence[str | Path] | bool | None = None,
    dtype: str | None = None,
    step: int | None = None,
) -> int | None:
    """Exports a model folder or a training run to Hugging Face form.

    Args:
      src: a run folder (its base model with its adapter merged), or any model folder that `load` reads. A run may be
        unfinished, or going on: its last checkpoint is meant.
      dst: the folder to make.
      adapter: a PEFT folder to merge, or several; True: write the run's PEFT adapter by itself, nothing merged.
      dtype: type to store; None: as the base is stored.
      step: the checkpoint of this step of a run is meant.

    Returns:
      The step of the checkpoint that was read; None for a finished run's result or a model folder.

    Raises:
      UserError: the run has no such checkpoint, or the options do not fit `src`.
    """
    run = Path(src)
    if not (run / "checkpoints").is_dir():
        if adapter is True or step is not None:
            option = "--step" if step is not None else "--adapter without a folder"
            raise UserError(f"{option} needs a training run; {src} is not one")
        export(src, dst, adapter=None if isinstance(adapter, bool) else adapter, dtype=dtype)
        return None
    if adapter not in (None, True):
        raise UserError(f"{run} is a training run with results of its own; export its base with --adapter instead")
    config = load_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    if config and adapter and ADAPTER not in results(config):
        raise UserError(f"{run}: trained without LoRA, there is no adapter to write")
    if config is None:
        raise UserError(f"{run}: the training run has not begun; run `silkie train` first")
    if step is None and is_finished(config, run):
        card = model_card(config, run, Path(dst).name, adapter=bool(adapter))
        if adapter:
            _copy_adapter(run / ADAPTER, dst, card)
            return None
        base = run / MODEL if MODEL in results(config) else config.model
        export(base, dst, adapter=run / ADAPTER if ADAPTER in results(config) else None, dtype=dtype, card=card)
        return None
    step = _kept(run, step)
    card = model_card(config, run, Path(dst).name, step=step, adapter=bool(adapter))
    _export_checkpoint(run, config, step, dst, bool(adapter), dtype, card)
    return step


def _kept(run: Path, step: int | None) -> int:
    """The checkpoint that is meant: `step`, or the last one."""
    kept = kept_steps(run / "checkpoints")
    if not kept:
        raise UserError(
            f"{run}: no checkpoint yet; there is one after checkpoint_every steps, or when the run is stopped"
        )
    if step is not None and step not in kept:
        raise UserError(f"{run}: no checkpoint of step {step}; there are those of steps {', '.join(map(str, kept))}")
    return kept[-1] if step is None else step


def _export_checkpoint(
    run: Path, config: TrainConfig, step: int, dst: str | Path, adapter_alone: bool, dtype: str | None, card: str
) -> None:
    """Exports a run as it was after `step`. Only what was trained is in memory; the base is read as it is written."""
    model_config = QwenVLConfig.from_folder(config.model)
    graph, shapes, frozen = split_policy(blank_policy(config, model_config), config)
    trained = read_trainable(run / "checkpoints", step, shapes)
    base: str | Source = config.model
    if MODEL in results(config):
        arrays = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(trained)}
        base = _Trained(open_source(config.model), arrays, parse_dtype(config.dtype))
    if not config.lora:
        export(base, dst, dtype=dtype, card=card)
        return
    model = nnx.merge(graph, trained, frozen)
    if config.adapter:  # which may be scaled otherwise than by alpha / rank
        scale = open_adapter(config.adapter, leaves(model_config)).scale
        for _, linear in linears(model.language.layers):
            if linear.lora_a is not None:
                linear.lora_scale = scale
    with TemporaryDirectory() as folder:
        save_adapter(model, Path(folder, ADAPTER), base_model=config.model)
        if adapter_alone:
            _copy_adapter(Path(folder, ADAPTER), dst, card)
        else:
            export(base, dst, adapter=Path(folder, ADAPTER), dtype=dtype, card=card)


def _copy_adapter(src: Path, dst: str | Path, card: str) -> None:
    with new_folder(dst) as folder:
        shutil.copytree(src, folder, dirs_exist_ok=True)
        (folder / CARD).write_text(card, encoding="utf-8")


class _Trained:
    """A source whose trained weights come from memory, all of one type, as a finished run's `model/` has them."""

    def __init__(self, base: Source, trained: dict[str, np.ndarray], dtype: np.dtype):
        self._base, self._trained, self._dtype = base, trained, dtype
        self.folder, self.config, self.tree = base.folder, base.config, base.tree
        self.dtypes = dict.fromkeys(base.tree, dtype)

    def read(self, piece: Piece) -> np.ndarray:
        array = self._trained.get(piece.leaf.path)
        values = self._base.read(piece) if array is None else array[piece.index]
        return values.astype(self._dtype, copy=False)
