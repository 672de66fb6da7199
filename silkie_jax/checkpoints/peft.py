"""PEFT adapter folders: attached to a model, merged into a checkpoint, and written for PEFT to read."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Sharding

from silkie_jax.checkpoints.folders import new_folder
from silkie_jax.checkpoints.sources import Piece
from silkie_jax.checkpoints.tensor_files import OTHER, StoredTensor, list_files, plan_shards
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.model import QwenVL
from silkie_jax.models.qwen_vl.names import (
    Leaf,
    adapter_names,
    decoder_pattern,
    foreign_linears,
    leaves,
    misfits,
    plain_adapter_name,
    shorten,
)
from silkie_jax.nn.lora import add_lora, linears, matches

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Fields of adapter_config.json that change what an adapter computes, with the only values understood here.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),  # others also change the base weights
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A PEFT folder whose configuration, names and shapes have been checked."""

    rank: int
    alpha: float
    scale: float  # alpha / rank, or alpha / sqrt(rank) if rank-stabilised
    targets: tuple[str, ...]  # modules within a decoder layer, such as attn.c_attn
    tree: dict[str, Leaf]  # the adapted weights, by target
    tensors: dict[str, StoredTensor]

    def factors(self, leaf: Leaf, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """A [rank, in] and B [*out, rank] of one layer, in float32."""
        a, b = (self._read(name) for name in adapter_names(leaf, layer))
        return a, b.reshape(*leaf.own[:-1], self.rank)

    def delta(self, piece: Piece) -> np.ndarray:
        """What merging adds to a piece of an adapted weight: scale B A, float32, shaped as the piece."""
        blocks = []
        for layer in range(piece.first, piece.last):
            a, b = self.factors(piece.leaf, layer)
            blocks.append(b[piece.start : piece.stop] @ a)
        return np.stack(blocks).reshape(piece.shape) * np.float32(self.scale)

    def _read(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        values = tensor.read(0, math.prod(tensor.shape)).reshape(tensor.shape)
        return values.astype(np.float32)


def open_adapter(folder: str | Path, tree: Mapping[str, Leaf]) -> Adapter:
    """Reads an adapter's configuration and headers, and checks them against the model's tree (names.leaves).

    Raises:
      UserError: a feature that is not supported, or all tensors that do not fit, in one line.
    """
    folder = Path(folder)
    config, file, stored = read_adapter(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    adapted = {leaf.target: leaf for leaf in tree.values() if leaf.adaptable}
    targets = _targets(folder / CONFIG, config["target_modules"], adapted, foreign_linears(tree))
    tensors = {plain_adapter_name(name): tensor for name, tensor in stored.items()}
    expected = {}
    for target in targets:
        leaf = adapted[target]
        for layer in range(leaf.layers):
            a, b = adapter_names(leaf, layer)
            expected[a] = (rank, leaf.own[-1])
            expected[b] = (math.prod(leaf.own[:-1]), rank)
    problems = misfits({name: tensor.shape for name, tensor in tensors.items()}, expected)
    strange = [name for name, tensor in tensors.items() if tensor.dtype == OTHER]
    if strange:
        problems.append(f"not of a floating-point type: {shorten(strange)}")
    if problems:
        raise UserError(f"{file}: {'; '.join(problems)}")
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Adapter(rank, alpha, scale, targets, {t: adapted[t] for t in targets}, tensors)


def read_adapter(folder: Path) -> tuple[dict[str, Any], Path, dict[str, StoredTensor]]:
    """The configuration, the file and its tensors (not read yet) of an adapter, whatever model it belongs to.

    Raises:
      UserError: either is missing, not whole, or has a feature that is not supported.
    """
    config = _read_config(folder / CONFIG)
    present = [folder / name for name in _WEIGHTS if (folder / name).is_file()]
    if not present:
        raise UserError(f"{folder}: holds neither {' nor '.join(_WEIGHTS)}")
    listing = list_files(present[:1])
    if listing.problems:
        raise UserError(f"{present[0]}: {'; '.join(listing.problems)}")
    return config, present[0], listing.tensors


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not found; an adapter is a folder written by PEFT or by a training run") from None
    except (ValueError, NotADirectoryError) as e:
        raise UserError(f"{path}: not readable as JSON ({e})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: peft_type is {kind!r}; only LORA adapters can be read")
    odd = [f"{key} = {config[key]!r}" for key, plain in _PLAIN.items() if key in config and config[key] not in plain]
    if odd:
        raise UserError(f"{path}: not supported: {', '.join(odd)}; merge the adapter with PEFT and convert the result")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{path}: r must be a positive integer and lora_alpha a number, not {rank!r} and {alpha!r}")
    named = config.get("target_modules")
    if not (isinstance(named, str) or (isinstance(named, list) and all(isinstance(t, str) for t in named))):
        raise UserError(f"{path}: target_modules must be a list of names or a regular expression, not {named!r}")
    return config


def _targets(path: Path, named: str | list[str], adapted: Mapping[str, Leaf], foreign: list[str]) -> tuple[str, ...]:
    """The decoder's modules that PEFT would adapt: by the end of their name, or by a regular expression."""

    def chosen(module: str) -> bool:
        if isinstance(named, list):
            return matches(module, named)
        return re.fullmatch(named, module) is not None

    if named == "all-linear":
        raise UserError(f"{path}: target_modules 'all-linear' adapts the vision tower too; name decoder modules")
    try:
        outside = [module for module in foreign if chosen(module)]
        counts = {
            target: sum(chosen(leaf.module.format(i)) for i in range(leaf.layers)) for target, leaf in adapted.items()
        }
    except re.error as e:
        raise UserError(f"{path}: target_modules is not a regular expression ({e})") from None
    if outside:
        raise UserError(
            f"{path}: target_modules also match {', '.join(outside)}; only the decoder's layers can carry an adapter"
        )
    some = [target for target, count in counts.items() if 0 < count < adapted[target].layers]
    if some:
        raise UserError(f"{path}: target_modules match {', '.join(some)} in some layers only; all or none can be read")
    targets = tuple(target for target, count in counts.items() if count)
    if not targets:
        raise UserError(f"{path}: target_modules {named!r} match no module; there are {', '.join(adapted)}")
    return targets


def load_adapter(
    model: QwenVL,
    folder: str | Path,
    sharding_of: Callable[[tuple[str | None, ...], tuple[int, ...]], Sharding] | None = None,
) -> None:
    """Attaches a PEFT adapter to the model, in place of any that it carries. The factors are kept in float32.

    Args:
      model: the model.
      folder: holds adapter_config.json and adapter_model.safetensors or .bin.
      sharding_of: where each factor goes, as in `weights.load_model`; None: the default device.

    Raises:
      UserError: a feature that is not supported, or all tensors that do not fit, in one line.
    """
    adapter = open_adapter(folder, leaves(model.config))
    for _, linear in linears(model.language.layers):
        linear.lora_a = linear.lora_b = None
    add_lora(model, adapter.rank, adapter.alpha, adapter.targets, rngs=nnx.Rngs(0), scale=adapter.scale)
    for target, linear in linears(model.language.layers):
        if target not in adapter.targets:
            continue
        leaf = adapter.tree[target]
        pairs = [adapter.factors(leaf, layer) for layer in range(leaf.layers)]
        for variable, layers in zip((linear.lora_a, linear.lora_b), zip(*pairs, strict=True), strict=True):
            _place(variable, np.stack(layers), sharding_of)


def _place(variable: nnx.Variable, values: np.ndarray, sharding_of: Callable | None) -> None:
    if sharding_of is None:
        variable[...] = jax.numpy.asarray(values)
        return
    sharding = sharding_of(("layers", *variable.axes), values.shape)
    variable.set_value(jax.make_array_from_callback(values.shape, sharding, lambda index: values[index]))


def save_adapter(model: QwenVL, folder: str | Path, base_model: str) -> None:
    """Writes the model's adapter as PEFT does, so that PEFT loads it; replaces what is at `folder`.

    Every process of a multi-host run must call this; the first one writes.

    Args:
      model: a model with an adapter.
      folder: the folder to make.
      base_model: the official model that the adapter belongs to: a hub name or a folder, kept for PEFT's users.
    """
    tree = {leaf.target: leaf for leaf in leaves(model.config).values() if leaf.adaptable}
    modules = dict(linears(model.language.layers))
    adapted = {target: modules[target] for target in tree if modules[target].lora_a is not None}
    if not adapted:
        raise UserError(f"{folder}: the model carries no adapter to save")
    tensors: dict[str, np.ndarray] = {}
    for target, linear in adapted.items():
        leaf = tree[target]
        a, b = _fetch(linear.lora_a[...]), _fetch(linear.lora_b[...])
        for layer in range(leaf.layers):
            name_a, name_b = adapter_names(leaf, layer)
            tensors[name_a], tensors[name_b] = a[layer], b[layer].reshape(-1, b.shape[-1])
    if jax.process_index() != 0:
        return
    some = next(iter(adapted.values()))
    rank = some.lora_a.shape[1]
    config = _peft_config(
        rank, some.lora_scale * rank, list(adapted), foreign_linears(leaves(model.config)), base_model
    )
    with new_folder(folder, replace=(CONFIG, *_WEIGHTS)) as partial:
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        kinds = ((name, values.dtype, values.shape) for name, values in tensors.items())
        (shard,) = plan_shards(kinds, limit=2**62, stem="adapter_model")
        shard.write(partial, tensors.values())


def _fetch(array: jax.Array | np.ndarray) -> np.ndarray:
    """A host copy of an array that may be spread over several hosts, or lie on this one already."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _peft_config(rank: int, alpha: float, targets: list[str], foreign: list[str], base_model: str) -> dict[str, Any]:
    """The fields that PEFT 0.5 wrote and every later version reads."""
    # By PEFT's rule `mlp.c_proj` would also name the vision tower's; then only a pattern says what is meant.
    ambiguous = any(matches(module, targets) for module in foreign)
    return {
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "revision": None,
        "target_modules": decoder_pattern(targets) if ambiguous else targets,
        "task_type": "CAUSAL_LM",
    }
