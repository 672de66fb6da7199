"""A teacher's reply into supervised samples: a caption, and a question with its answer, as records of one response."""

from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.run import Gathered
from data_prep.synthesize import Synthesis, Teacher, caption_prompt, parse
from silkie_jax.corpus.schema import Record, Response


def syntheses_of(gathered: Gathered, teacher: Teacher) -> list[Synthesis]:
    """What the teacher's replies about an instruction come to, failures included."""
    found = []
    for reply in gathered.syntheses:
        if reply.outcome in ("refusal", "content_filter"):
            found.append(Synthesis("refusal", note=" ".join(reply.text.split())[:300] or reply.outcome))
        elif reply.text:
            found.append(parse(reply.text, teacher.form, finish_reason=reply.finish_reason))
        else:
            found.append(Synthesis("unparsable", note=f"there is no reply ({reply.outcome})"))
    return found


def samples(gathered: Gathered, teacher: Teacher, found: Synthesis, images: Sequence[bytes]) -> Iterator[Record]:
    """The records of a complete reply: `ID-caption` and `ID-question`."""
    instruction = gathered.instruction
    extra: dict[str, Any] = dict(instruction.extra)
    if instruction.licence:
        extra["licence"] = instruction.licence
    extra["models_reported"] = [reply.model for reply in gathered.syntheses][:1]
    caption = caption_prompt(teacher.captions, teacher.seed, instruction.id)
    asked = extra | ({"candidates": list(found.candidates)} if found.candidates else {})
    for name, prompt, text, about in (
        ("caption", caption, found.description, extra),
        ("question", found.question or instruction.prompt, found.answer, asked),
    ):
        yield Record(
            id=f"{instruction.id}-{name}",
            images=tuple(images),
            prompt=prompt,
            responses=(Response(text, teacher.name),),
            source=instruction.source,
            extra=about,
        )
