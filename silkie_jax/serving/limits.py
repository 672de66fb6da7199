"""What the server refuses, and how it says so: limits, and the error that becomes a reply in OpenAI's form."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from silkie_jax.errors import UserError
from silkie_jax.image_limits import MAX_PIXELS


@dataclass(frozen=True)
class Limits:
    """How much a request may bring and ask for.

    Attributes:
        body: bytes of a request.
        images: of a request.
        pixels: of an image, before it is scaled to the model's size.
        n: replies to one request.
        stops, stop_length: texts in `stop`, and characters of each.
        seconds: from a request's arrival to the end of its reply, waiting included.
    """

    body: int = 32 * 2**20
    images: int = 16
    pixels: int = MAX_PIXELS
    n: int = 16
    stops: int = 16
    stop_length: int = 256
    seconds: float = 600.0


@dataclass(eq=False)
class Refused(UserError):
    """An error for the client: one clear line, a status of HTTP, and what OpenAI's form has beside it."""

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, object]:
        """In OpenAI's form."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        line = " ".join(self.message.encode("utf-8", "replace").decode().split())
        return {"error": {"message": line, "type": kind, "param": self.param, "code": self.code}}


def as_refused(error: BaseException) -> Refused:
    """Any error as one for the client: what is not the client's mistake is the server's."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UserError):
        return Refused(str(error))
    lines = str(error).strip().splitlines() or [""]
    return Refused(f"{type(error).__name__}: {lines[0][:300]}", 500)
