"""Gradients of products of matrices and tensors."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxqt.numerics import Array
from onnxqt.trim.gradients.indexing import known_shape, known_sizes
from onnxqt.trim.gradients.rule import Call, NoGradientError, Rule, Vjp
from onnxqt.trim.gradients.text import sum_to


@dataclass(frozen=True)
class _Equation:
    """An Einstein summation, without ellipses: the axes of each operand and of the output, a letter each."""

    terms: tuple[str, ...]
    output: str

    @classmethod
    def parse(cls, text: str, ranks: Sequence[int]) -> "_Equation":
        """An equation as ONNX has it; the output may be implicit, and ellipses stand for any number of axes."""
        left, arrow, right = text.replace(" ", "").partition("->")
        terms = left.split(",")
        widths = [
            rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)
        ]
        free = [letter for letter in string.ascii_letters if letter not in text]
        letters = "".join(free[: max(widths, default=0)])
        if not arrow:
            named = "".join(terms).replace("...", "")
            right = "..." * ("..." in left) + "".join(sorted(x for x in set(named) if named.count(x) == 1))
        spelled = [
            term.replace("...", letters[len(letters) - width :]) for term, width in zip(terms, widths, strict=True)
        ]
        return cls(tuple(spelled), right.replace("...", letters))


def _einsum(call: Call) -> Vjp:
    """The gradient of an operand is the product of the output's gradient and the other operands.

    d x_i = Einsum(g, x_j for all j except i), the same along the axes that x_i alone has, on its diagonals only
    """
    ranks = [len(known_shape(operand)) for operand in call.inputs]
    return _product(call, _Equation.parse(str(call.attributes["equation"]), ranks))


def _mat_mul(call: Call) -> Vjp:
    """A sum of products over the last axis of the first operand and the last but one of the second."""
    left, right = (len(known_shape(operand)) for operand in call.inputs)
    batch = "abcdefgh"[: max(left, right, 2) - 2]
    first = batch[len(batch) - max(0, left - 2) :] + "mk"[2 - min(left, 2) :]
    second = batch[len(batch) - max(0, right - 2) :] + "kn"[: min(right, 2)]
    output = batch + "m" * (left > 1) + "n" * (right > 1)
    return _product(call, _Equation((first, second), output))


def _product(call: Call, equation: _Equation) -> Vjp:
    wanted = [i for i, operand in enumerate(call.inputs) if operand is not None and operand.trained]
    broadcast = _may_broadcast(call, equation)
    parts = [_operand_gradient(equation, i, known_shape(call.inputs[i]), broadcast) for i in wanted]
    constants = {name: value for part in parts for name, value in part.constants.items()}
    return Vjp("\n".join(part.body for part in parts), constants)


def _may_broadcast(call: Call, equation: _Equation) -> bool:
    """Whether an axis may have size 1 in one operand and another size elsewhere."""
    sizes: dict[str, set[int | None]] = {}
    for operand, term in zip(call.inputs, equation.terms, strict=True):
        for letter, size in zip(term, known_shape(operand), strict=True):
            sizes.setdefault(letter, set()).add(size)
    return any(len(found) > 1 or None in found for found in sizes.values())


def _operand_gradient(equation: _Equation, i: int, shape: Sequence[int | None], broadcast: bool) -> Vjp:
    """The gradient of operand i, for all of its axes and of its shape."""
    term, units = _without_diagonals(equation, i, shape)
    others = [(equation.output, "g0"), *((other, f"x{j}") for j, other in enumerate(equation.terms) if j != i)]
    others += [(letters, f"unit{i}_{letters}") for letters in units]
    body, last = _einsum_text(others, term, f"product{i}")
    if broadcast or _given(others, term) != term:
        missing = [axis for axis, letter in enumerate(term) if letter not in _given(others, term)]
        body += f"""
            missing{i} = Constant<value = int64[{len(missing)}] {{{", ".join(map(str, missing))}}}>()
            thin{i} = Unsqueeze({last}, missing{i})
            shape{i} = Shape(x{i})
            full{i} = Expand(thin{i}, shape{i})
        """
        last = f"full{i}"
    total = sum_to(None, None, f"x{i}", last, f"d{i}") if broadcast else f"d{i} = Identity({last})"
    return Vjp(body + total, {f"unit{i}_{letters}": unit for letters, unit in units.items()})


def _without_diagonals(equation: _Equation, i: int, shape: Sequence[int | None]) -> tuple[str, dict[str, Array]]:
    """The axes of operand i with a new letter for each repeated one, and the unit matrices that tie them together."""
    term, units = "", {}
    unused = iter(x for x in string.ascii_letters if x not in equation.output + "".join(equation.terms))
    for letter, size in zip(equation.terms[i], shape, strict=True):
        axis = letter
        if letter in term:
            axis = next(unused)
            (known,) = known_sizes((size,))
            units[letter + axis] = np.eye(known, dtype=np.float32)
        term += axis
    return term, units


def _given(others: Sequence[tuple[str, str]], term: str) -> str:
    """The axes of `term` that one of the other operands has."""
    return "".join(letter for letter in term if any(letter in letters for letters, _ in others))


def _einsum_text(operands: Sequence[tuple[str, str]], term: str, result: str) -> tuple[str, str]:
    """Text of the product of operands for the axes of `term` that they have, and its name; Einsum takes no scalars."""
    scalars = [name for letters, name in operands if not letters]
    tensors = [(letters, name) for letters, name in operands if letters]
    body, last = "", result
    if tensors:
        equation = f"{','.join(letters for letters, _ in tensors)}->{_given(tensors, term)}"
        body = f'{result} = Einsum<equation = "{equation}">({", ".join(name for _, name in tensors)})\n'
    else:
        last = scalars.pop()
    for number, name in enumerate(scalars):
        body += f"{result}_{number} = Mul({last}, {name})\n"
        last = f"{result}_{number}"
    return body, last


# --- determinant ----------------------------------------------------------------------------------------

_LARGEST = 12  # the minors of one matrix of n x n hold n^4 values


def _det(call: Call) -> Vjp:
    """The cofactors: the determinants of the matrix without one row and one column.

    d x[i, j] = g (-1)^(i + j) det(x without row i and column j)
    """
    n, _ = known_sizes(known_shape(call.inputs[0])[-2:])
    if n == 1:
        return Vjp("shape = Shape(x0)\nd0 = Reshape(g0, shape)")
    if n > _LARGEST:
        raise NoGradientError(f"is of matrices larger than {_LARGEST} x {_LARGEST}")
    others = np.array([[k for k in range(n) if k != i] for i in range(n)])  # the rows that are left
    minors = others[:, None, :, None] * n + others[None, :, None, :]
    signs = (-1.0) ** np.add.outer(np.arange(n), np.arange(n))
    return Vjp(
        f"""
        flat_matrix = Constant<value_ints = [-1, {n * n}]>()
        flat = Reshape(x0, flat_matrix)
        without = Gather<axis = 1>(flat, minors)
        determinants = Det(without)
        cofactors = Mul(determinants, signs)
        column = Constant<value_ints = [-1, 1]>()
        gradients = Reshape(g0, column)
        products = Mul(cofactors, gradients)
        shape = Shape(x0)
        d0 = Reshape(products, shape)
        """,
        {"minors": minors.reshape(n * n, n - 1, n - 1), "signs": signs.reshape(-1).astype(np.float32)},
    )


RULES: Mapping[str, Rule] = {
    "Det": _det,
    "Einsum": _einsum,
    "MatMul": _mat_mul,
}
