"""How numbers and JSON are written in vendors' files."""

import json
from typing import Any

import numpy as np

from onnxqt.numerics import Array


def number(value: Any) -> float:
    """A float32 as the number whose shortest decimal text reads back to the same float32."""
    return float(str(np.float32(value)))


def numbers(values: Array) -> list[float]:
    """Float32 values, flat, each as `number` has it."""
    return [number(value) for value in np.ravel(values)]


def nested(values: Array) -> Any:
    """Float32 values as lists in lists, of the shape of the array; one number for an array without axes."""
    return [nested(row) for row in values] if np.ndim(values) else number(values)


def decimal(value: Any) -> str:
    """A float32 as decimal text without an exponent, which reads back to the same float32."""
    return np.format_float_positional(np.float32(value), unique=True, trim="0")


def float32_hex(value: Any) -> str:
    """The eight hexadecimal digits of a float32, the sign first (big-endian)."""
    return np.float32(value).tobytes()[::-1].hex()


def json_bytes(content: Any) -> bytes:
    """JSON text in UTF-8 with a line break at its end.

    Raises:
        ValueError: for NaN and infinity, which JSON does not have.
    """
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()
