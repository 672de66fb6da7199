"""Synthesis: one request to a teacher makes a description, a question and its answer (ALLaVA, arXiv 2402.11684).

A teacher sees an image alone and asks its own question (`form: image`), or an image with the question that the
instruction asks (`form: question`). Its reply has parts between tags; a build makes two supervised samples of each
complete one: a caption, and the question with its answer.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from data_prep.replies import MAX_REPLY, declines, tagged, without_thoughts
from data_prep.run import SYNTHESIZE, Instruction, Run
from silkie_jax.endpoints import outcomes
from silkie_jax.endpoints.agents import Agent, check_agent, check_same
from silkie_jax.endpoints.attempts import Request, Verdict, new_request
from silkie_jax.endpoints.journal import Statement
from silkie_jax.endpoints.messages import compose, image_tokens
from silkie_jax.endpoints.outcomes import EndpointReply
from silkie_jax.endpoints.progress import planning
from silkie_jax.endpoints.stage import Options, StageResult, run_stage
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import load_yaml

PARTS = {
    "image": ("description", "candidate questions", "question", "answer"),
    "question": ("description", "detailed answer"),
}
"""Form of the request -> parts of the reply, the last of which is the answer."""
_TEMPLATES = Path(__file__).parent / "templates"
_NOTHING = (None, "", "...", "…")  # dots stand for parts in the request, which a poor teacher repeats
_FREE = ("parse_attempts",)  # may change within a run
_OUTCOMES = {"complete": outcomes.OK, "missing": "incomplete", "unparsable": "unparsable"}
CAPTIONS = (
    "Describe the image in detail.",
    "What can be seen here? Be thorough.",
    "Give a full description of this picture.",
    "Tell me everything that this image shows.",
    "Write a detailed caption for this image.",
    "Walk me through what is in this picture.",
    "What is going on in this image? Describe it closely.",
    "Describe what you see, the background included.",
    "I cannot see this picture. Describe it so that I can imagine it.",
    "Explain in detail what this image contains.",
    "Say what is where in this image, and what it looks like.",
    "Look closely and describe the whole scene.",
    "Put this image into words, leaving out nothing of importance.",
    "Give an exact account of what the picture shows.",
    "Which things does this image show, and how do they relate? Describe it in full.",
)
"""What a description answers, unless the teacher's file has its own."""


@dataclass
class Teacher:
    """Who writes, and how it is asked."""

    agent: Agent
    name: str = ""  # by default the model's
    form: str = "image"  # image: it asks its own question; question: it answers the instruction's
    captions: list[str] = field(default_factory=lambda: list(CAPTIONS))  # what descriptions answer, drawn by the seed
    template: str | None = None  # a Jinja file of one's own, relative to this file, in place of ours
    parse_attempts: int = 2  # requests for a reply that can be parsed
    seed: int = 0


@dataclass(frozen=True)
class Synthesis:
    """What a teacher's reply comes to.

    Attributes:
        kind: "complete": description, question (where it was to ask one) and answer are there; "missing": one of them
            is absent or empty; "truncated": cut off before the end; "refusal": the teacher or its server declined;
            "unparsable": there are no parts.
        description, question, answer: "" where the reply is not complete, and the question where it was given.
        candidates: the questions that it chose from, a line each; may be none.
        note: why it is not complete, for people.
    """

    kind: Literal["complete", "missing", "truncated", "refusal", "unparsable"]
    description: str = ""
    question: str = ""
    answer: str = ""
    candidates: tuple[str, ...] = ()
    note: str = ""

    @property
    def retry(self) -> bool:
        """Whether asking the same again can help."""
        return self.kind in ("missing", "unparsable")


def load_teacher(path: str | os.PathLike[str]) -> Teacher:
    """Reads and checks a teacher.

    Raises:
        UserError: one line that names the file, the key and the mend.
    """
    teacher = load_yaml(path, Teacher)
    check_agent(teacher.agent, path, "agent.")
    teacher.name = teacher.name or teacher.agent.model or Path(teacher.agent.local or "").name
    if teacher.form not in PARTS:
        raise UserError(f"{path}: form: {teacher.form!r} is unknown; choose {' or '.join(PARTS)}")
    if not teacher.captions or not all(map(str.strip, teacher.captions)):
        raise UserError(f"{path}: captions has no text, or an empty one: leave it out for ours")
    if teacher.parse_attempts < 1:
        raise UserError(f"{path}: parse_attempts must be at least 1, not {teacher.parse_attempts}")
    if teacher.template is not None:
        teacher.template = str(Path(path).parent / teacher.template)
    _template(teacher.template, teacher.form)
    return teacher


def synthesize(
    path: str | os.PathLike[str], teacher_path: str | os.PathLike[str], options: Options | None = None
) -> StageResult:
    """Asks a teacher about every instruction of a run; run the same call again to continue where one ended.

    Args:
        path: the run.
        teacher_path: the teacher's YAML file.

    Raises:
        UserError, KeyboardInterrupt: as `run_stage`.
    """
    options = options or Options()
    teacher = load_teacher(teacher_path)
    with Run.open(path, write=True) as run:
        run.check_instructions()
        config = asdict(teacher)
        if before := run.settings("teacher"):
            check_same(before, config, "teacher", _FREE)
        skipped = 0

        def plan() -> None:
            nonlocal skipped
            run.save_settings("teacher", config)
            for instruction in planning(run.instructions(), run.count(), options.progress):
                if teacher.form == "image" and not instruction.images:
                    skipped += 1
                else:
                    run.db.execute(*_request(run, teacher, instruction))

        def review(name: str, request: Request, reply: EndpointReply, number: int) -> Verdict:
            if reply.status is None or reply.status >= 400 or reply.outcome not in (outcomes.OK, outcomes.TRUNCATED):
                return Verdict(reply.outcome, "failed")
            found = parse(reply.text, teacher.form, finish_reason=reply.finish_reason)
            if found.retry and number < teacher.parse_attempts:
                return Verdict(_OUTCOMES[found.kind], "again")
            return Verdict(_OUTCOMES.get(found.kind, found.kind), "ok" if found.kind == "complete" else "failed")

        result = run_stage(run, SYNTHESIZE, {teacher.name: teacher.agent}, plan, review, options)
        notes = (f"{skipped:,} instructions show no image: the teacher was not asked about them",) if skipped else ()
        return StageResult(**{**vars(result), "notes": notes})


def parse(reply: str | None, form: str, *, finish_reason: str | None = None) -> Synthesis:
    """Reads a teacher's reply. It never raises.

    Args:
        reply: the message's content; None or "" where there is none.
        form: of the request.
        finish_reason: as the server gave it; "length" and "content_filter" matter.
    """
    reply = without_thoughts(reply or "")[:MAX_REPLY].encode("utf-8", "replace").decode()
    parts, ended = tagged(reply, PARTS[form])
    if finish_reason == "length" and not ended:
        return Synthesis("truncated", note="the reply reached the limit of tokens")
    if finish_reason == "content_filter" or (not parts and declines(reply)):
        return Synthesis("refusal", note=" ".join(reply.split())[:300] or "the server's content filter")
    if not parts:
        return Synthesis("unparsable", note="no part was found" if reply.strip() else "the reply is empty")
    lacking = [name for name in PARTS[form] if parts.get(name) in _NOTHING and name != "candidate questions"]
    if lacking:
        return Synthesis("missing", note=f"it lacks {', '.join(lacking)}")
    lines = (line.strip() for line in parts.get("candidate questions", "").splitlines())
    return Synthesis(
        "complete",
        parts["description"],
        parts.get("question", ""),
        parts[PARTS[form][-1]],
        tuple(line for line in lines if line),
    )


def caption_prompt(captions: Sequence[str], seed: int, id: str) -> str:
    """What the description of an instruction's image answers: the same for the same seed and id."""
    return random.Random(f"{seed} {id}").choice(captions)


def _request(run: Run, teacher: Teacher, instruction: Instruction) -> Statement:
    values = {"question": instruction.prompt, "images": len(instruction.images), "parts": PARTS[teacher.form]}
    try:
        prompt = _template(teacher.template, teacher.form).render(values).strip() + "\n"
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise UserError(f"teacher {teacher.name}: its template fails ({error})") from None
    body = compose(teacher.agent, prompt, instruction.images)
    tokens = image_tokens(teacher.agent, [run.image_size(sha256) for sha256 in instruction.images])
    return new_request(SYNTHESIZE, instruction.number, teacher.name, 0, None, body, tokens)


@cache
def _template(path: str | None, form: str) -> jinja2.Template:
    """Templates are text, not code: they run in Jinja's sandbox."""
    file = Path(path) if path else _TEMPLATES / f"synthesize_{form}.j2"
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the template cannot be read ({error})") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: {error.message}") from None
