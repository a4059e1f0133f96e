"""The only module that imports onnxruntime's training part: a graph with its gradient and its optimizer.

It runs in a process of its own (see `worker`), because a kernel of the trainer can kill the process it runs in.
"""

import functools
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from onnxqt.numerics import Array
from onnxqt.runtime import MAX_IR_VERSION
from onnxqt.trim.gradients.rule import Registration
from onnxqt.trim.job import Optimizer


def _import_training() -> tuple[Any, Any, Any]:
    """onnxruntime.training's artifacts, onnxblock and api, without its `__init__`, which needs torch."""
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(ort.__file__).parent / "training")]
    sys.modules["onnxruntime.training"] = package
    from onnxruntime.training import api, artifacts, onnxblock

    return artifacts, onnxblock, api


def register(registrations: Sequence[Registration]) -> None:
    """Make gradients known to the gradient builder of this process."""
    from onnxruntime.capi import _pybind_state as c_api

    for registration in registrations:
        definition = c_api.GradientNodeDefinition()
        definition.op_type, definition.domain = registration.op_type, registration.domain
        definition.inputs, definition.outputs = list(registration.inputs), list(registration.outputs)
        definition.attributes = []
        c_api.register_gradient_definition(registration.key, [definition])


@functools.cache
def _session_options() -> Any:
    """Options of the training session: memory grows by what is asked for.

    By default each growth of the arena doubles it, which took half as much memory again as the training needs.
    """
    from onnxruntime.capi import _pybind_state as c_api

    as_requested = c_api.OrtArenaCfg({"max_mem": 0, "arena_extend_strategy": 1, "initial_chunk_size_bytes": -1,
                                      "max_dead_bytes_per_chunk": -1})  # fmt: skip
    memory = c_api.OrtMemoryInfo("Cpu", c_api.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, c_api.OrtMemType.DEFAULT)
    c_api.create_and_register_allocator(memory, as_requested)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.use_env_allocators", "1")
    return options


class Trainer:
    """A training graph with its optimizer.

    Args:
        graph: the ONNX file; the artifacts of the trainer are written beside it.
        parameters: initializers to train.
        registrations: gradients that its functions need.
        given_out: tensors whose values each step gives out.
        optimizer: which.
        state: a checkpoint that `save` wrote, to go on from.
    """

    def __init__(
        self,
        graph: Path,
        parameters: Sequence[str],
        registrations: Sequence[Registration],
        given_out: Sequence[str] = (),
        optimizer: Optimizer = "adamw",
        state: Path | None = None,
    ) -> None:
        artifacts, onnxblock, api = _import_training()

        class PassThrough(onnxblock.Block):  # type: ignore[misc, name-defined]  # the graph ends in its loss
            def build(self, loss: str) -> str:
                return loss

        register(registrations)
        folder = graph.parent
        artifacts.generate_artifacts(
            onnx.load(graph),
            requires_grad=list(parameters),
            loss=PassThrough(),
            optimizer={"adamw": artifacts.OptimType.AdamW, "sgd": artifacts.OptimType.SGD}[optimizer],
            artifact_directory=folder,
            additional_output_names=list(given_out),
        )
        for name in ("training_model", "eval_model", "optimizer_model"):
            path = folder / f"{name}.onnx"
            proto = onnx.load(path)
            proto.ir_version = min(proto.ir_version, MAX_IR_VERSION)
            onnx.save(proto, path)
        self._api = api
        self._state = api.CheckpointState.load_checkpoint(state or folder / "checkpoint")
        self._module = api.Module(
            folder / "training_model.onnx", self._state, folder / "eval_model.onnx", session_options=_session_options()
        )
        self._optimizer = api.Optimizer(folder / "optimizer_model.onnx", self._module)
        self._parameters = tuple(parameters)
        self._given_out = tuple(given_out)

    def accumulate(self, values: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        """Add the gradients of one batch to those since the last update; the loss, and what is given out."""
        return self._run(self._module.train(), values)

    def update(self, learning_rate: float) -> None:
        """Move the parameters against the accumulated gradients, and forget these."""
        self._optimizer.set_learning_rate(learning_rate)
        self._optimizer.step()
        self._module.lazy_reset_grad()

    def step(self, values: Mapping[str, Array], learning_rate: float) -> float:
        """One update by one batch; returns the loss before it."""
        loss, _ = self.accumulate(values)
        self.update(learning_rate)
        return loss

    def evaluate(self, values: Mapping[str, Array]) -> float:
        """The loss, without an update."""
        return self._run(self._module.eval(), values)[0]

    def _run(self, module: Any, values: Mapping[str, Array]) -> tuple[float, dict[str, Array]]:
        results = module(*(values[name] for name in module.input_names()))
        if not isinstance(results, tuple):
            return float(np.asarray(results)), {}
        return float(np.asarray(results[0])), dict(zip(self._given_out, results[1:], strict=True))

    def parameters(self) -> dict[str, Array]:
        """A copy of the trained parameters."""
        return {name: np.array(self._state.parameters[name].data) for name in self._parameters}

    def set_parameters(self, values: Mapping[str, Array]) -> None:
        """Put the parameters at other values."""
        for name, value in values.items():
            self._state.parameters[name].data = np.asarray(value, np.float32)  # numpy makes scalars of 0-d arrays

    def gradients(self) -> dict[str, Array]:
        """The gradients accumulated since the last update."""
        return {name: np.array(self._state.parameters[name].grad) for name in self._parameters}

    def save(self, path: Path) -> None:
        """Write the parameters and what the optimizer remembers."""
        self._api.CheckpointState.save_checkpoint(self._state, path, include_optimizer_state=True)
