"""Fields of a request's JSON, each read and checked in one way."""

import base64
import binascii
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from silkie_jax.models.qwen_vl.image import read_image
from silkie_jax.serving.limits import Limits, Refused

_DATA_URL = re.compile(r"data:image/[a-z0-9+.-]+;base64,", re.IGNORECASE)


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
      Refused: it is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise Refused(f"the body is not valid JSON ({reason})") from None
    if not isinstance(found, dict):
        raise Refused("the body must be a JSON object")
    return found


def number(
    body: Mapping[str, Any],
    name: str,
    default: Any,
    kind: type,
    low: float = float("-inf"),
    high: float = float("inf"),
) -> Any:
    """A number of the `kind` (int or float) from `low` to `high`; `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    sound = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not sound or (kind is int and not float(value).is_integer()):
        what = "a whole number" if kind is int else "a number"
        raise Refused(f"{name} must be {what}{_bounds(low, high)}, not {shown(value)}", param=name)
    return kind(value)


def _bounds(low: float, high: float) -> str:
    finite = [bound for bound in (low, high) if abs(bound) != float("inf")]
    return f" from {low:g} to {high:g}" if len(finite) == 2 else f" of at least {low:g}" if finite else ""


def flag(body: Mapping[str, Any], name: str) -> bool:
    """A boolean; false where it is absent or null."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name} must be true or false, not {shown(value)}", param=name)
    return bool(value)


def text(value: Any, name: str) -> str:
    """A text that UTF-8 can hold (JSON can spell halves of surrogate pairs)."""
    if not isinstance(value, str):
        raise Refused(f"{name} must be a text, not {shown(value)}", param=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{name} holds half a surrogate pair, which is no character", param=name) from None
    return value


def shown(value: Any) -> str:
    """A value in an error, cut to a few characters."""
    words = json.dumps(value, ensure_ascii=False)
    return words if len(words) <= 60 else f"{words[:57]}..."


class Image(NamedTuple):
    """An image of a request: its file's bytes, and its pixels [S, S, 3] as the model sees them."""

    file: bytes
    pixels: np.ndarray


def image(url: Any, name: str, size: int, limits: Limits) -> Image:
    """The image in a data URL. Nothing is ever fetched and no file opened.

    Raises:
      Refused: another URL, or an image that is not sound or too large.
    """
    begin = _DATA_URL.match(url) if isinstance(url, str) else None
    if begin is None:
        raise Refused(
            f"{name} must be a data URL in base64 (data:image/...;base64,...): nothing is fetched", param=name
        )
    try:
        file = base64.b64decode(url[begin.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(f"{name} is not valid base64 ({error})", param=name) from None
    return Image(file, read_image(file, size, max_pixels=limits.pixels, name=name))
