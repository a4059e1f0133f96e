"""How an image file becomes the model's input, as plain data: presets, and a small TOML file.

    value[c] = (pixel[c] * scale - mean[c]) / std[c],    pixel in 0 ... 255

after the image is resized and its centre cut out.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from onnxqt.errors import UsageError, first_line

if sys.version_info >= (3, 11):
    import tomllib
else:  # Python 3.10 has no parser of its own
    import tomli as tomllib

Colour = Literal["rgb", "bgr", "grey"]
Layout = Literal["chw", "hwc", "hw"]
Filter = Literal["nearest", "bilinear", "bicubic"]
Dtype = Literal["float32", "float16", "float64", "uint8", "int8", "int32", "int64"]

_FILE_LIMIT = 1 << 16  # bytes
_SIDE_LIMIT = 1 << 14  # pixels
_NUMBER_LIMIT = 1e30


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What is done to an image, in this order.

    Attributes:
        name: of the preset or the file, for messages and reports.
        resize: (s,): the shorter side becomes s, the other int(s * long / short); (h, w): exactly these; (): nothing.
        crop: height and width of the part that is cut out of the centre; () for all of it.
        filter: what resizing interpolates with; where it shrinks, over all pixels that fall together.
        colour: the channels; None for what fits the model's number of channels.
        layout: the axes of a sample; None for what fits the model's shape.
        scale: of the pixels, finite and not 0.
        mean: per channel, or one for all, in units of scaled pixels.
        std: as `mean`, positive.
        dtype: element type of the values; None for the model's own. Integers must come out whole, nothing is rounded.
    """

    name: str
    resize: tuple[int, ...] = ()
    crop: tuple[int, ...] = ()
    filter: Filter = "bilinear"
    colour: Colour | None = None
    layout: Layout | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: Dtype | None = None

    def plain(self) -> dict[str, Any]:
        """The same as JSON has it: lists, numbers, text, None. `from_plain` takes it back."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


PRESETS: Mapping[str, Preprocessing] = {
    preset.name: preset
    for preset in (
        # What torchvision's classifiers for ImageNet are evaluated with: the statistics of its training set.
        Preprocessing(
            "imagenet",
            resize=(256,),
            crop=(224, 224),
            colour="rgb",
            scale=1 / 255,
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        # Mean and deviation of all pixels of CIFAR-10's training set, by channel; images stay 32 x 32.
        Preprocessing(
            "cifar", colour="rgb", scale=1 / 255, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
        ),
        Preprocessing("none"),
    )
}


def parse_preprocessing(text: str) -> Preprocessing:
    """A preset by its name, or what a TOML file describes: fields of `Preprocessing`, from those of a preset on.

        base = "imagenet"          # without it, from "none" on
        resize = 256               # the shorter side; [256, 320] for height and width; [] for nothing
        crop = 224                 # or [height, width]; [] for nothing
        filter = "bicubic"
        colour = "bgr"
        layout = "hwc"
        scale = 0.0078125
        mean = [1.0, 1.0, 1.0]     # or one number
        std = 1.0
        dtype = "float32"

    Raises:
        UsageError: naming the file, the key, its value and what is allowed.
    """
    if text in PRESETS:
        return PRESETS[text]
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        raise UsageError(f"unknown preprocessing '{text}': give a TOML file or one of {', '.join(PRESETS)}")
    content = _parsed(path)
    base = content.pop("base", "none")
    if not isinstance(base, str) or base not in PRESETS:
        raise UsageError(f"'{path}': base is {_shown(base)}: expected one of {', '.join(PRESETS)}")
    return _filled(f"'{path}'", replace(PRESETS[base], name=path.name), content)


def from_plain(plain: Mapping[str, Any]) -> Preprocessing:
    """What `Preprocessing.plain` took apart.

    Raises:
        UsageError: naming the field, its value and what is allowed.
    """
    rest = {key: value for key, value in plain.items() if value is not None and key != "name"}
    return _filled("the preprocessing", Preprocessing(str(plain.get("name", ""))), rest)


def _parsed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(_FILE_LIMIT + 1)
        if len(raw) > _FILE_LIMIT:
            raise UsageError(f"'{path}' has more than {_FILE_LIMIT >> 10} KiB: give the TOML file of a preprocessing")
        return tomllib.loads(raw.decode())
    except OSError as error:
        raise UsageError(f"cannot read the preprocessing '{path}' ({error.strerror}): give a TOML file") from error
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, or nested without end
        raise UsageError(f"'{path}' is not TOML: {first_line(error)}; write lines such as 'resize = 256'") from error


def _filled(where: str, start: Preprocessing, content: Mapping[str, Any]) -> Preprocessing:
    """`start` with the fields that `content` gives, after checking them."""
    changed = {}
    for key, value in content.items():
        if key not in _FIELDS:
            allowed = ", ".join(("base", *_FIELDS))
            raise UsageError(f"{where}: unknown key '{key[:60]}' = {_shown(value)}: allowed is {allowed}")
        field = _FIELDS[key]
        items = value if isinstance(value, list | tuple) else [value]
        if (isinstance(value, list | tuple) and not field.listed) or not field.right(items):
            raise UsageError(f"{where}: {key} is {_shown(value)}: expected {field.expected}")
        changed[key] = field.make(items)
    return replace(start, **changed)


@dataclass(frozen=True, slots=True)
class _Field:
    """What a key of the file may be, and what becomes of its items."""

    expected: str
    right: Callable[[Any], bool]
    make: Callable[[Any], Any] = tuple
    listed: bool = True


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _NUMBER_LIMIT


def _sides(items: Any) -> bool:
    return len(items) <= 2 and all(type(item) is int and 1 <= item <= _SIDE_LIMIT for item in items)


def _floats(items: Any) -> tuple[float, ...]:
    return tuple(float(item) for item in items)


def _one_of(kind: Any) -> _Field:
    names = get_args(kind)
    return _Field(
        f"one of {', '.join(names)}", lambda items: items[0] in names, make=lambda items: items[0], listed=False
    )


_SIDES = f"pixels from 1 to {_SIDE_LIMIT}: one number, [height, width] or []"
_FIELDS: Mapping[str, _Field] = {
    "resize": _Field(_SIDES, _sides),
    "crop": _Field(_SIDES, _sides, make=lambda items: tuple(items) * (2 // max(len(items), 1))),
    "filter": _one_of(Filter),
    "colour": _one_of(Colour),
    "layout": _one_of(Layout),
    "scale": _Field("a number other than 0", lambda x: _number(x[0]) and x[0] != 0, lambda x: float(x[0]), False),
    "mean": _Field("one number, or one per channel", lambda x: len(x) in (1, 3) and all(map(_number, x)), _floats),
    "std": _Field(
        "one positive number, or one per channel",
        lambda x: len(x) in (1, 3) and all(_number(item) and item > 0 for item in x),
        _floats,
    ),
    "dtype": _one_of(Dtype),
}


def _shown(value: Any) -> str:
    """A value of a file in a message, on one line and not without end."""
    text = f"'{value}'" if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
