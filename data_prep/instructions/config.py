"""What instructions a run has: sources, quotas and limits, from a YAML file or from a command line."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from silkie_jax.errors import UserError
from silkie_jax.image_limits import MAX_BYTES, MAX_PIXELS
from silkie_jax.yaml_files import load_yaml

TURNS = ("first", "last", "each")
DUPLICATES = ("drop", "keep")


@dataclass
class SourceConfig:
    """One source.

    Attributes:
        path: rows (.jsonl, .json, .csv, .parquet, a folder of them), or images alone (a folder, zip or tar).
        images: where the rows' images are: a folder, zip or tar; beside the rows by default (see `ImagesBeside`).
        licence: carried through to the corpus; a row's own comes first.
        quota: instructions to draw from it; null: all.
        turns: of conversations: the "first" question, the "last" with its history, or "each".
        prompts: what to ask of images alone; each gets one of them.
    """

    path: str = ""
    images: str | None = None
    licence: str = ""
    quota: int | None = None
    turns: str = "first"
    prompts: list[str] = field(default_factory=lambda: ["Describe the image in detail."])


@dataclass
class InstructionsConfig:
    """What instructions a run has.

    Attributes:
        sources: name -> source, in the order in which the first of several duplicates is kept.
        sample: how many to draw of all; null: all.
        seed: of every draw.
        duplicates: "drop" them, or "keep" and only list them.
        max_pixels, max_image_bytes: limits on an image file.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    sample: int | None = None
    seed: int = 0
    duplicates: str = "drop"
    max_pixels: int = MAX_PIXELS
    max_image_bytes: int = MAX_BYTES


def load_instructions_config(path: str | os.PathLike[str]) -> InstructionsConfig:
    """Reads and checks a YAML file; its paths are relative to it.

    Raises:
        UserError: one line that names the key and the mend.
    """
    config = load_yaml(path, InstructionsConfig)
    for source in config.sources.values():
        source.path = str(Path(path).parent / source.path)
        source.images = None if source.images is None else str(Path(path).parent / source.images)
    check_instructions_config(config, str(path))
    return config


def from_arguments(
    sources: Sequence[str],
    *,
    images: str | None = None,
    prompts: list[str] | None = None,
    turns: str | None = None,
    licence: str | None = None,
    quota: int | None = None,
    sample: int | None = None,
    seed: int | None = None,
    keep_duplicates: bool = False,
) -> InstructionsConfig:
    """The configuration that a command line describes: one YAML file, or data whose options are the same.

    Raises:
        UserError: a YAML file comes with other sources or with options that belong in it, or see above.
    """
    yaml = [source for source in sources if Path(source).suffix in (".yaml", ".yml")]
    given = {"images": images, "prompts": prompts, "turns": turns, "licence": licence, "quota": quota}
    given = {key: value for key, value in given.items() if value is not None}
    if yaml:
        if len(sources) > 1 or given:
            what = f"set {', '.join(given)} in it" if given else "name the other sources in it"
            raise UserError(f"{yaml[0]} describes all sources: {what}")
        config = load_instructions_config(yaml[0])
    else:
        config = InstructionsConfig()
        for source in sources:
            name = next(n for k in range(1, len(sources) + 1) if (n := _stem(source, k)) not in config.sources)
            config.sources[name] = SourceConfig(path=source, **given)  # type: ignore[arg-type]
    if sample is not None:
        config.sample = sample
    if seed is not None:
        config.seed = seed
    if keep_duplicates:
        config.duplicates = "keep"
    check_instructions_config(config, yaml[0] if yaml else "silkie corpus instructions")
    return config


def _stem(source: str, number: int) -> str:
    name = Path(source).resolve().stem
    return name if number == 1 else f"{name}-{number}"


def check_instructions_config(config: InstructionsConfig, where: str = "instructions") -> None:
    """Refuses what cannot be meant."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{where}: {message}")

    need(bool(config.sources), "sources is empty; name at least one")
    need(config.duplicates in DUPLICATES, f"duplicates: {config.duplicates!r} is neither of {', '.join(DUPLICATES)}")
    need(config.sample is None or config.sample >= 1, f"sample must be at least 1, not {config.sample}")
    need(config.max_pixels >= 1 and config.max_image_bytes >= 1, "max_pixels and max_image_bytes must be positive")
    for name, source in config.sources.items():
        need(bool(source.path), f"sources.{name}.path must be set")
        need(Path(source.path).exists(), f"sources.{name}.path: there is no {source.path}")
        need(source.turns in TURNS, f"sources.{name}.turns: {source.turns!r} is none of {', '.join(TURNS)}")
        need(source.quota is None or source.quota >= 1, f"sources.{name}.quota must be at least 1, not {source.quota}")
        need(all(map(str.strip, source.prompts)) and bool(source.prompts), f"sources.{name}.prompts has no text")
