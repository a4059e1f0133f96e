"""What was found as JSON has it (schema: onnxqt/advice.schema.json)."""

from typing import Any

from onnxqt.advice.bench import Bench, Quality
from onnxqt.advice.search import Advice, Advised
from onnxqt.advice.sensitivity import LayerCost, TensorCost

SCHEMA_VERSION = "1.0"

Json = dict[str, Any]


def advised_json(bench: Bench, found: Advised) -> Json:
    """Everything that was found."""
    settings = bench.settings
    return {
        "schema_version": SCHEMA_VERSION,
        "sha256": bench.model.sha256,
        "scheme": str(settings.scheme),
        "ranges": settings.ranges,
        "samples": found.samples,
        "models": found.models,
        "baseline": _quality(found.baseline),
        "advised": _quality(found.quality),
        "advice": [_advice(item) for item in found.advice],
        "overrides": found.overrides.as_json(),
        "options": list(found.options),
        "layers": [_layer(cost) for cost in found.costs.layers],
        "tensors": [_tensor(cost) for cost in found.costs.tensors],
        "left_out": found.costs.left_out,
    }


def _quality(quality: Quality) -> Json:
    return {"snr_db": quality.snr_db, "agreement": quality.agreement}


def _or_none(quality: Quality | None) -> Json | None:
    return None if quality is None else _quality(quality)


def _advice(item: Advice) -> Json:
    return {
        "kind": item.kind,
        "subject": item.subject or None,
        "text": item.text,
        "reason": item.reason,
        "gain_db": item.gain_db,
        **_quality(item.quality),
        "option": item.option,
    }


def _layer(cost: LayerCost) -> Json:
    return {
        "node": cost.node,
        "op_type": cost.op_type,
        "weight": cost.weight,
        "output": cost.output,
        "only": _or_none(cost.only),
        "without": _or_none(cost.without),
    }


def _tensor(cost: TensorCost) -> Json:
    return {
        "tensor": cost.tensor,
        "role": cost.role,
        "node": cost.node or None,
        "bits": cost.bits,
        "own_db": cost.own_db,
        "only": _or_none(cost.only),
    }
