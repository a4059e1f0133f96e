"""Batches on several threads, counted in order."""

import threading
import time
from collections.abc import Iterator, Mapping

import numpy as np
import pytest
from conftest import Digits

from onnxqt import evaluate as module
from onnxqt.evaluate import Reference, evaluate, evaluate_file, in_order
from onnxqt.numerics import Array
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme


def slow_first(item: int) -> int:
    time.sleep(0.02 if item % 3 == 0 else 0)
    return item * item


def test_results_come_in_the_order_of_the_items() -> None:
    assert list(in_order(slow_first, range(20))) == [(item, item * item) for item in range(20)]


def test_nothing_in_order() -> None:
    assert list(in_order(slow_first, [])) == []


def test_items_are_taken_ahead_by_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS", 3)
    taken = []

    def items() -> Iterator[int]:
        for item in range(30):
            taken.append(item)
            yield item

    for done, (item, _) in enumerate(in_order(slow_first, items())):
        assert item == done
        assert len(taken) - done <= 6


def test_items_are_worked_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS", 2)
    both = threading.Barrier(2, timeout=10)  # passes only where two threads meet
    assert len(list(in_order(lambda item: both.wait(), range(6)))) == 6


def test_a_failure_comes_where_its_item_would_have_come() -> None:
    def work(item: int) -> int:
        if item == 5:
            raise LookupError("item 5")
        return item

    seen: list[int] = []
    results = in_order(work, range(50))
    with pytest.raises(LookupError, match="item 5"):
        seen.extend(item for item, _ in results)
    assert seen == [0, 1, 2, 3, 4]


def test_timing_does_not_change_the_sums(torch_digits: Digits) -> None:
    reference = Reference(torch_digits.model, lambda: torch_digits.samples.batches(7))
    session = Session(torch_digits.quantized(parse_scheme("w4a8-sym-pc")))

    def at_its_own_pace(inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        time.sleep(0.01 * (float(inputs["image"].sum()) % 1))
        return session.run(inputs)

    alone = evaluate(session.run, reference)["logits"]
    progress: list[int] = []
    together = evaluate(at_its_own_pace, reference, progress.append)["logits"]
    assert together.fidelity() == alone.fidelity()
    assert progress == [*range(7, 100, 7), 100]


def test_a_file_is_judged_as_batch_by_batch(torch_digits: Digits) -> None:
    reference = Reference(torch_digits.model, lambda: torch_digits.samples.batches(9))
    result = evaluate_file(torch_digits.quantized(parse_scheme("w8a8-sym-pc")), reference)
    assert result.runtime["logits"].samples == result.emulator["logits"].samples == 100
    assert result.max_lsb in (0, 1)
    assert result.emulator["logits"].values == 100 * 10
    assert np.isfinite(result.emulator["logits"].squared_error)
