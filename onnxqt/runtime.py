"""Inference with ONNX Runtime: the only place outside the training worker that imports it."""

import functools
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxqt.errors import InstallationError, ModelError, first_line
from onnxqt.numerics import Array

try:
    import onnxruntime as ort
except ImportError:  # what two distributions in one folder can come to; `check_installation` says what to do
    ort = None

MAX_OPSET = 21  # the newest that ONNX Runtime 1.19.2 reads, and with it the trainer
MAX_IR_VERSION = 10
_QUIET = 4  # onnxruntime's severity "fatal": errors reach the user through exceptions

_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "ai.onnx.preview.training", "com.microsoft")  # that ONNX Runtime comes with

TRAINER = "onnxruntime-training-cpu"


def installed(distribution: str) -> str | None:
    """Version of an installed distribution, None if it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def check_installation() -> None:
    """Refuse an environment in which two distributions overwrote each other's files, or there is none.

    Raises:
        InstallationError: if `onnxruntime` and `onnxruntime-training-cpu` are both installed, or neither works.
    """
    if installed("onnxruntime") and installed(TRAINER):
        raise InstallationError(
            f"both 'onnxruntime' and '{TRAINER}' are installed and overwrite each other's files: run "
            f"'pip uninstall -y onnxruntime {TRAINER}', then 'pip install {TRAINER}==1.19.2'"
        )

    if ort is None:
        raise InstallationError(f"'import onnxruntime' fails: run 'pip install --force-reinstall {TRAINER}==1.19.2'")


def check_trainer() -> None:
    """Make sure that fine-tuning is possible here.

    Raises:
        InstallationError: if the training package is absent.
    """
    check_installation()
    if installed(TRAINER) is None:
        raise InstallationError(
            f"fine-tuning needs '{TRAINER}', which has no wheel for this platform or is not installed: run "
            f"'pip uninstall -y onnxruntime; pip install {TRAINER}==1.19.2' on Linux x86-64, Windows or macOS; "
            "the other commands work without it"
        )


class Session:
    """A model ready to run on the CPU.

    Args:
        model: the model, or the path of its file.
        optimize: let ONNX Runtime rewrite the graph (fuse QDQ into integer kernels).
        outputs: the outputs to compute; all by default.
        threads: that one run may use; 0 for one per core.

    Raises:
        ModelError: if ONNX Runtime cannot run the model.
    """

    def __init__(
        self,
        model: onnx.ModelProto | Path,
        optimize: bool = True,
        outputs: Sequence[str] | None = None,
        threads: int = 0,
    ) -> None:
        self._session = _open(model, optimize, threads)
        self.outputs = list(outputs) if outputs else [value.name for value in self._session.get_outputs()]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name.

        Raises:
            ModelError: if the model fails on these inputs.
        """
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as error:
            raise ModelError(f"the model fails on these inputs: {first_line(error)}") from error
        return dict(zip(self.outputs, map(_as_array, values), strict=True))


def _as_array(value: Any) -> Any:
    """A tensor as an array; sequences and maps, and None for an empty optional, as they are."""
    return value if value is None or isinstance(value, list | dict) else np.asarray(value)


def with_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy of `model` that also gives out the named tensors."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    present = {value.name for value in tapped.graph.output}
    tapped.graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(tensor) for tensor in dict.fromkeys(tensors) if tensor not in present
    )
    return tapped


def executed_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that ONNX Runtime executes for `model` after all its optimizations.

    Raises:
        ModelError: if ONNX Runtime cannot run the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        _open(model, True, optimized_model_filepath=os.fspath(path))
        return onnx.load(path, load_external_data=False)  # only its nodes are of interest


def _open(model: onnx.ModelProto | Path, optimize: bool, threads: int = 0, **settings: str) -> Any:
    """An onnxruntime session; `settings` are further session options."""
    check_installation()
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    options.intra_op_num_threads = threads
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    # Without it, u8 x s8 products saturate at 16 bits on processors without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    # Sessions have threads of their own; spinning, the threads of one burn the cores that the next one needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in settings.items():
        setattr(options, name, value)
    source = os.fspath(model) if isinstance(model, Path) else model.SerializeToString()
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime raises a private class per status code
        missing = [] if isinstance(model, Path) else _missing_operators(model)
        hint = f" (it has no operators {', '.join(missing)})" if missing else ""
        raise ModelError(f"ONNX Runtime cannot run the model: {first_line(error)}{hint}") from error


def _missing_operators(model: onnx.ModelProto) -> list[str]:
    """The operators of domains that ONNX Runtime does not come with, unless the model defines them itself."""
    own = {*_DOMAINS, *(function.domain for function in model.functions)}
    return sorted({f"{node.domain}::{node.op_type}" for node in model.graph.node if node.domain not in own})
