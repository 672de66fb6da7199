"""Answers of a model behind an OpenAI-compatible endpoint: every reply is kept, and none is asked for twice."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.messages import compose, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import planning
from silkie_jax.endpoints.stage import Options, run_stage
from silkie_jax.endpoints.store import RunStore
from silkie_jax.errors import UserError
from silkie_jax.evaluation.benchmark import Answer
from silkie_jax.evaluation.running.answers import Origin, check_same, is_finished, write_answers
from silkie_jax.evaluation.running.questions import Questions

STAGE = "answer"


@dataclass(frozen=True)
class Endpoint:
    """A server that answers, and the name that it knows the model by."""

    url: str
    model: str
    api_key_env: str | None = None

    def answer(self, questions: Questions, out: Path, say: Callable[[str], None] = print) -> None:
        """Asks every item and writes `out`; requests and replies lie in `out`.run/.

        Images and text go as one message of the user, in the form that the server makes of them. What the endpoint
        refuses is an answer marked as failed, in the server's words if it has any.

        Raises:
            UserError: what is wrong, in one line; nothing that was answered is lost.
            KeyboardInterrupt: interrupted; every reply is kept.
        """
        if questions.by_likelihood:
            raise UserError("options are compared by their likelihoods, which no endpoint tells: name a --prompt")
        origin = replace(
            questions.origin, model=self.model, endpoint=f"{self.model} at {self.url}", template="the endpoint's"
        )
        if is_finished(out, origin):
            say(f"{out}: all {origin.rows:,} answers are there")
            return
        decoding = questions.decoding
        sampling = {"temperature": decoding.temperature} | ({"top_p": decoding.top_p} if decoding.top_p < 1 else {})
        agent = Agent(
            model=self.model,
            base_url=self.url,
            api_key_env=self.api_key_env,
            max_tokens=decoding.max_new_tokens,
            sampling=sampling,
        )
        check_agent(agent, "--endpoint", "")
        with RunStore.create(out.with_name(out.name + ".run")) as run:
            before = run.settings("origin")
            if before:
                check_same(run.path, Origin(**before), origin)

            def plan() -> None:
                run.save_settings("origin", vars(origin))
                for number, item in enumerate(planning(questions.items, origin.rows, show=True)):
                    images = [run.add_image(picture.read()) for picture in item.pictures]
                    body = compose(agent, questions.text(item), images)
                    if decoding.temperature:
                        body["seed"] = questions.seed_of(item)
                    tokens = image_tokens(agent, [run.image_size(sha256) for sha256 in images])
                    run.db.execute(*new_request(STAGE, number, self.model, 0, None, body, tokens))
                run.save_settings("planned", origin.rows)

            planned = run.settings("planned") == origin.rows
            run_stage(run, STAGE, {self.model: agent}, (lambda: None) if planned else plan, _review, Options())
            rows = run.db.execute(
                "SELECT r.instruction, coalesce(a.text, ''), a.outcome, a.output_tokens FROM requests r "
                "JOIN attempts a ON a.id = r.attempt WHERE r.stage = ? ORDER BY 1",
                (STAGE,),
            ).fetchall()
        answers = [_answer(questions.items[number].id, *values) for number, *values in rows]
        write_answers(out, origin, answers)


def _review(name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
    usable = reply.outcome in (outcomes.OK, outcomes.TRUNCATED)
    return Verdict(reply.outcome, "ok" if usable else "failed")


def _answer(id: str, text: str, outcome: str, tokens: int | None) -> Answer:
    fields: dict[str, object] = {"tokens": tokens, "finish": "length" if outcome == outcomes.TRUNCATED else "stop"}
    if outcome not in (outcomes.OK, outcomes.TRUNCATED):
        fields["failed"] = outcome
    return Answer(id, text.strip(), fields)
