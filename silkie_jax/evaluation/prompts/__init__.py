"""What judges are asked, as Jinja templates: in our words, with examples of our own, in the form that parsers expect.

The benchmarks' own prompts are theirs; a judge's numbers depend on the words it is asked with, so figures made with
these are to be compared among themselves.
"""

from functools import cache
from pathlib import Path
from typing import Any


def judge_prompt(name: str, **values: Any) -> str:
    """The template `name`.j2 with the values in their places; values are not read as templates.

    Raises:
        UserError: Jinja is not installed.
    """
    return _template(name).render(**values)


@cache
def _template(name: str) -> Any:
    from silkie_jax.errors import UserError

    try:
        import jinja2
    except ImportError:
        raise UserError("asking a judge needs Jinja: pip install 'silkie-jax[data]'") from None
    text = (Path(__file__).parent / f"{name}.j2").read_text(encoding="utf-8")
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)
