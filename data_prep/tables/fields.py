"""Reading single fields of a row from elsewhere: each either is what it should be or is rejected by name."""

import math
import re
from collections.abc import Mapping
from typing import Any

from data_prep.tables.rejections import Rejected
from silkie_jax.errors import UserError

Scale = tuple[float, float]
WIDEST: Scale = (-100, 100)
"""What every scale of ratings lies within: a report counts them by whole levels."""
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)", re.ASCII)


def text(value: Any, name: str) -> str:
    """A text that can be stored. `<|im_start|>` or `<img>/a/path</img>` in it are letters like others."""
    if not isinstance(value, str):
        raise Rejected(f"{name} is not a text", "it is absent or null" if value is None else f"it is {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Rejected(f"{name} is not valid Unicode", error) from error
    return value


def row_id(value: Any) -> str:
    """An id as text; "" where there is none. Whole numbers count as ids."""
    if value is None or value == "":
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return text(value, "id")


def rating(value: Any) -> float:
    """A rating as a number, or NaN for anything that does not say exactly one.

    "4", "4.0", " 4 ", 4 and 4.0 are 4; "N/A", "4/5", "4 out of 5", "four", "1e1", None, True and infinities are NaN.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9:
        return float(value)
    return math.nan


def check_scale(low: float, high: float, where: str) -> None:
    """Refuses a scale that does not rise, or is wider than `WIDEST`.

    Raises:
        UserError: one line that begins with `where`.
    """
    if not low < high:
        raise UserError(f"{where}low {low:g} must be below high {high:g}")
    if low < WIDEST[0] or high > WIDEST[1]:
        raise UserError(f"{where}low {low:g} and high {high:g} must lie within {WIDEST[0]} to {WIDEST[1]}")


def image_refs(value: Any) -> list[str | bytes]:
    """Images as rows name them: a path, `{"bytes", "path"}` as Hugging Face data sets store it, or a list of these."""
    if value is None or value == "":
        return []
    if isinstance(value, list | tuple):
        return [ref for item in value for ref in image_refs(item)]
    if isinstance(value, str):
        return [text(value, "image path")]
    if isinstance(value, bytes) and value:
        return [value]
    if isinstance(value, Mapping) and (value.get("bytes") or value.get("path")):
        return image_refs(value.get("bytes") or value["path"])
    raise Rejected("image is neither a path nor a file", f"it is {value!r}")


def json_value(value: Any) -> Any:
    """A value as JSON can hold it: NaN becomes null, bytes are left out, whatever JSON does not know becomes text."""
    if isinstance(value, Mapping):
        return {text(str(key), "field name"): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, bytes):
        return f"({len(value)} bytes)"
    return text(str(value), "a field")
