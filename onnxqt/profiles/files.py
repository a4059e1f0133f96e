"""A profile as a TOML file: reading one, and writing one that reads back the same."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import onnx

from onnxqt.errors import UsageError, first_line
from onnxqt.profiles.fields import Arithmetic, Policy, Profile, parse_precision
from onnxqt.profiles.table import PROFILES

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no parser of its own
    import tomli as tomllib

_FILE_LIMIT = 1 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LIMITS = {"bits": (16, 64), "pair_bits": (0, 32)}  # of an accumulator
_DERIVED = "evidence"  # of a profile from a file, always "modelled"


def read_profile(path: str | Path) -> Profile:
    """The profile that a TOML file describes: the fields of `Profile`, those of its parts in tables of their names.

        base = "tflite_ref"            # start from this profile; without it, from the defaults of each field
        name = "my_npu"                # by default the name of the file

        [policy]
        operators = ["Conv", "Relu"]
        [policy.fixed_outputs]
        Sigmoid = [0.00390625, -128]   # scale, zero point

        [arithmetic]
        product = "fixed16_away"
        [arithmetic.accumulator]
        bits = 24

    Its evidence is "modelled", whatever the base is.

    Raises:
        UsageError: naming the file, the key, its value and what is allowed.
    """
    path = Path(path)
    content = _parsed(path)
    base = content.pop("base", "")
    if base and base not in PROFILES:
        raise UsageError(f"'{path}': base is {_shown(base)}, which is no profile: name one of {', '.join(PROFILES)}")
    defaults = Profile(path.stem, path.stem, "modelled", path.name, Policy(), Arithmetic())
    start = dataclasses.replace(PROFILES[base], name=path.stem, assumed="") if base else defaults
    profile: Profile = dataclasses.replace(_filled(path, start, content, ()), evidence="modelled")
    _check_profile(path, profile)
    return profile


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
        if len(raw) > _FILE_LIMIT:
            raise UsageError(f"'{path}' has more than {_FILE_LIMIT >> 20} MiB: give the TOML file of a profile")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise UsageError(f"cannot read the profile '{path}' ({error.strerror}): give a TOML file") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested without end
        raise UsageError(f"'{path}' is not TOML: {first_line(error)}; see 'onnxqt profiles NAME' for one") from error


def _filled(path: Path, start: Any, content: Mapping[str, Any], above: tuple[str, ...]) -> Any:
    """A dataclass with the fields that `content` gives, after checking them."""
    kinds = {name: kind for name, kind in get_type_hints(type(start)).items() if name != _DERIVED}
    changed = {}
    for key, value in content.items():
        place = ".".join((*above, key))
        if key not in kinds:
            raise UsageError(f"'{path}': unknown key '{place}' = {_shown(value)}: allowed here is {', '.join(kinds)}")
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, dict):
                raise UsageError(f"'{path}': {place} is {_shown(value)}: expected a table [{place}]")
            changed[key] = _filled(path, getattr(start, key), value, (*above, key))
        else:
            changed[key] = _checked(path, place, value, kinds[key])
    return dataclasses.replace(start, **changed)


def _checked(path: Path, place: str, value: Any, kind: Any) -> Any:
    """A value of the type `kind` of a field."""
    choices = _choices(kind)
    least, most = _LIMITS.get(place.split(".")[-1], (0, 0))
    if choices:
        allowed, right = f"one of {', '.join(map(_shown, choices))}", isinstance(value, str) and value in choices
    elif kind is bool:
        allowed, right = "true or false", isinstance(value, bool)
    elif kind is int:
        allowed, right = f"a whole number from {least} to {most}", type(value) is int and least <= value <= most
    elif kind is str:
        allowed, right = "text in one line", isinstance(value, str) and value.isprintable()
    elif get_origin(kind) is tuple:
        allowed, right = "a list of names", isinstance(value, list) and all(isinstance(item, str) for item in value)
    else:
        allowed, right = "a table of [scale, zero point] by operator", isinstance(value, dict)
        right = right and all(_is_grid(entry) for entry in value.values())
    if not right:
        raise UsageError(f"'{path}': {place} is {_shown(value)}: expected {allowed}")
    if isinstance(value, dict):
        return {name: (float(scale), zero_point) for name, (scale, zero_point) in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _choices(kind: Any) -> tuple[str, ...]:
    """What a Literal, or a union of them, allows; empty for other types."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    parts = [_choices(part) for part in get_args(kind)] if get_origin(kind) is not tuple else []
    return tuple(dict.fromkeys(choice for part in parts for choice in part))


def _is_grid(entry: Any) -> bool:
    """Whether `entry` is the scale and the zero point of 8-bit codes."""
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    scale, zero_point = entry
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    return number and math.isfinite(scale) and scale > 0 and type(zero_point) is int and -128 <= zero_point <= 255


def _check_profile(path: Path, profile: Profile) -> None:
    """Check what the type of a field does not say."""
    if not _NAME.fullmatch(profile.name):
        raise UsageError(
            f"'{path}': name is {_shown(profile.name)}: expected up to 64 letters, digits, '_', '.' and '-'"
        )
    if not profile.policy.precisions:
        raise UsageError(f"'{path}': policy.precisions is []: expected at least one, such as w8a8")
    for name in profile.policy.precisions:
        try:
            parse_precision(name)
        except UsageError as error:
            raise UsageError(f"'{path}': policy.precisions: {error}") from error
    for place, operators in (("operators", profile.policy.operators), ("fixed_outputs", profile.policy.fixed_outputs)):
        for operator in operators:
            if not onnx.defs.has(operator):
                raise UsageError(
                    f"'{path}': policy.{place} has {_shown(operator)}: expected names of ONNX operators, such as Conv"
                )


def _shown(value: Any) -> str:
    """A value of a file in a message, on one line and not without end."""
    text = f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def profile_text(profile: Profile) -> str:
    """The TOML file of a profile, which `read_profile` takes back; what is as by default is in it too."""
    return "\n".join(_lines(profile, ())).strip() + "\n"


def _lines(part: Any, above: tuple[str, ...]) -> list[str]:
    """The keys of a dataclass or a mapping, then its tables."""
    items = part.items() if isinstance(part, Mapping) else [(f.name, getattr(part, f.name)) for f in fields(part)]
    plain, tables = [], []
    for name, value in items:
        if dataclasses.is_dataclass(value) or isinstance(value, Mapping):
            place = (*above, name)
            tables += ["", f"[{'.'.join(place)}]", *_lines(value, place)]
        elif name != _DERIVED:
            plain.append(f"{name} = {_literal(value)}")
    return plain + tables


def _literal(value: Any) -> str:
    """A value in TOML; JSON writes text, numbers and truth as TOML does."""
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)
