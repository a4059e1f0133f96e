"""How accurate a way to run a model is: over the evaluation samples, against the original float model.

Batches run on several threads at once, and are counted in their order: sums of floats do not depend on timing.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx

from onnxqt.data import Batch
from onnxqt.emulate import Result, load_program
from onnxqt.metrics import Tally
from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.runtime import Session
from onnxqt.verify import lsb_difference

Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]
Tallies = dict[str, Tally]  # by output name, the model's first float output first

_CACHE_LIMIT = 256 << 20  # bytes of reference outputs kept in memory
WORKERS = max(1, min(4, os.cpu_count() or 1))  # batches that run at once; as many more wait or are being counted
Item = TypeVar("Item")
Outcome = TypeVar("Outcome")


def in_order(work: Callable[[Item], Outcome], items: Iterable[Item]) -> Iterator[tuple[Item, Outcome]]:
    """Each item with what `work` makes of it, in the order of the items, while others are worked on by threads.

    At most `2 * WORKERS` items are taken ahead. The first failure is raised where its item would have come.
    """
    pool = ThreadPoolExecutor(WORKERS)
    pending: deque[tuple[Item, Future[Outcome]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) == 2 * WORKERS:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


class Reference:
    """Evaluation batches with the original model's float outputs, which are kept in memory if they are small.

    Args:
        model: the original model.
        batches: makes a new iterator over the evaluation batches; padded samples are ignored.
    """

    def __init__(self, model: Model, batches: Callable[[], Iterator[Batch]]) -> None:
        self.outputs = tuple(name for name in model.graph.outputs if model.graph.is_float(name))
        self._session = Session(model.proto)
        self._batches = batches
        self._kept: list[dict[str, Array]] = []
        self._bytes = 0

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Array]]]:
        for index, batch in enumerate(self._batches()):
            if index < len(self._kept):
                yield batch, self._kept[index]
                continue
            outputs = self._session.run(batch.inputs)
            expected = {name: batch.real(outputs[name]) for name in self.outputs}
            self._bytes += sum(output.nbytes for output in expected.values())
            if index == len(self._kept) and self._bytes <= _CACHE_LIMIT:
                self._kept.append(expected)
            yield batch, expected


def evaluate(run: Run, reference: Reference, progress: Callable[[int], None] = lambda done: None) -> Tallies:
    """Compare what `run` makes of the evaluation samples with the original outputs.

    Args:
        run: inputs by name -> outputs by name; called from several threads.
        reference: the evaluation samples.
        progress: called with the number of samples done.
    """
    tallies = {name: Tally() for name in reference.outputs}
    done = 0
    for (batch, expected), outputs in in_order(lambda item: run(item[0].inputs), reference):
        _count(tallies, outputs, expected, batch)
        done += len(batch.index)
        progress(done)
    return tallies


@dataclass(frozen=True, eq=False)
class FileResult:
    """What ONNX Runtime, with its optimizations, and the emulator make of one quantized file.

    Attributes:
        runtime: compared with the original, by ONNX Runtime.
        emulator: compared with the original, by the emulator.
        max_lsb: largest difference of an output code between the two; None if no output is quantized.
        mismatch_fraction: share of output codes that differ; None likewise.
        float_nodes: (name, operator, reason) of each node that the emulator runs in float.
        overflows: accumulators that wrapped, by node.
    """

    runtime: Tallies
    emulator: Tallies
    max_lsb: int | None
    mismatch_fraction: float | None
    float_nodes: tuple[tuple[str, str, str], ...]
    overflows: dict[str, int]


def evaluate_file(
    model: onnx.ModelProto, reference: Reference, progress: Callable[[int], None] = lambda done: None
) -> FileResult:
    """Run a quantized model both ways over the evaluation samples."""
    program, session = load_program(model), Session(model)
    runtime: Tallies = {name: Tally() for name in reference.outputs}
    emulator: Tallies = {name: Tally() for name in reference.outputs}
    worst, different, total, done = 0, 0, 0, 0
    overflows: Counter[str] = Counter()

    def both(item: tuple[Batch, dict[str, Array]]) -> tuple[dict[str, Array], Result]:
        return session.run(item[0].inputs), program.run_codes(item[0].inputs)

    for (batch, expected), (outputs, emulated) in in_order(both, reference):
        _count(runtime, outputs, expected, batch)
        _count(emulator, emulated.outputs, expected, batch)
        for name, codes in emulated.codes.items():
            lsb = lsb_difference(outputs[name], emulated.outputs[name], float(codes.params.scale))
            worst, total = max(worst, int(lsb.max(initial=0))), total + lsb.size
            different += int(np.count_nonzero(lsb))
        overflows.update(emulated.overflows)
        done += len(batch.index)
        progress(done)
    return FileResult(
        runtime=runtime,
        emulator=emulator,
        max_lsb=worst if total else None,
        mismatch_fraction=different / total if total else None,
        float_nodes=program.float_nodes,
        overflows=dict(+overflows),
    )


def _count(tallies: Tallies, outputs: Mapping[str, Array], expected: Mapping[str, Array], batch: Batch) -> None:
    for name, tally in tallies.items():
        tally.add(batch.real(outputs[name]), expected[name], batch.labels)
