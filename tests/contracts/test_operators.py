"""Every operator of ONNX: what training does with it is said in the table, and what the table says is tested."""

import onnx
import pytest
from gradient_cases import CASES
from gradient_cases_spatial import CASES_SPATIAL

from onnxqt.ops import OPS, Gradient, Kind, lookup
from onnxqt.runtime import MAX_OPSET
from onnxqt.trim.gradients.built_in import BUILT_IN
from onnxqt.trim.gradients.flow import RULES

FLOATS = ("float16", "bfloat16", "float", "double")


def schemas() -> dict[str, onnx.defs.OpSchema]:
    """The operators of the default domain as they are at the newest opset that is read."""
    newest: dict[str, onnx.defs.OpSchema] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        known = newest.get(schema.name)
        if schema.domain == "" and schema.since_version <= MAX_OPSET:
            newest[schema.name] = schema if known is None or schema.since_version > known.since_version else known
    return {name: schema for name, schema in newest.items() if not schema.deprecated}


SCHEMAS = schemas()


def holds_floats(operand: onnx.defs.OpSchema.FormalParameter) -> bool:
    """Whether an operand may hold real numbers, in a tensor, a sequence or an optional value."""
    return any(f"tensor({name})" in kind for kind in operand.types for name in FLOATS)


def names(*gradients: Gradient) -> set[str]:
    return {name for name, row in OPS.items() if row.gradient in gradients}


def test_the_table_has_a_row_for_each_operator_and_no_other() -> None:
    assert set(OPS) == set(SCHEMAS)
    assert len(SCHEMAS) > 180


@pytest.mark.parametrize("name", SCHEMAS)
def test_operator_is_trained_passed_through_or_stopped_with_a_reason(name: str) -> None:
    row, schema = lookup(name), SCHEMAS[name]
    has_subgraph = any(attribute.type == onnx.defs.OpSchema.AttrType.GRAPH for attribute in schema.attributes.values())
    reads_floats = has_subgraph or any(holds_floats(operand) for operand in schema.inputs)
    passes = reads_floats and any(holds_floats(operand) for operand in schema.outputs)
    assert passes == (row.gradient is not Gradient.NOT_NEEDED)
    assert bool(row.reason) == (row.gradient is Gradient.STOPPED)


def test_the_rules_are_those_of_the_table() -> None:
    assert set(RULES) == names(Gradient.RULE)
    assert set(BUILT_IN) <= names(Gradient.RULE, Gradient.NATIVE)


def test_every_gradient_is_compared_with_differences() -> None:
    compared = {case.op for case in (*CASES.values(), *CASES_SPATIAL.values())}
    assert compared == names(Gradient.NATIVE, Gradient.RULE)


def test_unknown_operators_stop_with_a_reason() -> None:
    assert lookup("Inverse", "com.microsoft").reason == "is an operator of the domain 'com.microsoft'"
    assert lookup("Upsample").gradient is Gradient.STOPPED
    assert lookup("Upsample").reason
    assert lookup("Relu", "ai.onnx") == OPS["Relu"]
    assert lookup("Relu", "com.example").kind is Kind.FLOAT
