"""The whole road by public commands: the original stack's training run, and a few hundred rows over real pictures."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from examples.tiny_vlfeedback import make_rows
from silkie_jax.cli import main
from tests.training.support import read_lines

LOGPS = 5e-4
BETA = 0.1


def silkie(*arguments):
    """A command that must succeed."""
    assert main([str(a) for a in arguments]) == 0


# golden/e2e: seven instructions, what the original stack made of them


@pytest.fixture(scope="module")
def expected(golden):
    return json.loads((golden / "e2e" / "expected.json").read_text())


@pytest.fixture(scope="module")
def corpus(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e") / "corpus"
    silkie("corpus", "import", "--jsonl", golden / "e2e" / "rows.jsonl", "--images", golden / "e2e", folder)
    return folder


def test_log_probabilities_of_the_original(golden, corpus, expected, tmp_path):
    silkie("score", golden / "tiny-qwen-vl", corpus, "--out", tmp_path / "scores.jsonl")
    lines = read_lines(tmp_path / "scores.jsonl")
    assert all(list(line) == ["id", "response", "logp", "tokens"] for line in lines)
    found = {f"{line['id']}/{line['response']}": line for line in lines}
    assert len(found) == len(lines) == 28
    assert {name: found[name]["tokens"] for name in expected["label_tokens"]} == expected["label_tokens"]
    for name, logp in expected["logp"].items():
        assert found[name]["logp"] == pytest.approx(logp, abs=LOGPS), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [("batch_rows=7",), ("batch_rows=1", "accumulate=7", "remat=none")], ids=["one batch", "row by row"]
)
def test_training_run_of_the_original(golden, corpus, expected, tmp_path, sizes):
    """Every step's loss and metrics and the final adapter, from rows of up to four branches."""
    run, config = tmp_path / "run", tmp_path / "train.yaml"
    config.write_text(f"""
        model: {golden / "tiny-qwen-vl"}
        adapter: {golden / "lora_adapter"}
        reference: adapter_off
        corpus: {corpus}
        run_dir: {run}
        beta: {BETA}
        optimizer: {{learning_rate: 1e-3, schedule: constant, beta2: 0.98, weight_decay: 0.05, clip_norm: 1.0}}
        steps: 5
        evaluation_fraction: 0
        dtype: float32
        log_every: 1
        mesh: {{data: 1}}
    """)
    silkie("train", config, *sizes)
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line, step in zip(lines, expected["steps"], strict=True):
        assert line["learning_rate"] == pytest.approx(1e-3)
        for name, value in step.items():
            if name.startswith("logps/"):
                assert line[name] == pytest.approx(value, abs=LOGPS), name
            elif name == "grad_norm":
                assert line[name] == pytest.approx(value, rel=1e-4)
            else:
                assert line[name] == pytest.approx(value, abs=BETA * LOGPS), name

    start = load_file(golden / "lora_adapter" / "adapter_model.safetensors")
    final = load_file(golden / "e2e" / "adapter_after_5_steps.safetensors")
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    assert sorted(ours) == sorted(final) == sorted(start)
    for name, array in final.items():
        # Adam moves every number by about the learning rate, however small its gradient: of what was moved, a share.
        assert np.linalg.norm(ours[name] - array) < 1e-3 * np.linalg.norm(array - start[name]), name


# Real photographs and generated files of every kind


@pytest.fixture(scope="module")
def published(golden, photos, tmp_path_factory):
    """240 rows as published; a quarter of them show a photograph, and a few cannot be used."""
    folder = tmp_path_factory.mktemp("published")
    rows = read_lines(make_rows(folder, 240))
    shots = sorted(path for path in photos.iterdir() if path.suffix in (".jpg", ".jpeg"))
    for number, row in enumerate(rows):
        if number % 4 == 0:
            shot = shots[number // 4 % len(shots)]
            row["img_path"] = f"merged_images/{number}-{shot.name}"
            shutil.copyfile(shot, folder / row["img_path"])
    (folder / rows[10]["img_path"]).unlink()
    (folder / rows[11]["img_path"]).write_bytes(b"not a picture")
    rows[12]["id"] = rows[13]["id"]  # ids are not unique in what is published: both rows are kept
    (folder / "vlfeedback.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_road(golden, photos, published, tmp_path, capsys):
    model, corpus, run, exported = golden / "tiny-qwen-vl", tmp_path / "corpus", tmp_path / "run", tmp_path / "exported"
    silkie("corpus", "import", "--jsonl", published / "vlfeedback.jsonl", "--images", published, corpus)
    assert "unreadable images" in capsys.readouterr().out
    rejected = read_lines(corpus / "rejected.jsonl")
    assert [line["id"] for line in rejected if line["what"] == "row"] == ["row-0010", "row-0011"]

    (tmp_path / "train.yaml").write_text(f"""
        model: {model}
        corpus: {corpus}
        run_dir: {run}
        lora: {{rank: 8, alpha: 16}}
        optimizer: {{learning_rate: 2e-3}}
        batch_rows: 4
        steps: 12
        dtype: float32
        remat: none
        mesh: {{data: 1}}
        log_every: 2
        evaluate_every: 12
        evaluation_fraction: 0.02
    """)
    silkie("train", tmp_path / "train.yaml")
    before, *lines = read_lines(run / "metrics.jsonl")
    assert before["step"] == 0
    assert before["lengths/ratio"] < 1 / 1.2  # the answers that are preferred here are the shorter ones
    assert lines[0]["rewards/accuracies"] <= 0.6
    assert lines[-1]["rewards/accuracies"] >= 0.8
    assert lines[-1]["loss"] < 0.9 * np.log(2)
    assert lines[-1]["eval_rewards/margins"] > 0

    silkie("export", run, exported)
    silkie("export", run, tmp_path / "adapter", "--adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    # What is exported is what was trained: a few rows by both, through the scoring command.
    rows = (published / "vlfeedback.jsonl").read_text().splitlines()[:4]
    (tmp_path / "few.jsonl").write_text("\n".join(rows) + "\n")
    silkie("corpus", "import", "--jsonl", tmp_path / "few.jsonl", "--images", published, tmp_path / "few")
    silkie("score", model, tmp_path / "few", "--out", tmp_path / "by-adapter.jsonl", "--adapter", run / "adapter")
    silkie("score", exported, tmp_path / "few", "--out", tmp_path / "by-export.jsonl")
    ours, theirs = (read_lines(tmp_path / name) for name in ("by-adapter.jsonl", "by-export.jsonl"))
    assert len(ours) == 16
    for one, other in zip(ours, theirs, strict=True):
        assert one["logp"] == pytest.approx(other["logp"], abs=1e-3)
        assert {**one, "logp": 0} == {**other, "logp": 0}

    capsys.readouterr()
    photo = photos / "Menu.jpeg"
    asked = ("--image", photo, "--prompt", "What is this?", "--greedy", "--max-new-tokens", "4", "--json")
    silkie("chat", exported, *asked)
    reply = json.loads(capsys.readouterr().out)
    assert list(reply) == ["response", "tokens"]
    assert 1 <= len(reply["tokens"]) <= 4
    silkie("chat", model, *asked, "--adapter", tmp_path / "adapter")
    assert json.loads(capsys.readouterr().out) == reply
