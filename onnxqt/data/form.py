"""What a model wants for its inputs, and what it is fed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxqt.errors import DataError
from onnxqt.numerics import Array

LABELS = "labels"

Index = npt.NDArray[np.int64]
Arrays = dict[str, Array]


@dataclass(frozen=True, slots=True)
class InputSpec:
    """What the model wants for one input.

    Attributes:
        name: the input's name.
        dtype: the element type.
        shape: the batch axis first; None where the model accepts any length.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True, eq=False, slots=True)
class Batch:
    """Some samples, ready for the model.

    Attributes:
        inputs: by input name, the batch axis first, in the model's element type.
        labels: int64 class numbers, (samples,); None where the source has none.
        targets: every array of labels by its name, one row per sample; int64 or float32.
        index: int64 sample numbers in the whole source (also when read from a subset of it), (samples,).
        fed: samples that the inputs hold, those repeated to fill a fixed batch included; 0 without a batch axis.
    """

    inputs: Arrays
    labels: Array | None
    index: Index
    fed: int
    targets: Mapping[str, Array] = field(default_factory=dict)

    def real(self, output: Array) -> Array:
        """An output of the model without the rows of repeated samples."""
        rows = len(self.index)
        return output[:rows] if 0 < rows < self.fed and output.ndim and len(output) == self.fed else output


def is_label(name: str) -> bool:
    """Whether an array that is no input of the model holds labels: `labels`, or `labels:OUTPUT`."""
    return name == LABELS or name.startswith(f"{LABELS}:")


def has_classes(targets: Iterable[InputSpec]) -> bool:
    """Whether arrays of labels hold class numbers of the samples: `labels`, integers (samples,)."""
    return any(t.name == LABELS and t.dtype.kind == "i" and len(t.shape) == 1 for t in targets)


def has_batch_axis(specs: Sequence[InputSpec]) -> bool:
    """Whether the first axis of every input counts samples.

    It does not where an input is a scalar or empty, where fixed first dimensions differ between inputs, or where an
    input is a vector of integers of fixed length, which are parameters such as a shape.
    """
    fixed = {spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None}
    vectors = [spec for spec in specs if len(spec.shape) == 1 and spec.dtype.kind in "iu"]
    return (
        all(spec.shape for spec in specs)
        and len(fixed) <= 1
        and 0 not in fixed
        and not any(spec.shape[0] not in (None, 1) for spec in vectors)
    )


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The batch size that the model prescribes, for `batches(size, pad=True)`; None if it accepts any.

    A model without a batch axis takes one sample at a time.

    Raises:
        DataError: if there are no inputs.
    """
    if not specs:
        raise DataError("the model has no inputs, so it cannot be fed samples; give it at least one input")
    if not has_batch_axis(specs):
        return 1
    return next((spec.shape[0] for spec in specs if spec.shape[0] is not None), None)


def shown_shape(spec: InputSpec) -> str:
    """The shape that the model wants, as messages show it: `(samples, 3, any)`."""
    return f"({', '.join(['samples', *('any' if size is None else str(size) for size in spec.shape[1:])])})"


def listed(items: Sequence[str]) -> str:
    """What a message lists: the first items, and how many more there are."""
    more = len(items) - 12
    return ", ".join(item[:120] for item in items[:12]) + (f" and {more} more" if more > 0 else "")
