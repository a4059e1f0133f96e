"""Takes one training step at learning rate 0 in each folder named on the command line, and keeps its gradients.

A program of its own for the tests of gradients: a kernel can kill its process, and a gradient rule is registered
once for all in a process, so each folder has a fork of its own.

A folder holds `forward.onnx`, whose output is the loss and whose parameters are the initializers named `p...`, and
`feeds.npz`. It gets `gradients.npz` and `log`, the last line of which is the exit status.
"""

import os
import sys
import traceback
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from onnxqt.model import Model, editable
from onnxqt.trim import finish_training
from onnxqt.trim.gradients import find_flow, make_differentiable, static_rules
from onnxqt.trim.quantizers import functions
from onnxqt.trim.trainer import Trainer


def step(folder: Path) -> None:
    forward = onnx.load(folder / "forward.onnx")
    parameters = [tensor.name for tensor in forward.graph.initializer if tensor.name.startswith("p")]
    graph = editable(forward)
    registrations, wrappers = make_differentiable(graph, find_flow(Model(forward, ""), parameters, ["loss"]))
    onnx.save(finish_training(graph, [*functions(graph.opset), *wrappers]), folder / "graph.onnx")
    trainer = Trainer(folder / "graph.onnx", parameters, [*static_rules(), *registrations])
    with np.load(folder / "feeds.npz") as file:
        feeds = dict(file)
    evaluated = trainer.evaluate(feeds)
    loss = trainer.step(feeds, learning_rate=0.0)
    numbers = {"loss": np.array(loss), "evaluated": np.array(evaluated), "rules": np.array(len(registrations))}
    results = {**trainer.gradients(), **numbers}
    np.savez(folder / "gradients.npz", **results)  # type: ignore[arg-type]  # numpy's stub takes names for options


def fork(folder: Path) -> None:
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        with (folder / "log").open("a") as log:
            log.write(f"\nexit status {os.waitstatus_to_exitcode(status)}")
        return
    log_file = os.open(folder / "log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    try:
        step(folder)
    except BaseException:  # noqa: BLE001  # a fork must not return into its parent's loop
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    ort.set_default_logger_severity(3)
    for name in sys.argv[1:]:
        fork(Path(name))
