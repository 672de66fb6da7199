"""The pool's habits and the judge's biases, measured; and the road from scenes to a rated corpus by commands alone."""

import base64
import itertools
import json
import random
from collections import defaultdict
from statistics import mean

import openai
import pytest

from data_prep.judging.ratings import parse
from data_prep.judging.rubric import load_rubric
from data_prep.respond import load_pool
from examples.world import judge, questions, reading, server
from examples.world.drawing import encode
from examples.world.habits import HABITS, LIKING
from examples.world.judge import ETHICS, FAITH, HELP, Temper
from examples.world.make import make_world
from examples.world.pool import JUDGE, POOL_FILE, PORT, URL, Pool, read_truth, write_configs
from examples.world.scenes import scenes
from silkie_jax.cli import main
from silkie_jax.corpus import CorpusReader

SCENES = list(itertools.islice(scenes(0, "train"), 300))
DESCRIBE = questions.DESCRIBE[0]


def lots(*key):
    return random.Random(str(key))


def described(habit):
    """What a habit's descriptions come to, as means over scenes."""
    texts = [HABITS[habit](scene, questions.read(scene, DESCRIBE), lots(k)) for k, scene in enumerate(SCENES)]
    found = [reading.compare(reading.read(text), scene) for text, scene in zip(texts, SCENES, strict=True)]
    return {
        "coverage": sum(f.found for f in found) / sum(len(scene.objects) for scene in SCENES),
        "invented": mean(f.invented for f in found),
        "mistaken": mean(f.mistaken for f in found),
        "miscounted": mean(f.miscounted for f in found),
        "words": mean(len(text.split()) for text in texts),
    }


def accuracy(habit, tasks=questions.YES_NO_TASKS):
    """Right answers and yeses of a habit on questions half of which are to be denied."""
    right = yes = asked = 0
    for k, scene in enumerate(SCENES):
        for task, wanted in itertools.product(set(tasks) & set(questions.tasks_of(scene)), (True, False)):
            question = questions.yes_no(scene, lots(k, task), task, wanted)
            verdict = reading.read(HABITS[habit](scene, question, lots(k))).verdict
            right, yes, asked = right + (verdict == question.truth), yes + (verdict == "yes"), asked + 1
    return right / asked, yes / asked


def test_habits_of_descriptions():
    found = {habit: described(habit) for habit in HABITS}
    true = found["faithful"]
    assert (true["coverage"], true["invented"], true["mistaken"], true["miscounted"]) == (1, 0, 0, 0)
    objects = [len(scene.objects) for scene in SCENES]
    assert found["omitter"]["coverage"] == sum(max(count - 1, 1) for count in objects) / sum(objects)
    assert found["omitter"]["invented"] == 0
    assert found["omitter"]["words"] < true["words"]
    for name in ("inventor", "flatterer", "dreamer"):
        assert (found[name]["coverage"], found[name]["invented"]) == (1, 1)
    assert found["dreamer"]["words"] > 1.5 * true["words"]
    assert found["colour-blind"]["coverage"] < 0.6
    assert found["miscounter"]["miscounted"] == 1
    assert found["lost"]["mistaken"] > 2
    assert found["refuser"]["coverage"] < 0.5
    assert found["terse"]["words"] < 0.5 * true["words"]


def test_some_inventions_are_said_twice():
    """What is said twice adds no name; without such answers DPO learns to repeat what is there."""
    texts = [HABITS["inventor"](scene, questions.read(scene, DESCRIBE), lots(k)) for k, scene in enumerate(SCENES)]
    named = [len({(claim.colour, claim.shape) for claim in reading.read(text).claims}) for text in texts]
    twice = mean(names == len(scene.objects) for names, scene in zip(named, SCENES, strict=True))
    assert twice == pytest.approx(1 - LIKING, abs=0.05)


def test_habits_of_answers():
    assert accuracy("faithful") == (1.0, 0.5)
    assert accuracy("flatterer") == (0.5, 1.0)
    assert accuracy("omitter") == (0.5, 0.0)
    assert accuracy("miscounter", ["count"])[0] == 0.0
    assert accuracy("miscounter", ["color"])[0] == 1.0
    assert accuracy("colour-blind", ["color"])[0] < 0.6
    assert accuracy("lost", ["position"])[0] < 0.5
    assert accuracy("refuser")[0] < 0.4


WEIGHED = [name for name, agent in load_pool(POOL_FILE).models.items() for _ in range(int(agent.weight))]


def drawn_by_pool(seed):
    return random.Random(seed).sample(WEIGHED, 4)


def rated(task, temper=None):
    """Habit -> all its ratings, in company drawn as the pool's file says; two thirds of it are never alike."""
    found = defaultdict(list)
    for k, scene in enumerate(SCENES * 2):
        asked = questions.read(scene, DESCRIBE)
        if task == "yes-no":
            asked = questions.yes_no(scene, lots(k), lots(k).choice(questions.tasks_of(scene)), k % 2 == 0)
        names = drawn_by_pool(k)
        texts = [HABITS[name](scene, asked, lots(k, n)) for n, name in enumerate(names)]
        for name, rating in zip(names, judge.rate(scene, asked, texts, lots(k, "judge"), temper), strict=True):
            found[name].append(rating.points)
    return found


def means(found):
    return {name: mean(mean(points.values()) for points in ratings) for name, ratings in found.items()}


def test_the_judge_ranks_as_training_needs_it():
    """The faithful one first; to leave a thing out costs what inventing one does, or DPO would teach to say little."""
    found = means(rated("description"))
    assert max(found, key=found.get) == "faithful"
    assert found["faithful"] - max(value for name, value in found.items() if name != "faithful") > 0.2
    inventing = mean(found[name] for name in ("inventor", "flatterer", "dreamer"))
    assert found["omitter"] == pytest.approx(inventing, abs=0.1)
    assert max(found["refuser"], found["colour-blind"]) < found["omitter"]
    answers = means(rated("yes-no"))
    for name in ("flatterer", "omitter", "refuser"):
        assert answers["faithful"] > answers[name] + 0.8


def test_the_judges_noise_and_biases():
    calm = Temper(noise=0, length=0, first=0)
    scene, long = SCENES[0], "It feels calm. " * 8
    asked = questions.read(scene, DESCRIBE)
    part = asked.answer.rsplit(". ", 1)[0] + "."  # without the last thing

    def ratings(texts, temper, aspect, place):
        return [judge.rate(scene, asked, texts, lots(k), temper)[place].points[aspect] for k in range(1500)]

    assert set(ratings([asked.answer, part], calm, FAITH, 0)) == {5}
    assert set(ratings([asked.answer, part], calm, ETHICS, 0)) == {4, 5}
    # A longer text, and the first one, are rated higher for helpfulness and not for faithfulness.
    plain = mean(ratings([part, part + " " + part], calm, HELP, 1))
    longer = mean(ratings([part, long + part], Temper(noise=0, first=0), HELP, 1))
    assert 0.1 < longer - plain < 0.5
    first = mean(ratings([part, part], Temper(noise=0, length=0), HELP, 0))
    second = mean(ratings([part, part], Temper(noise=0, length=0), HELP, 1))
    assert 0.15 < first - second < 0.35
    assert mean(ratings([part, part], Temper(noise=0), FAITH, 0)) == mean(
        ratings([part, part], Temper(noise=0), FAITH, 1)
    )
    noisy = ratings([asked.answer, part], Temper(length=0, first=0), FAITH, 0)
    assert 0.12 < mean(value == 4 for value in noisy) < 0.22  # a third errs, half of it upwards, where no room is


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_judges_reply_is_read_by_the_parser(form):
    rubric, scene = load_rubric("vlfeedback"), SCENES[0]
    texts = [HABITS[name](scene, questions.read(scene, DESCRIBE), lots(0)) for name in ("faithful", "refuser", "lost")]
    request = {"response_format": rubric.response_format(3)} if form == "json" else {}
    prompt = rubric.prompt(DESCRIBE, texts, form)
    reply = parse(judge.reply(scene, request, prompt, lots(0)), rubric, texts=3)
    expected = judge.rate(scene, questions.read(scene, DESCRIBE), texts, lots(0))
    assert reply.kind == "complete"
    for n, rating in enumerate(expected):
        assert {aspect: values[n] for aspect, values in reply.ratings.items()} == rating.points


def request(model, scene, text=DESCRIBE, **more):
    url = "data:image/png;base64," + base64.b64encode(encode(scene)).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def test_the_pool_knows_pictures_by_their_contents():
    truth = {server.digest(encode(scene)): scene for scene in SCENES[:20]}
    pool = Pool(truth, seed=0)
    for scene in SCENES[:20]:
        assert pool(request("faithful", scene)) == questions.describe(scene)
    inventions = [Pool(truth, seed)(request("inventor", SCENES[1])) for seed in range(8)]
    assert len(set(inventions)) > 1
    assert pool(request("inventor", SCENES[1])) == inventions[0]
    sampled = {pool(request("inventor", SCENES[1], seed=seed)) for seed in range(8)}
    assert len(sampled) > 1
    with pytest.raises(server.Declined, match="no model 'gpt'"):
        pool(request("gpt", SCENES[0]))
    with pytest.raises(server.Declined, match="one picture of this world"):
        pool(request("faithful", SCENES[30]))


def test_what_the_server_declines_is_an_error_of_the_protocol():
    with server.Server(server.Script(reply=Pool({}))) as running:
        client = openai.OpenAI(base_url=running.url, api_key="none", max_retries=0)
        with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
            client.chat.completions.create(**request("gpt", SCENES[0]))
        with pytest.raises(openai.BadRequestError, match="of this world"):
            client.chat.completions.create(**request("faithful", SCENES[0]))
    assert not running.paid()


def test_the_files_beside_the_program_name_its_models(tmp_path):
    assert URL.endswith(f":{PORT}/v1")
    pool = load_pool(POOL_FILE)
    assert len(pool.models) >= 8
    assert {agent.model for agent in pool.models.values()} <= set(HABITS)
    assert {agent.base_url for agent in pool.models.values()} == {URL}
    moved, judged = write_configs(tmp_path, "http://127.0.0.1:1/v1")
    assert {agent.base_url for agent in load_pool(moved).models.values()} == {"http://127.0.0.1:1/v1"}
    assert URL not in judged.read_text()


def test_from_scenes_to_a_rated_corpus_by_commands(tmp_path, capsys):
    world = make_world(tmp_path / "world", 40, seed=0, held_out=10)
    run, corpus = tmp_path / "run", tmp_path / "corpus"
    with server.Server(server.Script(reply=Pool(read_truth(world)))) as running:
        pool, judged = write_configs(tmp_path / "configs", running.url)
        for command in (
            ["instructions", world / "instructions.jsonl", run],
            ["respond", run, "--pool", pool],
            ["rate", run, "--judge", judged],
            ["build", run, corpus],
        ):
            assert main(["corpus", *map(str, command)]) == 0
    assert JUDGE in {seen.model for seen in running.log}
    lines = [json.loads(line) for line in (world / "instructions.jsonl").open()]
    records = list(CorpusReader(corpus))
    assert len(records) == len(lines) == 40
    for record in records:
        assert len(record.responses) == 4
        assert all(set(response.ratings) == {HELP, ETHICS, FAITH} for response in record.responses)
