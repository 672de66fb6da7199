"""Why a row, or part of one, or a file is left out: counted by reason, and listed one by one in `rejected.jsonl`."""

import json
from dataclasses import dataclass

from silkie_jax.errors import UserError


class Rejected(Exception):
    """Raised where a row cannot be used.

    `reason` is one of a few short phrases, by which rejections are counted; `detail` says what this row has.
    """

    def __init__(self, reason: str, detail: object = ""):
        self.reason = reason
        self.detail = " ".join(str(detail).split())[:300]
        super().__init__(f"{reason}: {self.detail}" if self.detail else reason)


@dataclass(frozen=True, order=True)
class Rejection:
    """One line of `rejected.jsonl`; sorts in the order of the input.

    Attributes:
        number: of the row in the whole input, from 1; 0 for a file that is no row.
        file: the source file's name, or the refused image file.
        line: of the row in that file, from 1; 0 where there is none.
        what: "row", "response", "rating", "file", or "reply" of a judge.
        id: the row's id where it could be read.
        reason, detail: as in `Rejected`.
    """

    number: int
    file: str
    line: int
    what: str
    id: str
    reason: str
    detail: str

    def to_json(self) -> str:
        fields = {"what": self.what, "file": self.file, "line": self.line, "id": self.id}
        kept = {key: value for key, value in fields.items() if value}
        text = json.dumps({**kept, "reason": self.reason, "detail": self.detail}, ensure_ascii=False)
        return text.encode("utf-8", "backslashreplace").decode()  # a lone surrogate may be why the row is here


def nothing_usable(source: object, rejections: list[Rejection]) -> UserError:
    """The one line for an import of which nothing is left: it quotes the first rejection."""
    rows = [rejection for rejection in sorted(rejections) if rejection.what == "row"]
    if not rows:
        return UserError(f"{source} holds no rows")
    first = rows[0]
    return UserError(
        f"none of the {len(rows)} rows of {source} can be used; the first (line {first.line} of {first.file}): "
        f"{first.reason}{': ' if first.detail else ''}{first.detail}"
    )
