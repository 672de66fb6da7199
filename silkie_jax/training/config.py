"""The training configuration: typed, with its defaults, checked in one place (config_file.py reads and writes it)."""

import dataclasses
from collections.abc import Callable
from typing import Any

from silkie_jax.corpus.imitation import check_imitate, plain_imitate
from silkie_jax.errors import UserError
from silkie_jax.models.qwen_vl.flops import Training
from silkie_jax.models.qwen_vl.null_image import NullImage
from silkie_jax.preference.condition import check_condition
from silkie_jax.preference.losses import LossOptions, Term, passes_of, read_loss

OBJECTIVES = ("dpo", "sft")
REFERENCES = ("adapter_off", "copy", "precomputed")
QUANTIZE = ("int8",)
COMPUTE = ("fp8",)
FEATURES = ("live", "precomputed")
VISION = ("none", "resampler", "all")
SCHEDULES = ("cosine", "linear", "constant")
REMAT = ("full", "dots", "none")
ATTENTION = ("auto", "plain", "flash", "cudnn", "tokamax")
ON_NONFINITE = ("stop", "skip")
DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass
class LoraConfig:
    """Adapters on the decoder; `targets` follow PEFT's suffix rule."""

    rank: int = 64
    alpha: float = 16.0
    targets: list[str] = dataclasses.field(default_factory=lambda: ["c_attn", "attn.c_proj", "w1", "w2"])


@dataclasses.dataclass
class OptimizerConfig:
    """AdamW with decoupled weight decay (arXiv 1711.05101), not applied to biases and norms."""

    learning_rate: float = 1e-5
    vision_learning_rate: float | None = None  # of the vision tower without its resampler; None: learning_rate
    resampler_learning_rate: float | None = None  # the same of the resampler; the schedule is common
    schedule: str = "cosine"  # cosine and linear decay to zero at the last step
    warmup_ratio: float | None = None  # of all steps; None: 0.1, or 0 for a constant schedule
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0  # global norm of the gradient; None: not clipped


@dataclasses.dataclass
class MeshConfig:
    """Devices along each axis; -1 takes what the others leave (on one axis only)."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class BenchmarkConfig:
    """A part of a benchmark that a run is measured by (silkie_jax/evaluation)."""

    benchmark: str
    data: str
    limit: int | None = 200  # questions, drawn by image; null: all
    prompt: str | None = None  # one of the benchmark's prompts; null: its first
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    slots: int | None = None  # replies generated together; null: eight a device of the batch axes


@dataclasses.dataclass
class TrainConfig:
    """Everything a run depends on. The defaults are Silkie's recipe where it has one (arXiv 2312.10665)."""

    model: str = ""  # a converted or a Hugging Face folder
    corpus: str = ""
    run_dir: str = ""
    adapter: str | None = None  # start from this PEFT folder; its rank, alpha and targets replace `lora`
    objective: str = "dpo"
    imitate: Any = None  # responses that sft imitates, by name or with options; None: chosen, with a condition all
    condition: Any = None  # of sft: what is said of each response below its question
    loss: Any = "sigmoid"  # a name, {name: ..., options}, or a list of those with weights (losses/table.py)
    beta: float = 0.1
    label_smoothing: float = 0.0
    sft_weight: float = 0.0  # of the likelihood of chosen responses beside the loss of their pairs
    pair_rule: Any = None  # None: mean_rating, or the given pairs of a corpus that has no ratings
    reference: str | None = None  # None: the policy as it starts, by adapter_off where that is the same, else by copy
    lora: LoraConfig | None = dataclasses.field(default_factory=LoraConfig)  # null: full fine-tuning
    train_vision: str = "none"
    features: str = "live"  # of images: made by the vision tower in every step, or stored by `silkie reference`
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    batch_rows: int = 16  # instructions that go through the model at once, over all devices
    accumulate: int = 1  # such batches for one update
    batch_tokens: int | None = None  # most tokens that do so, padding included: of longer rows fewer go at once
    batch_pairs: int | None = None  # most pairs of an update; rows that would exceed it wait for the next one
    pack: int | None = None  # tokens up to which short rows are packed into one sequence; null: a row a sequence
    epochs: float | None = None  # None: 3, unless `steps` is given
    steps: int | None = None
    max_length: int = 2048  # tokens of prompt and one response
    max_prompt_length: int | None = None  # what a prompt is cut to where that is exceeded; None: half
    seed: int = 0
    dtype: str = "bfloat16"  # of computation and of frozen weights; what is trained is kept in float32
    quantize: str | None = None  # int8: frozen weights of decoder and tower are kept in 8 bits
    compute: str | None = None  # fp8: what is multiplied with these weights is in 8 bits, as they are
    remat: str = "dots"  # what is computed again: every layer (full), all but matmuls and flash, or nothing
    attention: str = "auto"  # the kernel; auto: what is best on the platform
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    on_nonfinite: str = "stop"  # at a gradient that is not finite: stop, or skip the update and count it
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    evaluate_every: int = 100  # steps, and at the last one; 0: never
    evaluate_at_start: bool = False  # before the first step, too
    evaluation_fraction: float = 0.005
    evaluate_with: list[BenchmarkConfig] = dataclasses.field(default_factory=list)  # at every checkpoint
    log_every: int = 10
    workers: int = 2  # threads that prepare batches
    wandb: str | None = None  # project to log to, where wandb is installed

    @property
    def codes(self) -> str | None:
        """What frozen weights are kept as, by the names of nn/quantize.py: METHODS; None: `dtype`."""
        return self.compute or self.quantize

    @property
    def loss_options(self) -> LossOptions:
        return LossOptions(self.beta, self.label_smoothing, self.sft_weight)

    @property
    def terms(self) -> tuple[Term, ...]:
        """The losses of pairs that are added up; none for objective sft."""
        return read_loss(self.loss, self.loss_options) if self.objective == "dpo" else ()

    @property
    def stored_null_image(self) -> NullImage | None:
        """The null image under which a stored reference is needed, too; None: it is not, or computed."""
        nulls = [term.needs.null for term in self.terms if self.reference == "precomputed"]
        return next((null.image for null in nulls if null and null.of == "reference"), None)

    @property
    def encoded_null_images(self) -> tuple[NullImage, ...]:
        """The null images that a loss needs and the vision tower makes features of."""
        nulls = {str(one.image): one.image for one in passes_of(self.terms) if one.image}
        return tuple(nulls[name] for name in sorted(nulls) if nulls[name].kind != "tokens")


def complete(config: TrainConfig, where: str = "config") -> TrainConfig:
    """The configuration with what depends on other keys filled in, checked as a whole; changes it in place.

    Raises:
      UserError: one line that names the key and the mend.
    """
    _resolve(config)
    _check(config, where)
    return config


def _resolve(config: TrainConfig) -> None:
    """Fills in the defaults that depend on other keys, so that the saved config says what was done."""
    if config.optimizer.warmup_ratio is None:
        config.optimizer.warmup_ratio = 0.0 if config.optimizer.schedule == "constant" else 0.1
    if config.epochs is None and config.steps is None:
        config.epochs = 3
    if config.max_prompt_length is None:
        config.max_prompt_length = config.max_length // 2
    if config.objective == "sft" and config.imitate is None:
        config.imitate = "all" if config.condition else "chosen"
    if isinstance(config.imitate, dict):
        config.imitate = plain_imitate(config.imitate)
    if config.objective == "dpo" and config.reference is None:
        # Without its adapter a policy is what it started from only where the adapter is a new one.
        fresh = config.lora and not config.adapter
        config.reference = "adapter_off" if fresh and config.train_vision == "none" else "copy"


def _check(config: TrainConfig, where: str) -> None:
    """All rules over single keys and over several; each message names the key and the mend."""

    def need(ok: bool, message: str) -> None:
        if not ok:
            raise UserError(f"{where}: {message}")

    def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
        need(value in choices, f"{key}: {value!r} is unknown; choose one of {', '.join(choices)}")

    def checked(check: Callable[..., Any], *values: Any) -> None:
        try:
            check(*values)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None

    missing = [key for key in ("model", "corpus", "run_dir") if getattr(config, key) == ""]
    need(not missing, f"{', '.join(missing)} must be set")
    one_of("objective", config.objective, OBJECTIVES)
    one_of("train_vision", config.train_vision, VISION)
    one_of("features", config.features, FEATURES)
    one_of("optimizer.schedule", config.optimizer.schedule, SCHEDULES)
    one_of("dtype", config.dtype, DTYPES)
    one_of("remat", config.remat, REMAT)
    one_of("attention", config.attention, ATTENTION)
    one_of("on_nonfinite", config.on_nonfinite, ON_NONFINITE)
    need(config.evaluate_every >= 0, f"evaluate_every must be at least 1, or 0 for never, not {config.evaluate_every}")
    for key in ("batch_rows", "accumulate", "checkpoint_every", "keep_checkpoints", "log_every"):
        need(getattr(config, key) >= 1, f"{key} must be at least 1, not {getattr(config, key)}")
    for key in ("batch_tokens", "batch_pairs", "pack"):
        value = getattr(config, key)
        need(value is None or value >= 1, f"{key} must be at least 1, or null, not {value}")
    need(config.batch_pairs is None or config.objective == "dpo", "batch_pairs has no meaning in objective sft")
    need(0 <= config.seed < 2**32, f"seed must be in [0, 2**32), not {config.seed}")
    need(config.workers >= 1, f"workers must be at least 1, not {config.workers}")
    need(config.epochs is None or config.steps is None, "epochs and steps are both set; keep one")
    need(config.epochs is None or config.epochs > 0, f"epochs must be positive, not {config.epochs}")
    need(config.steps is None or config.steps >= 1, f"steps must be at least 1, not {config.steps}")
    need(config.max_length >= 8, f"max_length must be at least 8, not {config.max_length}")
    need(
        0 < (config.max_prompt_length or 0) < config.max_length,
        f"max_prompt_length must be between 1 and max_length {config.max_length}, not {config.max_prompt_length}",
    )
    need(
        0 <= config.evaluation_fraction < 1,
        f"evaluation_fraction must be in [0, 1), not {config.evaluation_fraction}",
    )
    sizes = dataclasses.astuple(config.mesh)
    need(all(s == -1 or s >= 1 for s in sizes), f"mesh sizes must be at least 1, or -1 for the rest, not {sizes}")
    need(sizes.count(-1) <= 1, "only one mesh axis can be -1")
    for key, choices in (("quantize", QUANTIZE), ("compute", COMPUTE)):
        value = getattr(config, key)
        if value is None:
            continue
        one_of(key, value, choices)
        need(bool(config.lora), f"{key} {value} is of frozen weights, and lora is null; set {key}=null")
        need(
            config.train_vision == "none",
            f"{key} {value} is of frozen weights, but train_vision is {config.train_vision}; set {key}=null",
        )
    need(
        not (config.quantize and config.compute),
        f"compute {config.compute} keeps frozen weights in 8 bits of its own; set quantize=null",
    )
    if config.features == "precomputed":
        need(
            config.train_vision == "none",
            f"features precomputed needs a frozen vision tower, but train_vision is {config.train_vision}; "
            "use features: live",
        )
        need(
            not config.evaluate_with,
            "features precomputed leaves the vision tower out, which evaluate_with needs; use features: live, or "
            "`silkie evaluate run` on a checkpoint",
        )
    o = config.optimizer
    need(o.learning_rate > 0, f"optimizer.learning_rate must be positive, not {o.learning_rate}")
    for part, trained_by in (("vision", ("all",)), ("resampler", ("resampler", "all"))):
        rate = getattr(o, f"{part}_learning_rate")
        key = f"optimizer.{part}_learning_rate"
        need(rate is None or rate > 0, f"{key} must be positive, or null for learning_rate, not {rate}")
        need(
            rate is None or config.train_vision in trained_by,
            f"{key} is set, but train_vision {config.train_vision} does not train the "
            f"{'vision tower' if part == 'vision' else part}; set train_vision={trained_by[0]} or remove it",
        )
    need(0 <= (o.warmup_ratio or 0) < 1, f"optimizer.warmup_ratio must be in [0, 1), not {o.warmup_ratio}")
    need(0 <= o.beta1 < 1 and 0 <= o.beta2 < 1, "optimizer.beta1 and beta2 must be in [0, 1)")
    need(o.eps > 0 and o.weight_decay >= 0, "optimizer.eps must be positive and weight_decay not negative")
    need(o.clip_norm is None or o.clip_norm > 0, "optimizer.clip_norm must be positive, or null for none")
    if config.lora:
        need(config.lora.rank >= 1, f"lora.rank must be at least 1, not {config.lora.rank}")
        need(config.lora.alpha > 0, f"lora.alpha must be positive, not {config.lora.alpha}")
        need(bool(config.lora.targets), "lora.targets is empty; name layers, or set lora=null for full fine-tuning")
    need(
        not config.adapter or bool(config.lora), "adapter is set but lora is null; merge it with `silkie export` first"
    )
    if config.objective == "sft":
        need(config.reference is None, "reference has no meaning in objective sft; remove it")
        need(config.sft_weight == 0, "sft_weight has no meaning in objective sft; remove it")
        checked(check_imitate, config.imitate)
        if config.condition is not None:
            checked(check_condition, config.condition)
        need(
            config.imitate == "chosen" or config.pair_rule is None,
            f"pair_rule has no meaning with imitate {config.imitate}; remove it, or set imitate=chosen",
        )
        return
    need(config.imitate is None, "imitate has no meaning in objective dpo; remove it")
    need(config.condition is None, "condition has no meaning in objective dpo; remove it")
    one_of("reference", config.reference or "", REFERENCES)
    if config.reference == "adapter_off":
        need(bool(config.lora), "reference adapter_off needs lora; use reference: copy for full fine-tuning")
        need(
            config.train_vision == "none",
            f"reference adapter_off needs a frozen vision tower, but train_vision is {config.train_vision}; "
            "use reference: copy",
        )
    checked(read_loss, config.loss, config.loss_options)
    for term in config.terms:
        null, mixed = term.needs.null, term.needs.mixed
        more = [p for p in (null, mixed.against if mixed else None) if p and p.of == "reference"]
        need(
            config.compute is None or config.reference == "precomputed" or not more,
            f"loss {term.name} wants more of the reference than its log-probabilities, which compute "
            f"{config.compute} does not give; set compute=null{'' if mixed else ' or reference=precomputed'}",
        )
        need(
            config.reference != "precomputed" or mixed is None or mixed.against.of != "reference",
            f"loss {term.name} extrapolates the reference's scores, and reference precomputed has its "
            "log-probabilities alone; use reference: adapter_off or copy",
        )


def training_of(config: TrainConfig) -> Training:
    """What a run's configuration says about the work of its steps."""
    extra = passes_of(config.terms)
    live = config.reference in ("adapter_off", "copy")
    nulls = [one for one in extra if one.of == "policy" or live]
    return Training(
        lora_rank=config.lora.rank if config.lora else None,
        lora_targets=tuple(config.lora.targets) if config.lora else (),
        train_vision=config.train_vision,
        stored_features=config.features == "precomputed",
        live_reference=live,
        null_passes=sum(one.image.draws for one in nulls if one.image),
        null_images=0 if config.features == "precomputed" else sum(null.draws for null in config.encoded_null_images),
        mixed_gradient=any(term.needs.mixed and term.needs.mixed.through != "nothing" for term in config.terms),
        remat=config.remat,
        attention_again=config.attention in ("plain", "cudnn", "tokamax"),
    )
