"""What the loss is made of, as plain data: the weights that a user asks for, and the terms that they become."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from onnxqt.errors import UsageError

LOSS = "onnxqt.loss"  # the only output of a training graph
FLOOR = 1e-7  # keeps the logarithm of a probability finite

TermName = Literal["distill", "features", "cross-entropy", "bce", "mse", "l1", "graph"]
Kind = Literal["scores", "probabilities", "binary", "values"]
Source = Literal["output", "original", "labels"]

NAMES: tuple[TermName, ...] = ("distill", "features", "cross-entropy", "bce", "mse", "l1", "graph")
SUPERVISED: tuple[TermName, ...] = ("cross-entropy", "bce", "mse", "l1")
_WHOLE: tuple[TermName, ...] = ("features", "graph")  # that belong to no one output


def _distillation() -> Mapping[str, float]:
    return {"distill": 1.0}


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss that a user asks for: the sum of its parts, each times its weight.

    Attributes:
        weights: by name: distill, features, cross-entropy, bce, mse, l1 or graph. `NAME:OUTPUT` is for one output of
            the model; a bare name stands for every output that it fits.
        temperature: T of the distillation of class scores, see `insert_loss`.
        features: the inner tensors that "features" compares; chosen by the plan if there are none.
        graph: path of the ONNX file that computes the part "graph"; None if there is none.

    Raises:
        UsageError: for an unknown name, a weight or temperature that is not positive, or a part that lacks its
            setting.
    """

    weights: Mapping[str, float] = field(default_factory=_distillation)
    temperature: float = 1.0
    features: tuple[str, ...] = ()
    graph: str | None = None

    def __post_init__(self) -> None:
        if not self.weights:
            raise UsageError(f"the loss has no part: name at least one of {', '.join(NAMES)}")
        for key, weight in self.weights.items():
            _check_part(key, weight)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UsageError(f"the temperature is {self.temperature}: give a positive number")
        if ("graph" in self.weights) != (self.graph is not None):
            have, lack = ("file", "weight") if self.graph is not None else ("weight", "file")
            raise UsageError(f"the loss graph has a {have} but no {lack}: give both --loss-graph and its part 'graph'")
        if self.features and "features" not in self.weights:
            raise UsageError(
                f"the feature '{self.features[0]}' is named, but the loss has no part 'features': add it to --loss"
            )


def _check_part(key: str, weight: float) -> None:
    name, _, output = key.partition(":")
    if name not in NAMES:
        raise UsageError(f"the loss has no part '{name}': use {', '.join(NAMES)}")
    if output and name in _WHOLE:
        raise UsageError(f"the loss '{key}' names an output, but '{name}' is not of one output: write '{name}'")
    if not (math.isfinite(weight) and weight > 0):
        raise UsageError(f"the weight of the loss '{key}' is {weight:g}: give a positive number, or leave the part out")


def parse_losses(
    text: str, graph: str | None = None, temperature: float = 1.0, features: tuple[str, ...] = ()
) -> Losses:
    """The loss that a text spells out.

    Args:
        text: parts separated by commas, each `NAME`, `NAME=WEIGHT`, `NAME:OUTPUT` or `NAME:OUTPUT=WEIGHT`, such as
            `distill=1,cross-entropy=0.5`; a weight is 1 if it is not given. May be empty if there is a loss graph.
        graph: path of a loss graph; its part `graph` has weight 1 if the text does not name it.
        temperature: of the distillation.
        features: the inner tensors that the part `features` compares.

    Raises:
        UsageError: for a part that cannot be read, is unknown, or is there twice.
    """
    weights: dict[str, float] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, given, number = part.rpartition("=")
        key = (key if given else part).strip()
        if key in weights:
            raise UsageError(f"the loss '{text}' has '{key}' twice: name each part once")
        weights[key] = _number(number, text) if given else 1.0
    if graph is not None:
        weights.setdefault("graph", 1.0)
    return Losses(weights, temperature, features, graph)


def _number(text: str, whole: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UsageError(f"the loss '{whole}' has the weight '{text}', which is no number: write NAME=0.5") from error


class Binding(NamedTuple):
    """What an input of the loss graph is fed with.

    Attributes:
        name: of the input.
        source: an output of the model in training, of the original model, or an array of labels.
        of: name of the output or array.
        integer: whether an array of labels holds integers.
    """

    name: str
    source: Source
    of: str
    integer: bool = False


@dataclass(frozen=True, slots=True)
class Term:
    """One summand of the loss.

    Attributes:
        name: what it computes.
        weight: its factor.
        tensor: the tensor of the model that it judges; empty for a loss graph.
        kind: what the tensor holds: class scores before a softmax, "probabilities" after it, "binary" probabilities
            that do not add up to 1 (behind a Sigmoid), or other values.
        axis: of the classes.
        classes: their number, where `axis` means anything.
        labels: the array of labels that it is compared with; empty if none.
        integer: whether those are integers.
        temperature: of distillation.
        bindings: what the inputs of the loss graph are fed with.
        path: of the loss graph.
    """

    name: TermName
    weight: float = 1.0
    tensor: str = ""
    kind: Kind = "values"
    axis: int = -1
    classes: int = 0
    labels: str = ""
    integer: bool = False
    temperature: float = 1.0
    bindings: tuple[Binding, ...] = ()
    path: str = ""

    @property
    def distils_classes(self) -> bool:
        """Whether it compares with the original model's class probabilities."""
        return self.name == "distill" and self.kind in ("scores", "probabilities")

    @property
    def compares(self) -> bool:
        """Whether it has the normalised squared error to a tensor of the original model."""
        return self.name in ("distill", "features")


def classes_input(tensor: str) -> str:
    """Graph input for the original model's class probabilities."""
    return f"onnxqt.target:{tensor}"


def original_input(tensor: str) -> str:
    """Graph input for a tensor of the original model."""
    return f"onnxqt.original:{tensor}"


def power_input(tensor: str) -> str:
    """Graph input for the variance of a tensor of the original model, a scalar."""
    return f"onnxqt.power:{tensor}"


def labels_input(array: str) -> str:
    """Graph input for an array of labels."""
    return f"onnxqt.labels:{array}"


def read_losses(plain: Mapping[str, Any]) -> Losses:
    """What `dataclasses.asdict` and JSON made of a `Losses`."""
    return Losses(**{**plain, "features": tuple(plain["features"])})


def read_term(plain: Mapping[str, Any]) -> Term:
    """What `dataclasses.asdict` and JSON made of a `Term`."""
    return Term(**{**plain, "bindings": tuple(Binding(*fields) for fields in plain["bindings"])})
