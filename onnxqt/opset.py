"""Bringing a model to another version of the default operator set."""

import onnx
from onnx import defs, inliner, version_converter

from onnxqt.errors import ModelError, first_line
from onnxqt.model import is_onnx, nodes_of, opset_of
from onnxqt.tensors import check_model, with_large, without_large


def convert_opset(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The same model in another version of the default operator set.

    Operators that the wanted version does not have are written out as the functions by which ONNX defines them.

    Raises:
        ModelError: naming the operator for which there is no conversion.
    """
    if opset_of(proto) < 9 and "Scan" in _op_types(proto):
        raise ModelError(
            f"opset {opset_of(proto)} cannot be converted to {version} (Scan had a batch axis then, which onnx's "
            "converter loses): export the model with a newer opset"
        )
    expanded = _without_newer(proto, version)
    lean = without_large(expanded)
    try:
        converted = version_converter.convert_version(lean, version)
    except Exception as error:  # the converter raises RuntimeError and C++ assertion texts
        relabelled = _relabelled(lean, version)
        if relabelled is None:
            reason = _culprit(lean, version) or first_line(error)
            raise ModelError(
                f"opset {opset_of(proto)} cannot be converted to {version} ({reason}): "
                f"export the model with opset {version}"
            ) from error
        converted = relabelled
    return with_large(converted, expanded) if lean is not expanded else converted


def _without_newer(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """Write out operators that came after `version` and that ONNX defines by other operators."""
    while newer := [("", name) for name in sorted(_op_types(proto)) if not defs.has(name, version)]:
        try:
            proto = _with_defaults(proto, {name for _, name in newer})
            expanded = inliner.inline_selected_functions(proto, newer, inline_schema_functions=True)
        except RuntimeError:  # of an operator whose definition depends on types that are not known
            break
        if _op_types(expanded) == _op_types(proto):
            break
        proto = expanded
    return proto


def _with_defaults(proto: onnx.ModelProto, op_types: set[str]) -> onnx.ModelProto:
    """Write out the default attributes of some operators; onnx's inliner forgets them in subgraphs."""
    explicit = onnx.ModelProto()
    explicit.CopyFrom(proto)
    for node in nodes_of(explicit.graph):
        if node.op_type in op_types:
            present = {attribute.name for attribute in node.attribute}
            schema = defs.get_schema(node.op_type, opset_of(proto))
            defaults = [attribute.default_value for attribute in schema.attributes.values()]
            node.attribute.extend(value for value in defaults if value.name and value.name not in present)
    return explicit


def _relabelled(proto: onnx.ModelProto, version: int) -> onnx.ModelProto | None:
    """The model under another opset number, if its operators differ between the two in element types alone."""
    if any(_signature(name, opset_of(proto)) != _signature(name, version) for name in _op_types(proto)):
        return None
    relabelled = onnx.ModelProto()
    relabelled.CopyFrom(proto)
    for entry in relabelled.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    try:
        check_model(relabelled, full=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None
    return relabelled


def _signature(op_type: str, version: int) -> tuple[object, ...]:
    """Names of an operator's inputs, outputs and attributes in a version; empty where it has none of that name."""
    if not defs.has(op_type, version):
        return ()
    schema = defs.get_schema(op_type, version)
    return ([i.name for i in schema.inputs], [o.name for o in schema.outputs], sorted(schema.attributes))


def _op_types(proto: onnx.ModelProto) -> set[str]:
    """The operators of ONNX itself in a model."""
    current = opset_of(proto)
    return {n.op_type for n in nodes_of(proto.graph) if is_onnx(n) and defs.has(n.op_type, current)}


def _culprit(proto: onnx.ModelProto, version: int) -> str | None:
    """The first node whose operator is missing in `version`, or changed between the two."""
    current = opset_of(proto)
    changed = []
    for node in nodes_of(proto.graph):
        if not is_onnx(node) or not defs.has(node.op_type, current):
            continue
        label = f"{node.op_type} '{node.name or node.output[0]}'"
        if not defs.has(node.op_type, version):
            return f"{label} does not exist there"
        if defs.get_schema(node.op_type, current).since_version != defs.get_schema(node.op_type, version).since_version:
            changed.append(f"{label} uses what it has no form of there")
    return changed[0] if changed else None
