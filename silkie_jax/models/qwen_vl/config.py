"""Model configuration: the official config.json, read into frozen dataclasses and written back unchanged."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from silkie_jax.errors import UserError

IMAGE_TOKENS = 256  # embedding rows between <img> and </img>; also the resampler's queries (official visual.py)
_SPECIALS_BEFORE_IMAGE = 3 + 205 + 6  # <|endoftext|> <|im_start|> <|im_end|>, the extras, <ref> ... </quad>


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower and its resampler (`visual` in config.json)."""

    image_size: int  # pixels a side
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    output_dim: int  # the language model's width
    image_start_id: int

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def pool_heads(self) -> int:
        """Heads of the resampler's attention: 128 wide each (official visual.py)."""
        return self.output_dim // 128


@dataclasses.dataclass(frozen=True)
class QwenVLConfig:
    """A Qwen-VL model. `raw` keeps every field of the file it came from, so that writing back loses nothing."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_channels: int
    intermediate_size: int
    seq_length: int
    layer_norm_epsilon: float
    rotary_emb_base: float
    use_dynamic_ntk: bool
    use_logn_attn: bool
    visual: VisionConfig
    raw: str = "{}"

    @property
    def head_dim(self) -> int:
        return self.kv_channels

    @property
    def attention_width(self) -> int:
        return self.num_attention_heads * self.kv_channels

    @property
    def mlp_width(self) -> int:
        """Each of w1 and w2 has half of `intermediate_size` (official QWenMLP)."""
        return self.intermediate_size // 2

    @property
    def image_start(self) -> int:
        """Id of `<img>`; `</img>` and `<imgpad>` follow it."""
        return self.visual.image_start_id

    @property
    def image_end(self) -> int:
        return self.visual.image_start_id + 1

    @property
    def end_of_text(self) -> int:
        """Id of `<|endoftext|>`: the specials have one order in every vocabulary (official tokenization_qwen.py)."""
        return self.visual.image_start_id - _SPECIALS_BEFORE_IMAGE

    @classmethod
    def from_dict(cls, fields: dict[str, Any], *, where: str = "config.json") -> Self:
        """Reads the official fields.

        Raises:
          UserError: a field is missing, or names a variant that Qwen-VL does not have.
        """
        visual = fields.get("visual")
        if not isinstance(visual, dict):
            raise UserError(f"{where}: no 'visual' section; is this a Qwen-VL checkpoint?")
        sections = [(VisionConfig, visual, "visual."), (cls, fields, "")]
        missing = [
            prefix + f.name
            for kind, section, prefix in sections
            for f in dataclasses.fields(kind)
            if f.name not in section and f.name not in ("visual", "raw")
        ]
        if missing:
            raise UserError(f"{where}: missing {', '.join(missing)}")
        for key, expected in _FIXED.items():
            if fields.get(key, expected) != expected:
                raise UserError(f"{where}: {key} = {fields[key]!r} is not Qwen-VL (expected {expected!r})")
        wrong = [
            f"{prefix}{f.name} = {section[f.name]!r}"
            for kind, section, prefix in sections
            for f in dataclasses.fields(kind)
            if f.type in _SOUND and not _SOUND[f.type](section[f.name])
        ]
        if wrong:
            raise UserError(f"{where}: sizes must be positive numbers, switches true or false, not {', '.join(wrong)}")
        own = {f.name: fields[f.name] for f in dataclasses.fields(cls) if f.name not in ("visual", "raw")}
        vision = VisionConfig(**{f.name: visual[f.name] for f in dataclasses.fields(VisionConfig)})
        config = cls(**own, visual=vision, raw=json.dumps(fields))
        config._check(where)
        return config

    def _check(self, where: str) -> None:
        v = self.visual
        demands = {
            "kv_channels x num_attention_heads must equal hidden_size": self.attention_width == self.hidden_size,
            "kv_channels must be even": self.head_dim % 2 == 0,
            "intermediate_size must be even": self.intermediate_size % 2 == 0,
            "seq_length must be at least 2": self.seq_length >= 2,
            "visual.output_dim must equal hidden_size": v.output_dim == self.hidden_size,
            "visual.output_dim must be divisible by 128": v.output_dim % 128 == 0,
            "visual.image_size must be divisible by visual.patch_size": v.image_size % v.patch_size == 0,
            "visual.width must be divisible by visual.heads": v.width % v.heads == 0,
            f"visual.image_start_id must be at least {_SPECIALS_BEFORE_IMAGE}": self.end_of_text >= 0,
            "vocab_size must exceed visual.image_start_id + 2": self.vocab_size > self.image_end + 1,
        }
        broken = [demand for demand, holds in demands.items() if not holds]
        if broken:
            raise UserError(f"{where}: {'; '.join(broken)}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads `folder/config.json`."""
        path = Path(folder) / "config.json"
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise UserError(f"{path}: not found; {folder} is not a checkpoint folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError, NotADirectoryError) as e:
            raise UserError(f"{path}: not readable as JSON ({e})") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}: expected a JSON object")
        return cls.from_dict(fields, where=str(path))

    def to_dict(self) -> dict[str, Any]:
        """The official config.json with every field it was read with."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("visual", "raw")}
        raw = json.loads(self.raw)
        return {**raw, **own, "visual": {**raw.get("visual", {}), **dataclasses.asdict(self.visual)}}


# What a field of each type may hold.
_SOUND: dict[Any, Callable[[Any], bool]] = {
    int: lambda x: type(x) is int and x > 0,
    float: lambda x: type(x) in (int, float) and 0 < x < float("inf"),
    bool: lambda x: type(x) is bool,
}
# Fields that the official code reads but that every Qwen-VL checkpoint sets alike.
_FIXED = {"no_bias": True, "tie_word_embeddings": False, "rotary_pct": 1.0, "scale_attn_weights": True}

QWEN_VL_CHAT = QwenVLConfig(
    vocab_size=151936,
    hidden_size=4096,
    num_hidden_layers=32,
    num_attention_heads=32,
    kv_channels=128,
    intermediate_size=22016,
    seq_length=2048,
    layer_norm_epsilon=1e-6,
    rotary_emb_base=10000,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    visual=VisionConfig(
        image_size=448,
        patch_size=14,
        width=1664,
        layers=48,
        heads=16,
        mlp_ratio=4.9231,
        output_dim=4096,
        image_start_id=151857,
    ),
)
"""The published model: 9,656,935,168 parameters."""
