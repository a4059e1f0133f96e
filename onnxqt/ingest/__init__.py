"""Stage 1, ingest: any ONNX file -> one normalised, checked float graph.

Normalisation is the ordered tuple `PASSES`. Each pass edits the graph in place, is idempotent, and
returns one line for each thing it changed.
"""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import inliner

from onnxqt.errors import ModelError, first_line
from onnxqt.ingest.affine import fold_affine, fold_batch_norm, fold_gemm_factors, split_transposed_gemm
from onnxqt.ingest.constants import fold_constants, name_inner_nodes, remove_identities
from onnxqt.ingest.dequantize import check_quantized, kept_quantizers, remove_qdq
from onnxqt.ingest.files import read
from onnxqt.ingest.measure import measure_foreign
from onnxqt.ingest.pads import fold_pads
from onnxqt.ingest.precision import to_float32
from onnxqt.ingest.shapes import fold_shapes, write_scalar_bounds
from onnxqt.ingest.support import check_supported, drop_default_inputs, write_dense
from onnxqt.ingest.units import fuse_activations, fuse_layer_norm, merge_clamps
from onnxqt.ingest.weights import separate_weights
from onnxqt.model import Model, editable, finish, infer_shapes, ir_version_for, name_nodes, opset_of
from onnxqt.opset import convert_opset
from onnxqt.runtime import MAX_OPSET
from onnxqt.tensors import check_model, is_external, nbytes

MIN_OPSET = 17
MAX_ROUNDS = 10
MAX_EMBEDDED = (1 << 31) - (1 << 26)  # bytes of weights, with room for the graph: a protobuf message holds 2 GiB


PASSES: tuple[Callable[[gs.Graph], list[str]], ...] = (
    to_float32,
    fold_shapes,
    fold_constants,
    remove_identities,
    write_scalar_bounds,
    remove_qdq,
    fuse_layer_norm,
    merge_clamps,
    fuse_activations,
    fold_pads,
    split_transposed_gemm,
    fold_batch_norm,
    fold_affine,
    fold_gemm_factors,
    separate_weights,
)


def ingest(path: Path, strip_qdq: bool = False) -> Model:
    """Read, check and normalise a model.

    Args:
        path: of the ONNX file.
        strip_qdq: recover the float model from one that is quantized by pairs of QuantizeLinear and
            DequantizeLinear, instead of refusing it.

    Raises:
        ModelError: naming the node and a remedy, for a file that cannot be read or handled.
    """
    proto, digest = read(path)
    try:
        proto, changes = _normalise(proto, strip_qdq)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error
    return Model(proto, digest, tuple(changes))


def _normalise(proto: onnx.ModelProto, strip_qdq: bool) -> tuple[onnx.ModelProto, list[str]]:
    metadata = list(proto.metadata_props)
    changes = []
    if proto.functions:
        changes.append(f"inlined {len(proto.functions)} model-local function(s)")
        proto = inliner.inline_local_functions(proto)
    changes += [*write_dense(proto), *drop_default_inputs(proto)]
    check_supported(proto)
    check_quantized(proto, strip_qdq)
    proto, converted = _convert_opset(proto)
    changes += converted
    proto.ir_version = ir_version_for(proto)
    proto, measured = measure_foreign(infer_shapes(proto))
    changes += measured
    for _ in range(MAX_ROUNDS):  # what a pass leaves, and shapes known only then, can be work for one before it
        graph = editable(proto)
        name_nodes(graph)
        name_inner_nodes(graph)
        found = [change for normalise in PASSES for change in normalise(graph)]
        changes += found
        graph.cleanup().toposort()
        proto = finish(graph)
        if not found:
            break
    _check_size(proto)
    changes += kept_quantizers(proto)
    proto.metadata_props.extend(metadata)
    try:
        check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"a pass broke the graph ({first_line(error)}): report the model") from error
    return proto, changes


def _check_size(proto: onnx.ModelProto) -> None:
    """Refuse a large model of whose weights too many had to be rewritten, from float16 for example."""
    size = sum(nbytes(tensor) for tensor in proto.graph.initializer if not is_external(tensor))
    if size > MAX_EMBEDDED:
        raise ModelError(
            f"{size / 2**30:.1f} GiB of weights would have to be rewritten (into float32, or another layout), more "
            "than one ONNX file holds: save the model in float32, with its weights as external data"
        )


def _convert_opset(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    if all(entry.domain not in ("", "ai.onnx") for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid("", MIN_OPSET))  # for what passes and quantizers add
    current = opset_of(proto)
    wanted = min(MAX_OPSET, max(MIN_OPSET, current))
    if wanted == current:
        return proto, []
    return convert_opset(proto, wanted), [f"converted opset {current} to {wanted}"]
