"""What a judge is asked: aspects and a scale from a file become the prompt and, for judges that take one, a schema.

Nothing about VLFeedback's three aspects (arXiv 2312.10665, section 2.3) is in the code: a rubric is a YAML file, and
`rubrics/` holds some. The words around it are Jinja templates in `templates/`, one for each form of reply.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2.sandbox import SandboxedEnvironment

from data_prep.replies import straight
from data_prep.tables.fields import check_scale
from silkie_jax.errors import UserError
from silkie_jax.yaml_files import load_yaml

RUBRICS = Path(__file__).parent / "rubrics"
TEMPLATES = Path(__file__).parent / "templates"
FORMS = ("text", "json")
Form = Literal["text", "json"]
PREFERRED = "Preferred"
"""The one aspect that a verdict rates."""


@dataclasses.dataclass
class Scale:
    """Ratings from `low` to `high`, both included. A judge may give numbers between whole ones unless `whole`."""

    low: int = 1
    high: int = 5
    whole: bool = False


@dataclasses.dataclass
class Aspect:
    """One thing that is rated.

    Attributes:
        name: as it stands in replies, reports and the corpus.
        about: what to look at.
        levels: rating (a whole number) -> what earns it; may name some only, or none.
        aliases: other names that judges give it in headings.
        weight: in the overall score of reports and exports; training's `weighted` rule takes weights of its own.
    """

    name: str = dataclasses.MISSING  # type: ignore[assignment]
    about: str = ""
    levels: dict[str, str] = dataclasses.field(default_factory=dict)
    aliases: list[str] = dataclasses.field(default_factory=list)
    weight: float = 1.0


@dataclasses.dataclass
class Example:
    """A case that a verdict's prompt shows solved.

    Attributes:
        instruction: what was asked.
        reference: its right answer.
        texts: the answers that were compared.
        reason: why one of them is better.
        verdict: its number, from 1.
    """

    instruction: str = dataclasses.MISSING  # type: ignore[assignment]
    texts: list[str] = dataclasses.MISSING  # type: ignore[assignment]
    verdict: int = dataclasses.MISSING  # type: ignore[assignment]
    reference: str = ""
    reason: str = ""


@dataclasses.dataclass
class Rubric:
    """Aspects, their scale, and the words around them.

    A verdict names the best text and rates none: aspects are its criteria then, and what comes of it is one rating,
    `Preferred`, 1 for the text that it names and 0 for the others.

    Attributes:
        name: of the rubric.
        task: the judge's role, one paragraph.
        aspects: in the order in which they are asked.
        scale: of all aspects.
        rationale: whether a reason is asked for with each rating, or before the verdict.
        verdict: whether the judge names the best text, as `[[1]]`, instead of rating each.
        reference: whether it is shown the instruction's own answer (`extra.reference`).
        examples: cases that a verdict's prompt shows solved.
        template: a Jinja file of one's own (relative to the rubric's file) in place of `templates/judge_FORM.j2`, or
            `templates/judge_verdict.j2`.
    """

    name: str = dataclasses.MISSING  # type: ignore[assignment]
    aspects: list[Aspect] = dataclasses.MISSING  # type: ignore[assignment]
    task: str = "You are a careful and impartial judge of texts written by vision-language assistants."
    scale: Scale = dataclasses.field(default_factory=Scale)
    rationale: bool = True
    verdict: bool = False
    reference: bool = False
    examples: list[Example] = dataclasses.field(default_factory=list)
    template: str | None = None

    @property
    def names(self) -> list[str]:
        """Of what is rated."""
        return [PREFERRED] if self.verdict else [aspect.name for aspect in self.aspects]

    @property
    def weights(self) -> dict[str, float]:
        return {PREFERRED: 1.0} if self.verdict else {aspect.name: aspect.weight for aspect in self.aspects}

    @property
    def forms(self) -> tuple[str, ...]:
        """Of replies that can be asked for."""
        return FORMS[:1] if self.verdict else FORMS

    @property
    def fingerprint(self) -> str:
        """Changes when anything that the judge is asked does, the templates included."""
        words = [self._template(form)[1] for form in self.forms]
        return hashlib.sha256(json.dumps([dataclasses.asdict(self), words]).encode()).hexdigest()

    def prompt(
        self,
        instruction: str,
        texts: Sequence[str],
        form: Form = "text",
        *,
        history: Sequence[tuple[str, str]] = (),
        images: int = 1,
        reference: str = "",
    ) -> str:
        """The judge's prompt; the images go beside it. Guidelines come first, so that servers can cache them.

        Args:
            instruction: the user's last turn.
            texts: the responses in the order in which the judge is to see them; they become Text 1, Text 2, ...
            form: of the reply that is asked for.
            history: earlier turns as (user, assistant).
            images: how many are shown.
            reference: the instruction's own answer, of a rubric that shows it.

        Raises:
            UserError: the template is wrong.
        """
        values = {"rubric": self, "instruction": instruction, "texts": list(texts), "history": list(history)}
        values["reference"] = reference if self.reference else ""
        try:
            return self._template(form)[0].render(**values, images=images).strip() + "\n"
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise UserError(f"rubric {self.name}: its template fails ({error})") from None

    def response_format(self, texts: int) -> dict[str, Any]:
        """The `response_format` of a chat request whose reply is to follow `schema`."""
        schema = {"name": "ratings", "strict": True, "schema": self.schema(texts)}
        return {"type": "json_schema", "json_schema": schema}

    def schema(self, texts: int) -> dict[str, Any]:
        """JSON schema of a reply: aspect -> "Text n" -> rationale and rating. It keeps to what strict modes allow."""
        number: dict[str, Any] = {"type": ["number", "null"]}  # null: cannot be rated
        if self.scale.whole:
            number = {"type": ["integer", "null"], "enum": [*range(self.scale.low, self.scale.high + 1), None]}
        # A reason that comes before its number can still change it.
        judgement = _object(({"Rationale": {"type": "string"}} if self.rationale else {}) | {"Rating": number})
        by_text = _object({f"Text {n}": judgement for n in range(1, texts + 1)})
        return _object(dict.fromkeys(self.names, by_text))

    def _template(self, form: str) -> tuple[jinja2.Template, str]:
        return _template(self.template, "verdict" if self.verdict else form)


def load_rubric(name: str | Path, relative_to: Path | None = None) -> Rubric:
    """A rubric by the name of one that comes with the project, or by the path of a YAML file.

    Raises:
        UserError: there is no such rubric, or a key of it is wrong.
    """
    own = RUBRICS / f"{name}.yaml"
    path = own if own.is_file() else (relative_to or Path()) / name
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RUBRICS.glob("*.yaml")))
        raise UserError(f"rubric {name}: there is no such file, and the ones that come with silkie_jax are {known}")
    rubric = load_yaml(path, Rubric)
    if rubric.template is not None:
        rubric.template = str(path.parent / rubric.template)
    check_rubric(rubric, str(path))
    return rubric


def check_rubric(rubric: Rubric, where: str = "rubric") -> None:
    """Refuses a rubric whose replies could not be told apart, or whose scale is none.

    Raises:
        UserError: one line that names the key and the mend.
    """
    if not rubric.aspects:
        raise UserError(f"{where}: aspects is empty; name at least one")
    check_scale(rubric.scale.low, rubric.scale.high, f"{where}: scale.")
    seen: dict[str, str] = {}
    for aspect in rubric.aspects:
        for name in [aspect.name, *aspect.aliases]:
            key = plain(name)
            if not key or key in seen:
                raise UserError(
                    f"{where}: aspect {name!r} is empty or cannot be told from {seen.get(key, 'nothing')!r}"
                )
            seen[key] = name
        known = [str(level) for level in range(rubric.scale.low, rubric.scale.high + 1)]
        outside = [level for level in aspect.levels if level not in known]
        if outside:
            raise UserError(f"{where}: aspect {aspect.name}: level {outside[0]} is not one of {', '.join(known)}")
        if not 0 <= aspect.weight < float("inf"):
            raise UserError(f"{where}: aspect {aspect.name}: weight must be a number of at least 0")
    if not any(aspect.weight for aspect in rubric.aspects):
        raise UserError(f"{where}: all aspects have weight 0; give one of them more")
    if rubric.verdict:
        _check_verdict(rubric, where)
    elif rubric.examples:
        raise UserError(f"{where}: examples are for verdicts: leave them out, or write verdict: true")
    for form in rubric.forms:
        rubric._template(form)


def _check_verdict(rubric: Rubric, where: str) -> None:
    """What does not go with a verdict."""
    if (rubric.scale.low, rubric.scale.high) != (0, 1):
        raise UserError(f"{where}: a verdict is 1 for one text and 0 for the others: write scale: {{low: 0, high: 1}}")
    for aspect in rubric.aspects:
        if aspect.levels or aspect.aliases or aspect.weight != 1:
            raise UserError(
                f"{where}: aspect {aspect.name}: the criteria of a verdict have name and about, and are not rated: "
                "leave out levels, aliases and weight"
            )
    for number, example in enumerate(rubric.examples):
        if not 1 <= example.verdict <= len(example.texts):
            raise UserError(
                f"{where}: examples[{number}].verdict must name one of its {len(example.texts)} texts, "
                f"not {example.verdict}"
            )
        if bool(example.reference) != rubric.reference:
            mend = "give it one" if rubric.reference else "leave it out, or write reference: true"
            raise UserError(f"{where}: examples[{number}].reference: {mend}")


@lru_cache(4096)  # headings come again and again
def plain(name: str) -> str:
    """A name by its letters and digits alone, without the words that headings add: what names are compared by."""
    words = re.findall(r"[^\W_]+", straight(name).casefold())
    kept = [
        word for word in words if word not in ("assessment", "assessments", "evaluation", "rating", "ratings", "score")
    ]
    return "".join(kept if kept[:1] != ["of"] else kept[1:])


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


@cache
def _template(path: str | None, form: str) -> tuple[jinja2.Template, str]:
    """The compiled template and its source. Templates are text, not code: they run in Jinja's sandbox."""
    if form not in (*FORMS, "verdict"):
        raise UserError(f"form: {form!r} is unknown; choose one of {', '.join(FORMS)}")
    file = Path(path) if path else TEMPLATES / f"judge_{form}.j2"
    environment = SandboxedEnvironment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FileSystemLoader([file.parent, TEMPLATES]),
    )
    environment.globals["form"] = form
    try:
        source = file.read_text(encoding="utf-8")
        shared = "".join(f.read_text(encoding="utf-8") for f in sorted(TEMPLATES.glob("_*.j2")))
        return environment.from_string(source), source + shared
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: the template cannot be read ({error})") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{file}: line {error.lineno}: {error.message}") from None
