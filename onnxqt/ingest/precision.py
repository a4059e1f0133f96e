"""The pass that leaves float32 as the only type of real numbers."""

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxqt.errors import ModelError
from onnxqt.model import Names, is_onnx
from onnxqt.numerics import Array

_CODES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16", TensorProto.DOUBLE: "float64"}
_TYPE_ATTRIBUTES = ("to", "dtype", "output_datatype", "stash_type")
_GENERIC_DOMAINS = ("com.microsoft",)  # its operators take float32 wherever they take float16


def to_float32(graph: gs.Graph) -> list[str]:
    """Everything of type float16, bfloat16 or float64 becomes float32, in subgraphs too.

    Constants, inputs, outputs, and what Cast and the generators of values give out. Operators of foreign domains
    keep the types they had, between Casts: what else they can compute is unknown.

    Raises:
        ModelError: for a constant beyond the range of float32.
    """
    parts = (graph, *graph.subgraphs(recursive=True))
    names = Names(graph)
    ends = [
        f"{kind} '{tensor.name}'"
        for kind, tensors in (("input", graph.inputs), ("output", graph.outputs))
        for tensor in tensors
        if precision(tensor.dtype)
    ]
    changes = [change for part in parts for node in list(part.nodes) for change in _enclose(part, names, node)]
    kept = {id(tensor) for part in parts for node in part.nodes for tensor in _own_tensors(node)}
    found: set[str] = set()
    for part in parts:
        for tensor in _tensors(part):
            if id(tensor) not in kept:
                found |= _convert(tensor)
        for node in part.nodes:
            if not _is_foreign(node) and not any(id(tensor) in kept for tensor in node.outputs):
                found |= _convert_attributes(node)
    if not found:
        return changes
    told = f"; {' and '.join(ends)} {'is' if len(ends) == 1 else 'are'} float32" if ends else ""
    return [f"computes in float32 instead of {' and '.join(sorted(found))}{told}", *changes]


def precision(dtype: object) -> str | None:
    """The name of a floating-point type that is to become float32; None for any other.

    Graphsurgeon has NumPy types, and ONNX's numbers for what NumPy lacks.
    """
    if dtype is None:
        return None
    name = _CODES.get(dtype) if isinstance(dtype, int) else np.dtype(dtype).name  # type: ignore[call-overload]
    return name if name in _CODES.values() else None


def _tensors(part: gs.Graph) -> Iterator[gs.Tensor]:
    yield from (*part.inputs, *part.outputs)
    for node in part.nodes:
        yield from (*node.inputs, *node.outputs)


def _convert(tensor: gs.Tensor) -> set[str]:
    """Make one tensor float32, in place; the type that it had."""
    found = precision(tensor.dtype)
    if found is None:
        return set()
    if isinstance(tensor, gs.Constant):
        tensor.values = _as_float32(tensor.values, tensor.name)
    else:
        tensor.dtype = np.dtype(np.float32)
    return {found}


def _convert_attributes(node: gs.Node) -> set[str]:
    """Constants in attributes, and attributes that name a type."""
    found: set[str] = set()
    for name, value in node.attrs.items():
        if isinstance(value, gs.Constant) and (wide := precision(value.dtype)):
            value.values = _as_float32(value.values, node.outputs[0].name)
            found.add(wide)
        elif name in _TYPE_ATTRIBUTES and value in _CODES:
            node.attrs[name] = int(TensorProto.FLOAT)
            found.add(_CODES[value])
    return found


def _as_float32(values: Array, name: str) -> Array:
    with np.errstate(over="ignore"):
        converted: Array = values.astype(np.float32)
    if values.dtype == np.float64:
        lost = values[np.isfinite(values) & ~np.isfinite(converted)]
        if lost.size:
            raise ModelError(
                f"constant '{name}' holds the float64 value {lost[0]:g}, beyond the {np.finfo(np.float32).max:.2g} "
                "of float32, in which everything is computed: export the model in float32"
            )
    return converted


# --- operators of foreign domains -------------------------------------------------------------------------


def _is_foreign(node: gs.Node) -> bool:
    return not is_onnx(node) and node.domain not in _GENERIC_DOMAINS


def _own_tensors(node: gs.Node) -> list[gs.Tensor]:
    """What a foreign node reads and gives out in its own precision: after `_enclose`, all of it."""
    if not _is_foreign(node):
        return []
    return [tensor for tensor in (*node.inputs, *node.outputs) if precision(tensor.dtype)]


def _enclose(part: gs.Graph, names: Names, node: gs.Node) -> list[str]:
    """Casts before and behind a foreign node that computes in another precision."""
    found: set[str] = set()
    ends = {id(tensor) for tensor in (*part.inputs, *part.outputs)}
    for position, tensor in enumerate(node.inputs):
        wanted = precision(tensor.dtype) if _is_foreign(node) else None
        if wanted and not (id(tensor) not in ends and _made_for_foreign(tensor)):
            own = gs.Variable(names.new(f"{tensor.name}.{wanted}"), tensor.dtype, tensor.shape)
            part.nodes.append(_cast(own.name, tensor, own, _code(wanted)))
            node.inputs[position] = own
            found.add(wanted)
    for position, tensor in enumerate(node.outputs):
        given = precision(tensor.dtype) if _is_foreign(node) else None
        if given and not (id(tensor) not in ends and _read_by_foreign(tensor)):
            own = gs.Variable(names.new(f"{tensor.name}.{given}"), tensor.dtype, tensor.shape)
            node.outputs[position] = own
            part.nodes.append(_cast(tensor.name, own, tensor, TensorProto.FLOAT))
            found.add(given)
    label = f"{node.op} '{node.name}' of the domain '{node.domain}'"
    return [f"kept {label} in {' and '.join(sorted(found))}"] if found else []


def _made_for_foreign(tensor: gs.Tensor) -> bool:
    """Whether only foreign nodes read a tensor, and its type is nothing to anybody else."""
    made = not tensor.inputs or _is_foreign(tensor.inputs[0]) or is_onnx(tensor.inputs[0], "Cast")
    return made and all(_is_foreign(reader) for reader in tensor.outputs)


def _read_by_foreign(tensor: gs.Tensor) -> bool:
    """Whether every reader of what a foreign node gives out takes its type."""
    return all(_is_foreign(reader) or is_onnx(reader, "Cast") for reader in tensor.outputs)


def _cast(name: str, source: gs.Tensor, result: gs.Tensor, to: int) -> gs.Node:
    return gs.Node("Cast", f"{name}.cast", {"to": int(to)}, [source], [result])


def _code(wanted: str) -> int:
    return next(code for code, name in _CODES.items() if name == wanted)
