"""Referee: OpenVINO on the CPU, `model.onnx` as it is. `python openvino_cpu.py CASES [--saturating]`.

The hint f32 keeps bfloat16 out of what is not quantized. With `--saturating` oneDNN may use no VNNI instruction, so
that pairs of products saturate at 16 bits. The codes are read off the real outputs, which lie on their grids.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from typing import Any

import folders

PARSER = argparse.ArgumentParser()
PARSER.add_argument("--saturating", action="store_true", help="no VNNI: ONEDNN_MAX_CPU_ISA=AVX512_CORE")
PARSER.add_argument("--isa", default="AVX512_CORE", help="what oneDNN may use with --saturating")
INTEGER = ("u8", "i8")
# what they move would become an output of its own, computed in float
MOVES = ("Reshape", "Transpose", "Slice", "Split", "Flatten", "Squeeze", "Unsqueeze", "Identity", "QuantizeLinear")


def run(case: folders.Case) -> folders.Outcome:
    """Codes of the outputs, and of what the other nodes compute unless such outputs change how they are executed."""
    plain, nodes = executed_with(case, {})
    makers = [node for node in case.nodes if node["op_type"] not in MOVES and node["output"] not in case.outputs]
    names = {node["output"]: case.values[node["output"]]["tensor"] for node in makers}
    every, others = executed_with(case, names)
    return folders.Outcome(every if folders.same_kernels(nodes, others) else plain, nodes)


def executed_with(
    case: folders.Case, names: Mapping[str, str]
) -> tuple[dict[str, folders.Array], tuple[dict[str, Any], ...]]:
    """Codes of the outputs and of the values in `names`, by the name of their tensor, and what executed each node."""
    core = openvino.Core()
    model = core.read_model(case.folder / "model.onnx")
    known = {name for node in model.get_ops() for port in node.outputs() for name in port.get_names()}
    further = {code: name for code, name in names.items() if name in known}
    model.add_outputs(list(further.values()))
    model.reshape({port: list(real.shape) for port, real in zip(model.inputs, inputs(case, model), strict=True)})
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    reals = {names_of(port): real for port, real in compiled(inputs(case, model)).items()}
    found = [*zip(case.outputs, list(reals.values()), strict=False)]
    found += [(code, next(real for ports, real in reals.items() if name in ports)) for code, name in further.items()]
    codes = {code: folders.exact_codes(real, case.values[code]) for code, real in found}
    kernels = executed_kernels(compiled)
    return codes, tuple({"name": node["name"], **executed(node, kernels)} for node in case.nodes)


def names_of(port: Any) -> frozenset[str]:
    """Names of an output."""
    return frozenset(port.get_names())


def inputs(case: folders.Case, model: Any) -> list[folders.Array]:
    """Real inputs in the order of the model's."""
    reals = [case.arrays.get(f"real:{code}") for code in case.inputs]
    given = [real for real in reals if real is not None]
    if len(given) != len(model.inputs):
        raise folders.NotExpressible(f"model.onnx: {len(model.inputs)} inputs, of which the case has {len(given)}")
    return given


def executed_kernels(compiled: Any) -> list[dict[str, str]]:
    """Facts of each executed node of the runtime graph."""
    facts = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        facts.append(
            {
                "layers": str(info["originalLayersNames"].astype(str)),
                "type": info["layerType"].astype(str),
                "kernel": info["primitiveType"].astype(str),
                "precision": info["runtimePrecision"].astype(str),
            }
        )
    return facts


def executed(node: dict[str, Any], kernels: list[dict[str, str]]) -> dict[str, Any]:
    """What executed `node`, and whether on 8-bit operands."""
    same_grid = node["op_type"] == "QuantizeLinear"
    for kernel in kernels:
        if any(layer == node["name"] or layer.startswith(f"{node['name']}/") for layer in kernel["layers"].split(",")):
            name = kernel["kernel"]
            integer = kernel["precision"] in INTEGER or name.endswith(("_i8", "_u8"))
            integer = integer or same_grid  # a FakeQuantize in float that changes nothing
            return {"executed_by": f"{kernel['type']} {name} {kernel['precision']}", "integer": integer}
    return {"executed_by": "not found in the runtime graph", "integer": same_grid}


if __name__ == "__main__":
    options, _ = PARSER.parse_known_args()
    if options.saturating:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa
    import openvino

    sys.exit(folders.main("openvino", openvino.__version__, run, PARSER))
