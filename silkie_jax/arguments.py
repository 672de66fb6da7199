"""How the command line is read: verbs in groups, an example under each verb's help, the nearest verb for a slip."""

import argparse
import difflib
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NoReturn, Protocol


class Add(Protocol):
    """Adds a verb and returns its parser."""

    def __call__(
        self, name: str, run: Callable[[argparse.Namespace], Any], about: str, example: str
    ) -> argparse.ArgumentParser: ...


def add_precision(p: argparse.ArgumentParser, dtype: str) -> None:
    """How a model is kept and computed with; `dtype` is the default."""
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default=dtype)
    p.add_argument("--quantize", choices=("int8",), help="keep the large weights in 8 bits: half the memory")


class Parser(argparse.ArgumentParser):
    """argparse's, which knows slips of the pen."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the usage, and the nearest of the choices."""
        slip = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(slip[1], re.findall(r"[\w-]+", slip[2]), n=1) if slip else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


class _Grouped(argparse.RawDescriptionHelpFormatter):
    """Leaves the list of verbs to the groups below it."""

    def _iter_indented_subactions(self, action: argparse.Action) -> Generator[argparse.Action]:
        yield from ()


class Verbs:
    """The verbs below a parser.

    Args:
        parser: takes them.
        groups: heading -> names, for its help; None: they are listed as argparse does.
    """

    def __init__(self, parser: argparse.ArgumentParser, groups: Mapping[str, Sequence[str]] | None = None):
        self._parser, self._groups = parser, groups
        self._verbs = parser.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
        self._about: dict[str, str] = {}

    def add(
        self, name: str, run: Callable[[argparse.Namespace], Any] | None, about: str, example: str
    ) -> argparse.ArgumentParser:
        """A verb; one without a function has verbs below it."""
        added = self._verbs.add_parser(
            name,
            help=about,
            description=about,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if run is not None:
            added.set_defaults(run=run)
        self._about[name] = about
        return added

    def list_groups(self) -> None:
        """Writes the groups under the parser's help, when all verbs are there."""
        width = max(map(len, self._about))
        lines = []
        for heading, names in (self._groups or {}).items():
            lines += [f"{heading}:", *(f"    {name:<{width}}  {self._about[name]}" for name in names), ""]
        self._parser.epilog = "\n".join([*lines, "`silkie VERB --help` has each verb's options and an example."])
        self._parser.formatter_class = _Grouped
