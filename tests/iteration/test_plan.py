"""What the rounds are made of: their commands, the weights of each, seeds, parts that do not overlap, and refusals."""

import dataclasses
import json
from pathlib import Path

import pytest

from data_prep.instructions.take import take
from data_prep.run import Run
from silkie_jax.corpus import Record, Response
from silkie_jax.errors import UserError
from silkie_jax.iteration import driver
from silkie_jax.iteration.config import load_iterate, taken
from silkie_jax.iteration.driver import iterate
from silkie_jax.iteration.plan import Files, has_instructions, has_ratings, has_responses, make_plan
from silkie_jax.iteration.table import agreements, measured, table
from tests.data_prep.rated import settle
from tests.data_prep.runs import make_run
from tests.training.support import record, write_corpus

POOL = {"models_per_instruction": 1, "models": {"own": {"local": "policy", "samples": 2}}}
IMPLICIT = {"kind": "implicit", "policy": {"local": "policy"}, "start": {"local": "start"}}


def write(path: Path, value) -> str:
    path.write_text(json.dumps(value))
    return str(path)


@pytest.fixture
def made(tmp_path):
    """Makes a configuration; `train` and `judge` are the files that it names."""
    make_run(tmp_path / "prompts", 10)

    def make(train=None, judge=None, overrides=(), **changes):
        given = {
            "run_dir": str(tmp_path / "root"),
            "start": {"model": "weights"},
            "instructions": str(tmp_path / "prompts"),
            "rounds": 3,
            "take": [2, 3, 4],
            "respond": write(tmp_path / "pool.yaml", POOL),
            "rate": [write(tmp_path / "critic.yaml", judge or {"agent": {"local": "policy"}})],
            "train": write(tmp_path / "train.yaml", {"beta": 0.1, **(train or {})}),
            **changes,
        }
        return load_iterate(write(tmp_path / "config.yaml", given), list(overrides))

    return make


def plan_of(config):
    return make_plan(config, Files.read(config))


def options(words) -> dict[str, str]:
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_the_policy_is_the_adapter_before_and_nothing_is_merged(made):
    rounds = plan_of(made())
    assert [stage.name for stage in rounds[0].stages] == ["take", "respond", "rate", "build", "train"]
    trained = [options(one.training) for one in rounds]
    adapters = ["null", *(str(one.folder / "train/adapter") for one in rounds[:2])]
    assert [one["adapter"] for one in trained] == adapters
    assert [one["reference"] for one in trained] == ["null", "copy", "copy"], "what each round begins with"
    assert {one["model"] for one in trained} == {"weights"}
    pools = [one.files["pool.yaml"]["models"]["own"] for one in rounds]
    assert [(pool["local"], pool.get("adapter", "null")) for pool in pools] == [("weights", name) for name in adapters]
    judge = rounds[1].files["judge-critic.yaml"]
    assert judge == {"name": "critic", "agent": {"local": "weights", "adapter": adapters[1]}}


def test_rounds_draw_by_seeds_of_their_own(made):
    seeds = [one.files["pool.yaml"]["seed"] for one in plan_of(made())]
    assert len(set(seeds)) == 3
    assert seeds == [one.files["pool.yaml"]["seed"] for one in plan_of(made())]
    assert not set(seeds) & {one.files["pool.yaml"]["seed"] for one in plan_of(made(seed=1))}


def test_a_first_round_on_given_pairs_and_what_differs_by_round(made):
    first = {"corpus": "corpora/seed", "train": {"epochs": 3, "loss": {"name": "sigmoid"}}}
    each = [{"optimizer.learning_rate": 0.5 / n} for n in (1, 2, 3)]
    rounds = plan_of(made(first=first, each=each, judge=IMPLICIT))
    assert [one.number for one in rounds] == [0, 1, 2, 3]
    assert [stage.name for stage in rounds[0].stages] == ["train"]
    trained = [options(one.training) for one in rounds]
    assert (trained[0]["corpus"], trained[0]["epochs"], trained[0]["loss"]) == (
        "corpora/seed",
        "3",
        '{"name": "sigmoid"}',
    )
    assert [one.get("optimizer.learning_rate") for one in trained] == [None, "0.5", "0.25", str(0.5 / 3)]
    judge = rounds[1].files["judge-critic.yaml"]
    assert judge["start"] == {"local": "weights"}, "always the weights before any training"
    assert judge["policy"] == {"local": "weights", "adapter": str(rounds[0].folder / "train/adapter")}


def test_rejection_sampling_has_no_reference(made):
    train = {"objective": "sft", "imitate": {"name": "best"}}
    assert {options(one.training)["reference"] for one in plan_of(made(train=train))} == {"null"}


def test_judges_whose_files_would_be_one_are_refused(made, tmp_path):
    rate = [write(tmp_path / f"{n}.yaml", {"name": name, "agent": {}}) for n, name in enumerate(("a b", "a-b"))]
    with pytest.raises(UserError, match="two judges 'a-b', or alike"):
        plan_of(made(rate=rate))


def test_a_stored_reference_is_a_stage_of_its_own(made):
    rounds = plan_of(made(train={"reference": "precomputed"}))
    assert [stage.name for stage in rounds[1].stages][-2:] == ["reference", "train"]
    assert {options(one.training)["reference"] for one in rounds} == {"precomputed"}
    assert rounds[1].stages[-2].words[0] == "reference"


def test_the_start_as_reference_is_the_policy_without_its_adapter(made):
    assert {options(one.training)["reference"] for one in plan_of(made(reference="start"))} == {"adapter_off"}


def test_full_fine_tuning_hands_models_on(made):
    rounds = plan_of(made(train={"lora": None}))
    trained = [options(one.training) for one in rounds]
    assert [one["model"] for one in trained] == ["weights", *(str(one.folder / "train/model") for one in rounds[:2])]
    assert {one["adapter"] for one in trained} == {"null"}


def test_merging_adds_all_adapters_so_far_to_the_start(made):
    rounds = plan_of(made(merge=True))
    merged = [str(one.folder / "merged") for one in rounds]
    assert [options(one.training)["model"] for one in rounds] == ["weights", *merged[:2]]
    assert {options(one.training)["adapter"] for one in rounds} == {"null"}
    words = rounds[1].stages[-1].words
    assert words[:3] == ("export", "weights", merged[1])
    assert words[3:] == (
        "--adapter",
        str(rounds[0].folder / "train/adapter"),
        "--adapter",
        str(rounds[1].folder / "train/adapter"),
    )


def test_rounds_take_parts_that_do_not_overlap(made, tmp_path):
    config = made()
    assert [taken(config, number) for number in (1, 2, 3)] == [(2, 0), (3, 2), (4, 5)]
    ids = []
    for number in (1, 2, 3):
        count, skip = taken(config, number)
        run = tmp_path / f"part-{number}"
        assert not has_instructions(run)
        assert take(config.instructions, run, count=count, skip=skip) == count
        assert take(config.instructions, run, count=count, skip=skip) == count, "once more changes nothing"
        assert has_instructions(run)
        with Run.open(run) as opened:
            ids.append([(i.id, opened.image(i.images[0])) for i in opened.instructions()])
    assert len({id for part in ids for id, _ in part}) == 9
    other = take(config.instructions, tmp_path / "other", count=2, seed=1)
    with Run.open(tmp_path / "other") as opened:
        assert other == 2
        assert [i.id for i in opened.instructions()] != [id for id, _ in ids[0]]
    assert taken(made(take="all"), 2) is None
    assert taken(made(take=5), 3) == (5, 10)


def test_a_stage_is_done_when_its_evidence_is_there(tmp_path):
    run = make_run(tmp_path / "run", 2)
    assert not has_responses(run)
    with Run.open(run, write=True) as opened:
        opened.save_settings("responses planned", 2)
        settle(opened, "respond", 1, "own", 0, None, None)
    assert not has_responses(run), "one is open"
    with Run.open(run, write=True) as opened:
        opened.db.execute("UPDATE requests SET state = 'ok'")
    assert has_responses(run)
    with Run.open(run, write=True) as opened:
        settle(opened, "search", 1, "own", 0, None, None)
    assert not has_responses(run), "a tree is still growing"
    with Run.open(run, write=True) as opened:
        opened.db.execute("UPDATE requests SET state = 'ok'")
    assert not has_ratings(run, ("critic",))
    with Run.open(run, write=True) as opened:
        opened.save_settings("judge:critic", {})
    assert has_ratings(run, ("critic",))
    assert not has_ratings(run, ("critic", "other"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"take": [2, 3]}, "take has 2 entries"),
        ({"take": 0}, "take must be a number of at least 1"),
        ({"each": [{}]}, "each has 1 entries"),
        ({"each": [{"model": "x"}, {}, {}]}, r"each\[0\]: model is set by each round itself"),
        ({"first": {"corpus": "c", "train": {"lora.rank": 2}}}, "first.train: lora.rank is set by each round"),
        ({"reference": "latest"}, "choose previous or start"),
        ({"keep": "none"}, "choose all or last"),
        ({"rate": []}, "rate must be set"),
        ({"until": "train"}, "unknown key until"),
        ({"train": {"lora": None}, "merge": True}, "merge: true adds a new adapter of each round"),
        ({"start": {"model": "weights", "adapter": "a"}, "merge": True}, "a start without an adapter"),
        ({"train": {"lora": None}, "reference": "start"}, "reference: start is the start without"),
        ({"judge": IMPLICIT}, "in round 1 the policy is the start itself"),
        ({"judge": {"agent": {"local": "policy", "adapter": "a"}}}, "brings its adapter along"),
    ],
)
def test_what_is_refused(made, changes, message):
    with pytest.raises(UserError, match=message):
        plan_of(made(**changes))


def test_more_instructions_than_there_are(made):
    with pytest.raises(UserError, match=r"all rounds take 15 instructions, and .* has 10"):
        iterate(made(take=5))


def test_a_plan_shows_the_commands_and_other_settings_are_refused(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(driver, "_check_training", lambda rounds: None)
    checked = []
    iterate(made(), plan=True, check_pool=checked.append, check_judge=checked.append)
    lines = capsys.readouterr().out.splitlines()
    root = tmp_path / "root"
    assert lines[0] == f"silkie corpus take {tmp_path / 'prompts'} {root / 'round-01/run'} --count 2 --skip 0 --seed 0"
    assert lines[1] == f"silkie corpus respond {root / 'round-01/run'} --pool {root / 'round-01/pool.yaml'}"
    assert len(lines) == 3 * 5
    assert checked == [root / f"round-{n:02d}" / name for n in (1, 2, 3) for name in ("pool.yaml", "judge-critic.yaml")]
    for change, message in (
        ({"take": [2, 4, 4]}, "take.1 was 3 and is 4"),
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"train": {"beta": 0.5}}, "another training config: beta was 0.1 and is 0.5"),
        ({"judge": {"agent": {"local": "policy"}, "orders": 2}}, "critic.orders was None and is 2"),
    ):
        with pytest.raises(UserError, match=message):
            iterate(made(**change), plan=True)
    iterate(made(rounds=4, take=[2, 3, 4, 1], keep="last", train={"workers": 4}), plan=True)  # more of the same
    take(tmp_path / "prompts", root / "round-01/run", count=2)
    capsys.readouterr()
    iterate(made(rounds=2), plan=True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("# done: ") for line in lines] == [True] + [False] * 9


def test_what_may_change_is_what_may_change_in_a_training_run():
    from silkie_jax.training.config import TrainConfig
    from silkie_jax.training.config_file import _FREE

    names = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "run_dir"]
    assert {name for name in names if _FREE.match(name) or _FREE.match(f"{name}.x")} == set(driver.MACHINE)


def test_two_drivers_keep_out_of_each_others_way(made, tmp_path):
    (tmp_path / "root").mkdir()
    with driver._alone(tmp_path / "root"), pytest.raises(UserError, match="another process, or a command that it left"):
        iterate(made(), plan=True)


def test_agreement_is_of_judges_or_of_one_judges_orders():
    def judged(*judgements):
        said = [{"judge": judge, "ratings": {"A": row}} for judge, row in judgements]
        texts = tuple(Response(str(n)) for n in range(3))
        return list(agreements(Record("i", (), "?", texts, extra={"judgements": said})))

    assert judged(("a", [1, 2, 3])) == []
    assert judged(("a", [1, 2, 3]), ("a", [1, 3, 2])) == [True, True, False]
    assert judged(("a", [1, 2, 2]), ("b", [3, 1, None])) == [False]


def test_a_round_is_counted_by_its_own_rule(made, tmp_path):
    seed = write_corpus(tmp_path / "seed", [record(number) for number in range(3)])
    first = {"corpus": str(seed), "train": {"pair_rule": "mean_rating"}}
    train = {"pair_rule": "best_vs_worst"}
    begin = plan_of(made(first=first, train=train))[0]
    begin.folder.mkdir(parents=True)
    assert measured(begin, train)["pairs"] == 3 * 6


def test_the_table():
    text = table([{"round": 1, "instructions": 1200, "pairs": 3, "ties": 0, "chosen": 0.1234, "warning": "longer"}])
    assert "1,200" in text
    assert "0.123" in text
    assert text.endswith("warning: round 1: longer\n")
