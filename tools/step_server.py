"""One measured piece of work at a time, on request: what the processes of `bench_step.py` do.

A process writes one JSON line when it is ready. Then it reads the names of jobs from standard input, one a line, does
each, and answers each with a JSON line:

    {"ms": time, "cpu_ms": time on a core, "queued_ms": time ready to run but without a core,
     "value": what the job returned, "peak_mb": the largest resident memory of this process so far}

The second and third time are sums over all threads. What is queued tells of other processes that took the cores. A
process that is stopped by a signal is neither on a core nor queued: then the first time exceeds the sum of the others.

Standard library alone: the process may run in an interpreter without onnxqt. Linux alone: memory is VmHWM of
/proc/self/status, queueing is in /proc/self/task/*/schedstat. (The maximum that getrusage knows may be that of the
process this one was started from.)
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO


def take_report() -> TextIO:
    """Standard output for the answers alone; whatever else is printed from now on goes to standard error."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return report


def serve(jobs: Mapping[str, Callable[[], float]], report: TextIO) -> None:
    """Do what is asked for until standard input ends."""
    _send(report, {"ready": True})
    for line in sys.stdin:
        queued, cpu, start = queued_ms(), time.process_time(), time.perf_counter()
        value = jobs[line.strip()]()
        taken, worked = time.perf_counter() - start, time.process_time() - cpu
        times = {"ms": 1e3 * taken, "cpu_ms": 1e3 * worked, "queued_ms": queued_ms() - queued}
        _send(report, {**times, "value": value, "peak_mb": peak_mb()})


def peak_mb() -> float:
    """The largest resident memory of this process so far, in units of 1e6 bytes."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    if found is None:
        raise OSError("/proc/self/status has no VmHWM")
    return int(found[1]) * 1024 / 1e6


def queued_ms() -> float:
    """For how long the threads of this process have been ready to run without a core, in all."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            total += int(file.read_text().split()[1])
    return total / 1e6


def _send(report: TextIO, message: Mapping[str, object]) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()
