"""The model card that `silkie export` writes for a run."""

import json

import pytest
import yaml

from silkie_jax.training.card import model_card
from silkie_jax.training.config_file import make_config

RUN = {"model": "weights/base", "corpus": "corpora/mine", "run_dir": "runs/mine"}


@pytest.fixture
def run(tmp_path):
    contents = {"id": "x", "corpus": "c" * 64, "weights": "w" * 64, "tokenizer": "t" * 64, "adapter": None}
    (tmp_path / "run.json").write_text(json.dumps(contents))
    rows = [
        {"step": 1, "loss": 0.6931, "rewards/accuracies": 0.5, "input_wait": 0.1},
        {"step": 2, "eval_pope/f1": 0.81},
        {"step": 4, "loss": 0.25, "rewards/accuracies": 0.875, "input_wait": 0.1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_it_says_what_the_run_recorded(run):
    config = make_config(RUN | {"lora": {"rank": 8, "alpha": 16}, "beta": 0.2, "pair_rule": "longest_as_best"})
    card = model_card(config, run, "silkie-mine")
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["silkie_jax", "qwen-vl", "dpo"]
    for line in (
        "# silkie-mine",
        f"| base | `weights/base`, SHA-256 `{'w' * 16}` |",
        f"| corpus | `corpora/mine`, SHA-256 `{'c' * 16}` |",
        "| loss | sigmoid, beta 0.2 |",
        "| pairs | longest_as_best |",
        "| trained | LoRA of rank 8, alpha 16 |",
        "| steps | finished after 4 |",
        "| loss | 0.6931 | 0.25 |",
        "| pairs ranked rightly | 0.5 | 0.875 |",
        "| eval_pope/f1 | 0.81 | 0.81 |",
    ):
        assert line in body.splitlines(), line
    assert "input_wait" not in body


def test_of_a_checkpoint_nothing_later_is_said(run):
    config = make_config(RUN | {"objective": "sft", "imitate": "all", "lora": None, "train_vision": "all"})
    card = model_card(config, run, "half", step=2)
    assert "| steps | checkpoint of 2 |" in card
    assert "| loss | 0.6931 | 0.6931 |" in card
    assert "| trained | decoder, vision tower and resampler |" in card
    assert "supervised fine-tuning" in card


def test_a_policy_trained_with_a_condition_says_what_it_is_to_be_asked(run):
    config = make_config(RUN | {"objective": "sft", "imitate": {"name": "best", "at_least": 12}})
    assert "| imitated | best responses, at_least 12 |" in model_card(config, run, "best")
    (run / "condition.txt").write_text("Rated so:\nA:4,B:4\n")
    config = make_config(RUN | {"objective": "sft", "condition": {"name": "attributes", "best": 4}})
    card = model_card(config, run, "steered")
    assert "| to be asked, below every question | `Rated so:` then `A:4,B:4` |" in card


def test_an_adapter_is_used_over_its_base(run):
    config = make_config(RUN)
    card = model_card(config, run, "mine-adapter", adapter=True)
    assert "library_name: peft" in card
    assert "silkie chat weights/base --adapter mine-adapter" in card
