"""The model card of what a run is exported to: README.md, with what the run's own files say and nothing else."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from silkie_jax.corpus.imitation import imitate_name
from silkie_jax.training.config import TrainConfig
from silkie_jax.training.run_file import CONDITION_FILE, RUN_FILE

_METRICS = {
    "loss": "loss",
    "rewards/accuracies": "pairs ranked rightly",
    "rewards/margins": "margin of rewards",
    "lengths/ratio": "length of chosen to rejected responses",
    "mean_token_accuracy": "tokens predicted",
}
"""Of a training step -> what it is. Those of evaluations are shown under their own names."""


def model_card(config: TrainConfig, run: Path, name: str, *, step: int | None = None, adapter: bool = False) -> str:
    """What was trained from what on what, how, and what was measured on the way.

    Args:
        config: of the run.
        run: its folder.
        name: of the folder that is exported to.
        step: of the checkpoint that is exported; None: the run's result.
        adapter: only a PEFT adapter is exported.
    """
    from huggingface_hub import ModelCardData

    about = ModelCardData(
        library_name="peft" if adapter else "transformers",
        license="other",
        pipeline_tag="image-text-to-text",
        tags=["silkie_jax", "qwen-vl", config.objective],
    )
    what = "A PEFT adapter" if adapter else "A Qwen-VL model in the official form"
    how = "direct preference optimization" if config.objective == "dpo" else "supervised fine-tuning"
    lines = [
        "---",
        about.to_yaml(),
        "---",
        "",
        f"# {name}",
        "",
        f"{what}, trained by {how} with silkie_jax {version('silkie-jax')}. Everything below is what the training run "
        "itself has recorded.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _facts(config, run, step)),
        "",
        *_measured(run, step),
        "## Use",
        "",
        "```",
        f"silkie chat {f'{config.model} --adapter ' if adapter else ''}{name} --image photo.jpg --prompt "
        '"What is unusual here?"',
        "```",
        "",
        "What it is worth is not known from training: measure it (`silkie evaluate run mme pope ...`) before it is "
        "used. It inherits what its base and its teachers get wrong, and what a judge prefers need not be true.",
        "",
        "## Licence",
        "",
        "Weights that are derived from others stay under the licence of those, and a corpus has terms of its own. "
        "Licence files of the base, where it has any, lie beside this card.",
        "",
    ]
    return "\n".join(lines)


def _facts(config: TrainConfig, run: Path, step: int | None) -> Iterator[tuple[str, str]]:
    """Rows of the table."""
    known: dict[str, Any] = json.loads((run / RUN_FILE).read_text()) if (run / RUN_FILE).exists() else {}

    def place(path: str, fingerprint: str) -> str:
        found = known.get(fingerprint)
        return f"`{path}`" + (f", SHA-256 `{found[:16]}`" if found else "")

    yield "base", place(config.model, "weights")
    if config.adapter:
        yield "adapter to begin with", place(config.adapter, "adapter")
    yield "corpus", place(config.corpus, "corpus")
    if config.objective == "dpo":
        yield "loss", "; ".join(map(str, config.terms))
        yield "pairs", f"{config.pair_rule or 'as the corpus gives them, or by mean rating'}"
        yield "reference", str(config.reference)
    else:
        more = {} if isinstance(config.imitate, str) else config.imitate
        options = "".join(f", {key} {value}" for key, value in more.items() if key != "name")
        yield "imitated", f"{imitate_name(config.imitate)} responses{options}"
        if (run / CONDITION_FILE).exists():
            lines = (run / CONDITION_FILE).read_text(encoding="utf-8").splitlines()
            yield "to be asked, below every question", " then ".join(f"`{line}`" for line in lines)
    lora, tower = config.lora, config.train_vision
    yield (
        "trained",
        ("decoder" if lora is None else f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}")
        + {"none": "", "resampler": ", resampler", "all": ", vision tower and resampler"}[tower],
    )
    rate = config.optimizer
    yield "learning rate", f"{rate.learning_rate:g}, {rate.schedule}, warm-up {rate.warmup_ratio:g}"
    yield "rows of a step", f"{config.batch_rows} a device and pass, {config.accumulate} passes"
    yield "seed, type", f"{config.seed}, {config.dtype}"
    last = [row["step"] for row in _logged(run)][-1:]
    yield "steps", "finished" + (f" after {last[0]}" if last else "") if step is None else f"checkpoint of {step}"


def _measured(run: Path, step: int | None) -> Iterator[str]:
    """The first and the last value of what was logged until the step."""
    logged = [row for row in _logged(run) if step is None or row["step"] <= step]
    names = dict.fromkeys(name for row in logged for name in row)
    shown = {name: _METRICS.get(name, name) for name in names if name in _METRICS or name.startswith("eval_")}
    if not shown:
        return
    yield from ("## Measured while training", "", "| | first | last |", "|---|---:|---:|")
    for name, about in shown.items():
        values = [row[name] for row in logged if isinstance(row.get(name), int | float)]
        if values:
            yield f"| {about} | {values[0]:.4g} | {values[-1]:.4g} |"
    yield ""


def _logged(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
