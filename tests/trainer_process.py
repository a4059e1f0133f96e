"""Takes one training step at learning rate 0 in each folder named on the command line, and keeps its gradients.

A process of its own for the tests of gradients, because a kernel can kill it. A folder holds `forward.onnx`, whose
only output is the loss and whose parameters are the initializers named `p...`, and `feeds.npz`.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort

from onnxqt.trim import finish_training
from onnxqt.trim.gradients import make_differentiable, static_rules
from onnxqt.trim.quantizers import functions
from onnxqt.trim.worker import Trainer


def main() -> None:
    ort.set_default_logger_severity(3)
    for folder in map(Path, sys.argv[1:]):
        forward = onnx.load(folder / "forward.onnx")
        parameters = [tensor.name for tensor in forward.graph.initializer if tensor.name.startswith("p")]
        graph = gs.import_onnx(forward)
        rules, wrappers = make_differentiable(graph)
        graph.toposort()
        onnx.save(finish_training(graph, [*functions(graph.opset), *wrappers]), folder / "graph.onnx")
        trainer = Trainer(folder / "graph.onnx", parameters, [*static_rules(), *rules])
        with np.load(folder / "feeds.npz") as file:
            feeds = dict(file)
        before = trainer.evaluate(feeds)
        loss = trainer.step(feeds, learning_rate=0.0)
        results = {**trainer.gradients(), "loss": np.array(loss), "before": np.array(before)}
        temporary = folder / "tmp.npz"
        np.savez(temporary, **results)  # type: ignore[arg-type]  # numpy's stub takes names for options
        temporary.rename(folder / "gradients.npz")


if __name__ == "__main__":
    main()
