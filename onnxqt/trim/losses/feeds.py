"""What the inputs of the loss are fed with, batch by batch, and the least loss that they allow."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from onnxqt.data import Batch, Samples, check_labels, check_targets
from onnxqt.numerics import Array
from onnxqt.trim.losses.terms import (
    FLOOR,
    Term,
    classes_input,
    labels_input,
    original_input,
    power_input,
)

_LEAST_POWER = 1e-12  # of an output that never changes
_TINY = 1e-30  # 0 log 0 = 0


def teacher_outputs(terms: Iterable[Term]) -> tuple[str, ...]:
    """The tensors of the original model that the terms compare with; there may be none."""
    tensors = [
        tensor
        for term in terms
        for tensor in ([term.tensor] if term.compares else [b.of for b in term.bindings if b.source == "original"])
    ]
    return tuple(dict.fromkeys(tensors))


def measure_power(terms: Sequence[Term], outputs: Iterable[Mapping[str, Array]]) -> dict[str, float]:
    """Variance of each compared tensor over all of its values in all batches; at least 1e-12.

    Args:
        terms: the loss.
        outputs: the original model's tensors by name, batch by batch; only one batch is held at a time.
    """
    tensors = list(dict.fromkeys(term.tensor for term in terms if term.compares))
    if not tensors:
        return {}
    moments = dict.fromkeys(tensors, (0, 0.0, 0.0))  # count, mean, sum of the squared deviations
    for batch in outputs:
        moments = {tensor: _merged(moments[tensor], batch[tensor]) for tensor in tensors}
    return {tensor: max(squares / max(count, 1), _LEAST_POWER) for tensor, (count, _, squares) in moments.items()}


def _merged(moments: tuple[int, float, float], values: Array) -> tuple[int, float, float]:
    """Moments of what came before and of `values` together (Chan, Golub, LeVeque 1983, eq. 2.1)."""
    if not values.size:
        return moments
    count, mean, squares = moments
    more, other = values.size, float(np.mean(values, dtype=np.float64))
    total, step = count + more, other - mean
    new = float(np.var(values, dtype=np.float64)) * more
    return total, mean + step * more / total, squares + new + step**2 * count * more / total


def loss_feeds(
    terms: Iterable[Term], batch: Batch, original: Mapping[str, Array], power: Mapping[str, float]
) -> dict[str, Array]:
    """Values of the inputs of the loss for one batch.

    Args:
        terms: the loss.
        batch: its samples; labels are repeated like the inputs where it is filled up to a fixed size.
        original: at least `teacher_outputs(terms)`, by name.
        power: what `measure_power` gave.
    """
    values: dict[str, Array] = {}
    for term in terms:
        tensors = [term.tensor] if term.compares else []
        for tensor in (*tensors, *(b.of for b in term.bindings if b.source == "original")):
            values[original_input(tensor)] = original[tensor]
        for tensor in tensors:
            values[power_input(tensor)] = np.array(power[tensor], np.float32)
        if term.distils_classes:
            values[classes_input(term.tensor)] = _probabilities(term, original[term.tensor])
        for array in (term.labels, *(b.of for b in term.bindings if b.source == "labels")):
            if array:
                values[labels_input(array)] = _filled(batch.targets[array], batch.fed)
    return values


def _filled(labels: Array, rows: int) -> Array:
    """Labels with the last one repeated, up to the number of rows of the inputs."""
    missing = rows - len(labels)
    return np.concatenate([labels, np.repeat(labels[-1:], missing, axis=0)]) if missing > 0 else labels


def _probabilities(term: Term, y: Array) -> Array:
    """The original model's class probabilities at the temperature of a term."""
    if term.temperature == 1:
        return softmax(y, term.axis) if term.kind == "scores" else y
    scores = y if term.kind == "scores" else np.log(y + np.float32(FLOOR))
    return softmax(scores / np.float32(term.temperature), term.axis)


def softmax(scores: Array, axis: int = -1) -> Array:
    """Probabilities of class scores, float32."""
    shifted = np.exp(scores - scores.max(axis=axis, keepdims=True))
    probabilities: Array = (shifted / shifted.sum(axis=axis, keepdims=True)).astype(np.float32)
    return probabilities


def least_loss(terms: Iterable[Term], feeds: Mapping[str, Array]) -> float:
    """The least loss that the targets of a batch allow: their entropies; 0 for errors, and for a loss graph.

    Args:
        terms: the loss.
        feeds: what `loss_feeds` gave.
    """
    return sum(term.weight * _least(term, feeds) for term in terms)


def _least(term: Term, feeds: Mapping[str, Array]) -> float:
    if term.distils_classes:
        p = feeds[classes_input(term.tensor)]
        entropies = np.sum(p * np.log(np.maximum(p, _TINY)), axis=term.axis)
        return -(term.temperature**2) * float(np.mean(entropies))
    if term.name == "distill" and term.kind == "binary":
        return _binary_entropy(feeds[original_input(term.tensor)])
    if term.name == "bce":
        return _binary_entropy(feeds[labels_input(term.labels)])
    return 0.0


def _binary_entropy(p: Array) -> float:
    p = p.astype(np.float64)
    return -float(np.mean(p * np.log(np.maximum(p, _TINY)) + (1 - p) * np.log(np.maximum(1 - p, _TINY))))


def check_label_values(terms: Iterable[Term], samples: Samples) -> None:
    """Check that class numbers are those of the model, and that labels of "bce" lie in [0, 1]; reads labels only.

    Raises:
        DataError: naming the file and sample of a label that does not.
    """
    for term in terms:
        if term.name == "cross-entropy":
            check_labels(samples, term.classes, term.labels)
        elif term.name == "bce":
            remedy = "but the loss 'bce' takes probabilities between 0 and 1; scale the labels, or use 'mse'"
            check_targets(samples, term.labels, (0, 1), remedy)
