"""Every mistake in a configuration is one line that names the key."""

import dataclasses
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from silkie_jax.corpus.imitation import check_imitate
from silkie_jax.corpus.pairs import check_rule
from silkie_jax.errors import UserError
from silkie_jax.preference.condition import read_condition
from silkie_jax.training.config_file import check_same_run, load_config, make_config, save_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GIVEN = {"model": "m", "corpus": "c", "run_dir": "r"}


def refused(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What is filled in


def test_defaults_are_the_papers_recipe():
    config = make_config(GIVEN)
    assert (config.beta, config.loss, config.objective, config.reference) == (0.1, "sigmoid", "dpo", "adapter_off")
    assert (config.lora.rank, config.lora.alpha) == (64, 16)
    assert config.lora.targets == ["c_attn", "attn.c_proj", "w1", "w2"]
    o = config.optimizer
    assert (o.learning_rate, o.schedule, o.warmup_ratio) == (1e-5, "cosine", 0.1)
    assert (o.beta2, o.weight_decay) == (0.98, 0.05)
    assert (config.epochs, config.steps, config.max_length, config.max_prompt_length) == (3, None, 2048, 1024)
    assert config.train_vision == "none"


def test_what_follows_from_other_keys():
    assert make_config(GIVEN | {"lora": None}).reference == "copy"
    assert make_config(GIVEN | {"train_vision": "resampler"}).reference == "copy"
    assert make_config(GIVEN | {"adapter": "a"}).reference == "copy"  # and not the base under it
    assert make_config(GIVEN | {"adapter": "a", "reference": "adapter_off"}).reference == "adapter_off"
    sft = make_config(GIVEN | {"objective": "sft"})
    assert (sft.reference, sft.imitate) == (None, "chosen")
    assert make_config(GIVEN).imitate is None
    assert make_config(GIVEN | {"objective": "sft", "imitate": {"name": "all"}}).imitate == "all"
    steered = {"objective": "sft", "condition": {"name": "attributes", "best": 4}}
    assert make_config(GIVEN | steered).imitate == "all"
    assert make_config(GIVEN | steered | {"imitate": "best"}).imitate == "best"
    assert make_config(GIVEN | {"optimizer": {"schedule": "constant"}}).optimizer.warmup_ratio == 0
    assert make_config(GIVEN | {"steps": 5}).epochs is None
    assert make_config(GIVEN | {"max_length": 600}).max_prompt_length == 300
    rule = {"name": "weighted", "weights": {"Helpfulness": 2}}
    assert make_config(GIVEN | {"pair_rule": rule}).pair_rule == rule


# Files and overrides


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("model: m\ncorpus: c\nrun_dir: r\nlora:\n  rank: 8\noptimizer: {learning_rate: 1e-4}\n")
    return path


def test_overrides_replace_values_of_the_file(file):
    overrides = [
        "lora.rank=4",
        "lora.targets=[w1,w2]",
        "optimizer.clip_norm=null",
        "mesh.fsdp=2",
        "beta=0.5",
        "steps=7",
    ]
    config = load_config(file, overrides)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (4, 16, ["w1", "w2"])
    assert (config.optimizer.clip_norm, config.optimizer.learning_rate) == (None, 1e-4)
    assert (config.mesh.fsdp, config.steps) == (2, 7)
    assert load_config(file, ["lora=null"]).lora is None
    assert load_config(file, ["pair_rule.name=aspect", "pair_rule.aspect=Helpfulness"]).pair_rule == {
        "name": "aspect",
        "aspect": "Helpfulness",
    }
    assert load_config(file, ["run_dir=runs/a=b"]).run_dir == "runs/a=b"
    assert load_config(file, ["run_dir=runs/${lora.rank}-${seed}"]).run_dir == "runs/8-0"


def test_a_file_may_extend_another(file, tmp_path):
    (tmp_path / "more.yaml").write_text("extends: train.yaml\nlora: {alpha: 2}\nseed: 3\n")
    config = load_config(tmp_path / "more.yaml", ["seed=4"])
    assert (config.model, config.lora.rank, config.lora.alpha, config.seed) == ("m", 8, 2, 4)
    (tmp_path / "loop.yaml").write_text("extends: more.yaml\n")
    (tmp_path / "train.yaml").write_text("extends: loop.yaml\n")
    assert "loop.yaml: extends more.yaml, which extends it" in refused(load_config, tmp_path / "more.yaml")
    (tmp_path / "train.yaml").write_text("extends: gone.yaml\n")
    assert "gone.yaml: no such config file" in refused(load_config, tmp_path / "more.yaml")


@pytest.mark.parametrize("name", ["five-attributes", "rejection", "steerlm"])
def test_the_uses_of_five_attributes_are_configurations(name):
    config = load_config(CONFIGS / "systems" / f"{name}.yaml")
    assert (config.lora.rank, config.lora.alpha, config.optimizer.warmup_ratio) == (128, 256, 0.03)
    assert config.objective == ("dpo" if name == "five-attributes" else "sft")
    aspects = ["Helpfulness", "Correctness", "Coherence", "Complexity", "Verbosity"]
    if config.objective == "dpo":
        check_rule(config.pair_rule, aspects)
    else:
        check_imitate(config.imitate, aspects)
    assert (config.condition is not None) == (name == "steerlm")
    if config.condition:
        assert read_condition(config.condition, aspects).aspects == tuple(aspects)


def test_saved_configuration_is_the_same(file, tmp_path):
    for overrides in (
        [],
        ["lora=null"],
        ["pair_rule={name: weighted, weights: {Helpfulness: 2.5}}"],
        ["objective=sft"],
        ["objective=sft", "imitate={name: best, weights: {Helpfulness: 1.5}, at_least: 12}"],
    ):
        config = load_config(file, overrides)
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        check_same_run(config, tmp_path / "saved.yaml")


def test_files_that_cannot_be_read(tmp_path, file):
    assert refused(load_config, tmp_path / "none.yaml") == f"{tmp_path / 'none.yaml'}: no such config file"
    assert "cannot be read" in refused(load_config, tmp_path)
    broken = tmp_path / "broken.yaml"
    for text in ("a: [1", "a: b: c", "\tx: 1", "%"):
        broken.write_text(text)
        assert refused(load_config, broken).startswith(f"{broken}: not valid YAML")
    for text in ("- a\n- b\n", "just words\n"):
        broken.write_text(text)
        assert str(broken) in refused(load_config, broken)
    broken.write_bytes(b"model: \xff\xfe")
    assert str(broken) in refused(load_config, broken)
    broken.write_text("")
    assert refused(load_config, broken) == f"{broken}: model, corpus, run_dir must be set"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "'steps' is not an override; write key=value"),
        ("--steps=3", "--steps"),
        ("=3", "'=3' is not an override"),
        ("lora.rank=[a", "lora.rank=[a"),
        ("lora.rank=", "lora.rank"),
        ("steps=three", "steps must be a whole number, not a text"),
        ("steps=1.5", "steps must be a whole number, not 1.5"),
        ("lora=8", "lora must hold keys, such as lora.rank, not 8"),
        ("mesh=8", "mesh must hold keys, such as mesh.data, not 8"),
        ("optimizer=null", "optimizer must hold keys, such as optimizer.learning_rate, not null"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate must be a number, not a text"),
        ("lora.targets=c_attn", "lora.targets"),
        ("model=${corpus2}", "corpus2"),
        ("model=${", "model"),
    ],
)
def test_overrides_that_mean_nothing(file, override, message):
    assert message in refused(load_config, file, [override])


# Rules


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", 1e-4, "unknown key learning_rate; there are "),
        ("optimiser", {}, "unknown key optimiser; did you mean optimizer?"),
        ("optimizer", {"lr": 1}, "unknown key optimizer.lr; there are "),
        ("lora", {"ranks": 1}, "unknown key lora.ranks; did you mean lora.rank?"),
        ("mesh", {"model": 2}, "unknown key mesh.model"),
        (3, 1, "unknown key 3"),
        ("model", "", "model must be set"),
        ("model", None, "model"),
        ("objective", "ppo", "objective: 'ppo' is unknown; choose one of dpo, sft"),
        ("loss", "dpo", "loss: 'dpo' is unknown"),
        ("reference", "none", "reference: 'none' is unknown"),
        ("train_vision", "yes", "train_vision: 'yes' is unknown; choose one of none, resampler, all"),
        ("dtype", "float16", "dtype: 'float16' is unknown"),
        ("remat", "some", "remat: 'some' is unknown"),
        ("batch_rows", 0, "batch_rows must be at least 1, not 0"),
        ("accumulate", 0, "accumulate must be at least 1"),
        ("checkpoint_every", 0, "checkpoint_every must be at least 1"),
        ("log_every", -1, "log_every must be at least 1"),
        ("evaluate_every", -1, "evaluate_every must be at least 1, or 0 for never, not -1"),
        ("evaluate_at_start", "often", "evaluate_at_start"),
        ("batch_tokens", 0, "batch_tokens must be at least 1, or null, not 0"),
        ("workers", 0, "workers must be at least 1"),
        ("seed", -1, "seed must be in [0, 2**32), not -1"),
        ("seed", 2**32, "seed must be in [0, 2**32), not 4294967296"),
        ("epochs", 0, "epochs must be positive"),
        ("epochs", float("nan"), "epochs must be positive"),
        ("steps", 0, "steps must be at least 1"),
        ("max_length", 4, "max_length must be at least 8"),
        ("max_prompt_length", 2048, "max_prompt_length must be between 1 and max_length 2048, not 2048"),
        ("evaluation_fraction", 1.0, "evaluation_fraction must be in [0, 1)"),
        ("beta", 0, "beta must be positive"),
        ("beta", float("nan"), "beta must be positive"),
        ("sft_weight", -0.1, "sft_weight must be at least 0 and finite, not -0.1"),
        ("imitate", "worst", "imitate has no meaning in objective dpo"),
        ("label_smoothing", 0.5, "label_smoothing must be in [0, 0.5)"),
        ("mesh", {"data": 0}, "mesh sizes must be at least 1, or -1 for the rest"),
        ("mesh", {"data": -1, "fsdp": -1}, "only one mesh axis can be -1"),
        ("lora", {"rank": 0}, "lora.rank must be at least 1"),
        ("lora", {"alpha": 0}, "lora.alpha must be positive"),
        ("lora", {"targets": []}, "lora.targets is empty"),
        ("optimizer", {"learning_rate": 0}, "optimizer.learning_rate must be positive"),
        ("optimizer", {"learning_rate": float("nan")}, "optimizer.learning_rate must be positive"),
        ("optimizer", {"vision_learning_rate": 0}, "optimizer.vision_learning_rate must be positive, or null"),
        ("optimizer", {"resampler_learning_rate": -1.0}, "optimizer.resampler_learning_rate must be positive, or null"),
        ("optimizer", {"schedule": "step"}, "optimizer.schedule: 'step' is unknown"),
        ("optimizer", {"warmup_ratio": 1.0}, "optimizer.warmup_ratio must be in [0, 1)"),
        ("optimizer", {"beta2": 1.0}, "optimizer.beta1 and beta2 must be in [0, 1)"),
        ("optimizer", {"eps": 0}, "optimizer.eps must be positive"),
        ("optimizer", {"clip_norm": 0}, "optimizer.clip_norm must be positive, or null"),
    ],
)
def test_rules_over_one_key(key, value, message):
    assert message in refused(make_config, GIVEN | {key: value})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epochs": 1, "steps": 5}, "epochs and steps are both set"),
        ({"lora": None, "reference": "adapter_off"}, "reference adapter_off needs lora"),
        ({"lora": None, "adapter": "a"}, "adapter is set but lora is null"),
        ({"train_vision": "all", "reference": "adapter_off"}, "reference adapter_off needs a frozen vision tower"),
        ({"objective": "sft", "reference": "copy"}, "reference has no meaning in objective sft"),
        ({"objective": "sft", "sft_weight": 1.0}, "sft_weight has no meaning in objective sft"),
        ({"objective": "sft", "imitate": "worst"}, "imitate: 'worst' is unknown; choose one of all, chosen, best"),
        ({"objective": "sft", "imitate": 3}, "imitate: 3 is unknown"),
        ({"objective": "sft", "imitate": {"at_least": 3}}, "imitate: '' is unknown"),
        ({"objective": "sft", "imitate": {"name": "all", "at_least": 3}}, "imitate all: unknown option 'at_least'"),
        ({"objective": "sft", "imitate": {"name": "best", "least": 3}}, "its options: weights, at_least"),
        ({"objective": "sft", "imitate": {"name": "best", "weights": {"A": -1}}}, "imitate best: weights must map"),
        ({"objective": "sft", "imitate": {"name": "best", "at_least": "3"}}, "at_least must be a number, not '3'"),
        (
            {"objective": "sft", "imitate": {"name": "best", "at_least": 3}, "pair_rule": "given"},
            "pair_rule has no meaning with imitate",
        ),
        ({"imitate": "all"}, "imitate has no meaning in objective dpo; remove it"),
        ({"condition": {"name": "attributes", "best": 4}}, "condition has no meaning in objective dpo; remove it"),
        ({"objective": "sft", "condition": "attributes"}, "condition: write {name: attributes, best: 4}"),
        ({"objective": "sft", "condition": {"name": "mood"}}, "condition: 'mood' is unknown; choose one of attributes"),
        ({"objective": "sft", "condition": {"name": "attributes"}}, "best is None"),
        (
            {"objective": "sft", "condition": {"name": "attributes", "best": 4, "worst": 0}},
            "unknown option 'worst'; its options: best, aspects",
        ),
        (
            {"objective": "sft", "condition": {"name": "attributes", "best": 4, "aspects": "A"}},
            "aspects must be a list of names, not 'A'",
        ),
        (
            {"objective": "sft", "imitate": "best", "pair_rule": "given"},
            "pair_rule has no meaning with imitate best; remove it, or set imitate=chosen",
        ),
        (
            {"optimizer": {"vision_learning_rate": 1e-6}, "train_vision": "resampler"},
            "optimizer.vision_learning_rate is set, but train_vision resampler does not train the vision tower; "
            "set train_vision=all or remove it",
        ),
        (
            {"optimizer": {"resampler_learning_rate": 1e-6}},
            "optimizer.resampler_learning_rate is set, but train_vision none does not train the resampler; "
            "set train_vision=resampler or remove it",
        ),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing has no meaning in loss 'ipo'"),
        ({"loss": "hinge", "label_smoothing": 0.1}, "label_smoothing has no meaning in loss 'hinge'"),
    ],
)
def test_rules_over_several_keys(values, message):
    assert message in refused(make_config, GIVEN | values)


# One run, one configuration


def test_only_what_changes_no_result_may_change_on_the_way(tmp_path):
    before = make_config(GIVEN)
    save_config(before, tmp_path / "config.yaml")

    def changed(**values):
        return make_config(OmegaConf.merge(OmegaConf.structured(before), values))

    free = {"workers": 4, "log_every": 1, "evaluate_every": 7, "checkpoint_every": 3, "keep_checkpoints": 9}
    free |= {"mesh": {"data": 2}, "remat": "none", "run_dir": "moved", "wandb": "w"}
    free |= {"batch_tokens": 4096, "evaluate_at_start": True}
    check_same_run(changed(**free), tmp_path / "config.yaml")
    message = refused(check_same_run, changed(seed=1, lora={"rank": 8}), tmp_path / "config.yaml")
    assert "seed was 0 and is 1" in message
    assert "lora.rank was 64 and is 8" in message
    assert f"{tmp_path} holds another run" in message
    sft = make_config(GIVEN | {"objective": "sft"})
    save_config(sft, tmp_path / "sft.yaml")
    other = dataclasses.replace(sft, imitate="all")
    assert "imitate was 'chosen' and is 'all'" in refused(check_same_run, other, tmp_path / "sft.yaml")
    strict = dataclasses.replace(sft, imitate={"name": "best", "at_least": 12})
    save_config(strict, tmp_path / "strict.yaml")
    other = dataclasses.replace(sft, imitate={"name": "best", "weights": {"A": 1}})
    message = refused(check_same_run, other, tmp_path / "strict.yaml")
    assert "imitate.at_least was 12 and is None" in message
    assert "imitate.weights.A was None and is 1" in message
    full = {"lora": None, "reference": "copy"}
    for values in ({"beta": 0.2}, full, {"corpus": "d"}, {"steps": 5, "epochs": None}, {"batch_rows": 8}):
        assert "holds another run" in refused(check_same_run, changed(**values), tmp_path / "config.yaml")


def test_paths_may_change_where_contents_are_compared_instead(tmp_path):
    before = make_config(GIVEN | {"adapter": "a"})
    save_config(before, tmp_path / "config.yaml")
    moved = dataclasses.replace(before, model="m2", corpus="c2", adapter="a2")
    assert "model was" in refused(check_same_run, moved, tmp_path / "config.yaml")
    check_same_run(moved, tmp_path / "config.yaml", may_move=True)
    gone = dataclasses.replace(moved, adapter=None)
    message = refused(partial(check_same_run, may_move=True), gone, tmp_path / "config.yaml")
    assert "holds another run: adapter was 'a' and is None;" in message
