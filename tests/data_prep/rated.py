"""Runs that are filled in without a server, as one leaves them."""

import json
from dataclasses import asdict
from pathlib import Path

from data_prep.judging.rubric import Rubric, load_rubric
from data_prep.run import Instruction, Run
from silkie_jax.endpoints.store import to_json
from tests.data_prep.runs import picture

MODELS = ("alpha", "beta", "gamma", "delta", "epsilon")


def text_reply(rubric: Rubric, ratings) -> str:
    """A judge's reply in the text form; `ratings[n]` rates text n + 1 in every aspect."""
    lines = []
    for name in rubric.names:
        lines.append(f"#### {name} Assessment")
        for n, rating in enumerate(ratings, 1):
            lines += [f"##### Output for Text {n}", f"Rating: {rating}", f"Rationale: {name} of {n}"]
    return "\n".join(lines)


def quality(number: int, slot: int) -> int:
    """What a response is worth: 1 to 5, all four of an instruction differing."""
    return (number + 2 * slot) % 5 + 1


def fill(
    folder: Path, count: int, orders: int = 1, judges=("judge",), rubric: Rubric | None = None, reply=None, image=None
) -> Path:
    """A run of `count` instructions with four responses each, rated by each judge in `orders` orders.

    `image(n)` gives the bytes of the image that instructions 2 n and 2 n + 1 share.
    `reply(number, judge, order, arrangement)` may give another text than the one that rates by `quality`.
    """
    rubric = rubric or load_rubric("vlfeedback")
    image = image or picture
    with Run.create(folder) as run:
        with run.transaction():
            instructions = [
                Instruction(
                    f"i{n}", f"What is in picture {n}?", (run.add_image(image(n // 2)),), source=f"source-{n % 3}",
                    licence="CC-BY-4.0", extra={"kind": n % 2},
                )
                for n in range(count)
            ]  # fmt: skip
        run.write_instructions(instructions, {"of": "a test"})
        with run.transaction():
            for judge in judges:
                run.save_settings(f"judge:{judge}", {"rubric": asdict(rubric)})
            for number in range(1, count + 1):
                for slot in range(4):
                    answer = f"{MODELS[(number + slot) % 5]} on {number}: " + "very " * slot + f"well, {slot}"
                    settle(run, "respond", number, MODELS[(number + slot) % 5], slot, None, answer)
                for judge in judges:
                    for order in range(orders):
                        first = number + order
                        shown = [(first + place) % 4 for place in range(4)]
                        said = text_reply(rubric, [quality(number, slot) for slot in shown])
                        said = reply(number, judge, order, shown, said) if reply else said
                        settle(run, "rate", number, judge, order, shown, said)
    return folder


def settle(run: Run, stage, number, agent, slot, arrangement, text, outcome="ok", state="ok") -> None:
    """A request with the reply that decided it; `text` None leaves it open."""
    values = (stage, number, agent, slot, None if arrangement is None else to_json(arrangement), json.dumps({}), 0, 0)
    request = run.db.execute(
        "INSERT INTO requests (stage, instruction, agent, slot, arrangement, body, text_bytes, image_tokens) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    ).lastrowid
    if text is None:
        return
    attempt = run.db.execute(
        "INSERT INTO attempts (request, started, finished, outcome, text, finish_reason, model, input_tokens, "
        "output_tokens, cost) VALUES (?, 1, 2, ?, ?, 'stop', ?, 100, 50, 0.001)",
        (request, outcome, text, f"{agent}-2026"),
    ).lastrowid
    run.db.execute("UPDATE requests SET state = ?, attempt = ? WHERE id = ?", (state, attempt, request))


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a corpus."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
