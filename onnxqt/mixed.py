"""How many bits each weight gets: the least damage to the outputs within a size, or the least size within a damage.

Each weight is measured alone, with all others at the most bits. The damages of several are taken to add up (as in
Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR 2020), so that weights can be narrowed one by one,
each time the one that costs least for what it saves:

    cost of a move = (error at the next width - error at this width) / bits saved
"""

import glob
import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxqt.errors import UsageError
from onnxqt.overrides import Override, Overrides

Bits = dict[str, int]  # of weights, by tensor
Measure = Callable[[Mapping[str, int]], float]  # the squared error of a model's outputs with weights of these bits
Move = tuple[str, int, int]  # a weight, its width before, its width after


@dataclass(frozen=True, eq=False, slots=True)
class Sensitivity:
    """What narrowing one weight does to the outputs.

    Attributes:
        tensor: the weight.
        size: its number of values.
        errors: squared error of the model's outputs by the bits of this weight, all others at the most bits.
    """

    tensor: str
    size: int
    errors: Mapping[int, float]


@dataclass(frozen=True, eq=False, slots=True)
class Mixed:
    """A choice of bits.

    Attributes:
        bits: of each weight.
        mean_bits: over all values.
        error: squared error of the outputs with all of these bits together.
    """

    bits: Bits
    mean_bits: float
    error: float

    def overrides(self, scheme_bits: int) -> Overrides:
        """The choice as overrides of a scheme whose weights have `scheme_bits`."""
        return Overrides(
            tuple(Override(glob.escape(name), bits) for name, bits in self.bits.items() if bits != scheme_bits)
        )


def measure_sensitivities(
    sizes: Mapping[str, int],
    widths: Sequence[int],
    measure: Measure,
    progress: Callable[[int, str], None] = lambda done, name: None,
) -> tuple[Sensitivity, ...]:
    """Measure each weight at each width, with the others at the largest: once per weight and smaller width, plus one.

    Args:
        sizes: number of values of each weight, by tensor.
        widths: bits to choose from, at least two.
        measure: the squared error of the outputs with weights of these bits; it gets the bits of all weights.
        progress: called with the number of weights done, and the name of the last one.

    Raises:
        UsageError: if there is nothing to choose from, or an error is not finite.
    """
    if len(set(widths)) < 2 or not all(2 <= width <= 8 for width in widths):
        raise UsageError(f"bits {list(widths)} leave no choice: give at least two of 2 to 8")
    if not sizes:
        raise UsageError("the model has no quantized weight whose bits could be chosen: check its plan")
    most, *narrower = sorted(set(widths), reverse=True)
    widest = dict.fromkeys(sizes, most)
    start = _measured(measure, widest, "all weights")
    found = []
    for done, (tensor, size) in enumerate(sizes.items(), 1):
        errors = {width: _measured(measure, {**widest, tensor: width}, f"'{tensor}'") for width in narrower}
        found.append(Sensitivity(tensor, size, {most: start, **errors}))
        progress(done, tensor)
    return tuple(found)


def _measured(measure: Measure, bits: Mapping[str, int], what: str) -> float:
    error = measure(bits)
    if not math.isfinite(error):
        raise UsageError(f"the outputs with {what} narrowed are not finite: choose more bits, or check the samples")
    return error


def within_size(sensitivities: Sequence[Sensitivity], mean_bits: float, measure: Measure) -> Mixed:
    """The bits with the least damage whose mean over all values is at most `mean_bits`.

    Weights are narrowed, the cheapest move first, until the mean is small enough; moves that turn out not to be needed
    for that are taken back, the last first.

    Raises:
        UsageError: if even the least bits are too many.
    """
    sizes = {found.tensor: found.size for found in sensitivities}
    bits = {found.tensor: max(found.errors) for found in sensitivities}
    taken: list[Move] = []
    for move in _moves(sensitivities):
        if _mean(bits, sizes) <= mean_bits:
            break
        bits[move[0]] = move[2]
        taken.append(move)
    if not _mean(bits, sizes) <= mean_bits:
        least = _mean(bits, sizes)
        raise UsageError(
            f"a mean of {mean_bits:g} bits cannot be had, the least is {least:g}: allow more, or fewer bits"
        )
    for tensor, before, after in reversed(taken):
        if bits[tensor] == after and _mean({**bits, tensor: before}, sizes) <= mean_bits:
            bits[tensor] = before
    return Mixed(bits, _mean(bits, sizes), measure(bits))


def within_error(sensitivities: Sequence[Sensitivity], limit: float, measure: Measure) -> Mixed:
    """The fewest bits with which the squared error of the outputs is at most `limit`.

    As many of the cheapest moves as the limit allows, found by bisection: about log2(moves) measurements of the error
    with all weights narrowed together.

    Raises:
        UsageError: if even the most bits have a larger error.
    """
    sizes = {found.tensor: found.size for found in sensitivities}
    moves = _moves(sensitivities)
    start = min(found.errors[max(found.errors)] for found in sensitivities)
    if not start <= limit:
        raise UsageError(
            f"an error of {limit:g} cannot be had, that of the most bits is {start:g}: allow more, or more bits"
        )

    def after(count: int) -> Bits:
        bits = {found.tensor: max(found.errors) for found in sensitivities}
        bits.update((tensor, width) for tensor, _, width in moves[:count])
        return bits

    fits, too_many, error = 0, len(moves) + 1, start
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        found = measure(after(middle))
        if found <= limit:
            fits, error = middle, found
        else:
            too_many = middle
    bits = after(fits)
    return Mixed(bits, _mean(bits, sizes), error)


def _moves(sensitivities: Sequence[Sensitivity]) -> list[Move]:
    """All moves down to the least bits, each time the one that costs least; a weight goes down width by width."""
    waiting = [(*_next(found, max(found.errors)), index) for index, found in enumerate(sensitivities)]
    heapq.heapify(waiting)
    moves: list[Move] = []
    while waiting:
        cost, before, after, index = heapq.heappop(waiting)
        if not math.isfinite(cost):
            continue
        moves.append((sensitivities[index].tensor, before, after))
        heapq.heappush(waiting, (*_next(sensitivities[index], after), index))
    return moves


def _next(found: Sensitivity, width: int) -> tuple[float, int, int]:
    """The cost of the next move of a weight, infinite where there is none; its width before and after."""
    narrower = [bits for bits in found.errors if bits < width]
    if not narrower:
        return math.inf, width, width
    after = max(narrower)
    saved = found.size * (width - after)
    return (found.errors[after] - found.errors[width]) / max(saved, 1), width, after


def _mean(bits: Mapping[str, int], sizes: Mapping[str, int]) -> float:
    """Mean number of bits over all values."""
    return sum(width * sizes[tensor] for tensor, width in bits.items()) / max(1, sum(sizes.values()))
