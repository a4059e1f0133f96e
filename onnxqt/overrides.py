"""What a user says of single nodes and tensors, against the scheme that holds for the others.

    [overrides."/head/*"]                       a name of nodes or tensors, with * and ? as in file names
    weight_bits = 8
    activation_bits = 16

    [overrides."/stem/Conv"]
    float = true

or the same as JSON: `{"overrides": {"/stem/Conv": {"float": true}}}`. Where several match, the last one holds.
"""

import difflib
import fnmatch
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqt.errors import UsageError, first_line
from onnxqt.schemes import parse_granularity

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no parser of its own
    import tomli as tomllib

_LARGEST_FILE = 1 << 20  # bytes
_MOST_RULES = 10_000
_WEIGHT_BITS = tuple(range(2, 9))
_ACTIVATION_BITS = (4, 8, 16)
_KEYS = ("weight_bits", "activation_bits", "float", "granularity")


@dataclass(frozen=True, slots=True)
class Override:
    """What is said of the nodes and tensors that match a pattern.

    Attributes:
        pattern: a name, in which `*` stands for any text and `?` for one character.
        weight_bits: 2 to 8; None leaves them as they are.
        activation_bits: 4, 8 or 16; None leaves them as they are.
        keeps_float: whether the nodes stay float.
        granularity: of weights: pt, pc, b16, b32, b64 or b128; None leaves it as it is.

    Raises:
        UsageError: if a value cannot be, or nothing is said.
    """

    pattern: str
    weight_bits: int | None = None
    activation_bits: int | None = None
    keeps_float: bool = False
    granularity: str | None = None

    def __post_init__(self) -> None:
        where = f"override '{self.pattern}'"
        for key, bits, allowed in (
            ("weight_bits", self.weight_bits, _WEIGHT_BITS),
            ("activation_bits", self.activation_bits, _ACTIVATION_BITS),
        ):
            if bits is not None and (isinstance(bits, bool) or bits not in allowed):
                raise UsageError(f"{where} has {key} = {bits!r}: expected one of {', '.join(map(str, allowed))}")
        if self.granularity is not None:
            try:
                parse_granularity(str(self.granularity))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error
        if not isinstance(self.keeps_float, bool):
            raise UsageError(f"{where} has float = {self.keeps_float!r}: expected true or false")
        widths = (self.weight_bits, self.activation_bits, self.granularity)
        if self.keeps_float and any(value is not None for value in widths):
            raise UsageError(f"{where} keeps nodes float, which have no bits: leave the other settings out")
        if not self.keeps_float and all(value is None for value in widths):
            raise UsageError(f"{where} says nothing: set one of {', '.join(_KEYS)}")

    def matches(self, name: str) -> bool:
        """Whether it speaks of the node or tensor of this name."""
        return name == self.pattern or fnmatch.fnmatchcase(name, self.pattern)

    def check_used(self, weights: Collection[str], activations: Collection[str]) -> None:
        """Refuse to say something of what is not there.

        Args:
            weights: the quantized weights that it matches.
            activations: the quantized activations that it matches.

        Raises:
            UsageError: naming what it matches none of.
        """
        wanted = (
            ("weight_bits", self.weight_bits, weights, "weight"),
            ("granularity", self.granularity, weights, "weight"),
            ("activation_bits", self.activation_bits, activations, "activation"),
        )
        for key, value, found, what in wanted:
            if value is not None and not found:
                raise UsageError(
                    f"override '{self.pattern}' sets {key} but matches no quantized {what}: correct the pattern, "
                    "or take the setting out"
                )


@dataclass(frozen=True, slots=True)
class Overrides:
    """Exceptions from a scheme, of which the last that matches holds."""

    rules: tuple[Override, ...] = ()

    def check(self, names: Iterable[str]) -> None:
        """Refuse patterns that match none of the names of a model's nodes and tensors.

        Raises:
            UsageError: naming the pattern, and a name that is like it.
        """
        known = list(names)
        for rule in self.rules:
            if not any(rule.matches(name) for name in known):
                like = difflib.get_close_matches(rule.pattern, known, 1)
                hint = f"; did you mean '{like[0]}'?" if like else ""
                raise UsageError(
                    f"override '{rule.pattern}' matches no node and no tensor of the model: correct the pattern{hint}"
                )

    def as_json(self) -> dict[str, dict[str, Any]]:
        """What `parse_overrides` reads."""
        return {
            rule.pattern: {
                key: value
                for key, value in (
                    ("weight_bits", rule.weight_bits),
                    ("activation_bits", rule.activation_bits),
                    ("float", rule.keeps_float or None),
                    ("granularity", rule.granularity),
                )
                if value is not None
            }
            for rule in self.rules
        }


def parse_overrides(content: Mapping[str, Any]) -> Overrides:
    """Overrides from plain data: settings by pattern, each in a mapping.

    Raises:
        UsageError: naming the pattern and the setting that cannot be.
    """
    if len(content) > _MOST_RULES:
        raise UsageError(f"{len(content)} overrides are more than {_MOST_RULES}: use patterns")
    return Overrides(tuple(_rule(pattern, settings) for pattern, settings in content.items()))


def _rule(pattern: str, settings: Any) -> Override:
    if not isinstance(settings, Mapping):
        raise UsageError(f"override '{pattern}' is {settings!r}: expected settings such as weight_bits = 8")
    for key in settings:
        if key not in _KEYS:
            like = difflib.get_close_matches(str(key), _KEYS, 1)
            hint = f"; did you mean '{like[0]}'?" if like else ""
            raise UsageError(f"override '{pattern}' has a setting '{key}': expected one of {', '.join(_KEYS)}{hint}")
    return Override(
        pattern,
        settings.get("weight_bits"),
        settings.get("activation_bits"),
        settings.get("float", False),
        settings.get("granularity"),
    )


def read_overrides(path: Path) -> Overrides:
    """Overrides from a file, JSON if its name ends in .json and TOML otherwise.

    Raises:
        UsageError: if it cannot be read, or something in it cannot be; naming it.
    """
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"'{path}' is larger than {_LARGEST_FILE >> 20} MiB: give a file of overrides")
        text = path.read_text("utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror}): give a file of overrides") from error
    except (ValueError, RecursionError) as error:  # JSON, TOML and UTF-8 errors are ValueErrors
        raise UsageError(f"'{path}' is neither TOML nor JSON ({first_line(error)}): correct it") from error
    if not isinstance(content, dict) or not isinstance(content.get("overrides"), dict) or len(content) > 1:
        raise UsageError(
            f"'{path}' has no table 'overrides', or has more than it: write [overrides.\"name of a node\"]"
        )
    try:
        return parse_overrides(content["overrides"])
    except UsageError as error:
        raise UsageError(f"'{path}': {error}") from error
