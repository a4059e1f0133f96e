"""What a model is made of and what would happen to it, known without data: `onnxqt inspect`."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from onnxqt.model import Model
from onnxqt.plan import QuantPlan
from onnxqt.survey.parts import Layer, Operator, Parameter, Parts, find_layers, find_operators, find_parameters
from onnxqt.survey.problems import Problem, find_problems
from onnxqt.survey.sizes import Value, find_sizes, values_of_model
from onnxqt.trim import Reach

SCHEMA_VERSION = "1.0"

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Survey:
    """Everything that is known of a model without data.

    Attributes:
        sha256: of the user's file, with its external data.
        opset: version of the default operator set that is worked with.
        original_opset: that of the file.
        changes: what ingest changed, one line each.
        inputs: of the model.
        outputs: of the model.
        batch: samples of the batch for which shapes are given: 1, or what the model prescribes.
        operators: of the main graph, the most frequent first.
        parameters: each once.
        layers: the nodes that multiply or have parameters, in topological order.
        plan: where quantizers go, and what stays float.
        reach: which weights training can move.
        problems: what to know before fine-tuning.
    """

    sha256: str
    opset: int
    original_opset: int
    changes: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    batch: int
    operators: tuple[Operator, ...]
    parameters: tuple[Parameter, ...]
    layers: tuple[Layer, ...]
    plan: QuantPlan
    reach: Reach
    problems: tuple[Problem, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates per sample of all layers for which they are known (formulas: `onnxqt.survey.macs`)."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def unknown_macs(self) -> tuple[str, ...]:
        """The layers for which they are not."""
        return tuple(layer.node for layer in self.layers if layer.macs is None)

    def parameters_of(self, kind: str) -> tuple[Parameter, ...]:
        """The parameters of a kind."""
        return tuple(parameter for parameter in self.parameters if parameter.kind == kind)


def survey(model: Model, plan: QuantPlan, reach: Reach) -> Survey:
    """Find out all that can be known of a model without data; reads its weights one at a time."""
    sizes = find_sizes(model)
    parts = Parts(model, plan, reach, sizes)
    inputs, outputs = values_of_model(model, sizes)
    parameters, layers = find_parameters(parts), find_layers(parts)
    return Survey(
        sha256=model.sha256,
        opset=model.opset,
        original_opset=_original_opset(model),
        changes=model.changes,
        inputs=inputs,
        outputs=outputs,
        batch=sizes.batch,
        operators=find_operators(parts),
        parameters=parameters,
        layers=layers,
        plan=plan,
        reach=reach,
        problems=find_problems(parts, parameters, layers),
    )


def survey_json(found: Survey) -> Json:
    """The form for machines (schema: onnxqt/survey.schema.json)."""
    plan, reach = found.plan, found.reach
    return {
        "schema_version": SCHEMA_VERSION,
        "sha256": found.sha256,
        "opset": found.opset,
        "original_opset": found.original_opset,
        "changes": list(found.changes),
        "inputs": [_plain(value) for value in found.inputs],
        "outputs": [_plain(value) for value in found.outputs],
        "batch": found.batch,
        "operators": [{**_plain(operator), "count": operator.count} for operator in found.operators],
        "parameters": _parameters(found),
        "macs": {"per_sample": found.macs, "complete": not found.unknown_macs, "unknown": list(found.unknown_macs)},
        "layers": [_plain(layer) for layer in found.layers],
        "integer_nodes": [
            {"node": node.name, "op_type": node.op_type, "fused": list(node.followers)} for node in plan.integer_nodes
        ],
        "float_nodes": [
            {"node": node.name, "op_type": node.op_type, "reason": node.reason} for node in plan.float_nodes
        ],
        "quantized_tensors": [site.tensor for site in plan.activations],
        "quantized_weights": [{"tensor": site.tensor, "axis": site.axis} for site in plan.weights],
        "training": {
            "trained": list(reach.trained),
            "untouched": dict(reach.untouched),
            "reason": reach.reason,
        },
        "problems": [_plain(problem) for problem in found.problems],
    }


def _parameters(found: Survey) -> Json:
    kept = found.parameters_of("float")
    return {
        "total": _size(found.parameters),
        "weights": _size(found.parameters_of("weight")),
        "biases": _size(found.parameters_of("bias")),
        "float": _size(kept),
        "float_tensors": [
            {"tensor": p.tensor, "shape": list(p.shape), "count": p.count, "bytes": p.bytes, "reason": p.reason}
            for p in kept
        ],
    }


def _size(parameters: Iterable[Parameter]) -> Json:
    each = list(parameters)
    return {"tensors": len(each), "count": sum(p.count for p in each), "bytes": sum(p.bytes for p in each)}


def _plain(value: Value | Operator | Layer | Problem) -> Json:
    """A dataclass as JSON has it."""
    return {key: list(item) if isinstance(item, tuple) else item for key, item in asdict(value).items()}


def _original_opset(model: Model) -> int:
    """The opset that ingest converted from, as it says."""
    converted = (re.fullmatch(r"converted opset (\d+) to \d+", change) for change in model.changes)
    return next((int(match[1]) for match in converted if match), model.opset)
