"""Run the whole pipeline on every model of ONNX's own test suites and of the zoo, and say how each one ends.

    python tools/coverage.py --zoo zoo/ --out coverage/ [--sets node,simple,...] [--only NAME] [--resume] [--jobs 1]

Every model is judged in a child process: a crash or a time-out is a row of the result, not the end.

* not runnable: ONNX Runtime itself does not run the float model, neither as it is nor converted to opset 17 or 21;
* passes: inspect, calibrate, trim (20 steps), export and every check of them end well, what ingest made of the
  model computes what the original computes, and the exported file runs and gives finite outputs;
* refused: the package says that it cannot, by an error of its own;
* fails: any other exception, a crash, a time-out, another result of the float model, or an error of the package
  that blames itself: the emulator contradicts a file, the training process died, a pass broke the graph.

Writes COVERAGE.md and coverage.json into the folder `--report`; `--out` gets the models with their inputs and
samples (to run a single one again), `results.jsonl` (for `--resume`) and `failures.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from coverage_judge import Row, judge
from coverage_models import SETS, Case, collect
from coverage_report import failures, summary, write_report

OUTCOMES = ("passes", "refused", "fails", "not runnable")
TIMEOUT = 300.0  # seconds per model
MODELS_PER_WORKER = 150  # then a new process, which returns the memory


# --- child processes ------------------------------------------------------------------------------------


def serve() -> None:
    """Judge the models that standard input names, one JSON list per line; answers are JSON objects per line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(content: Row) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    import onnxqt.pipeline

    answer({"ready": onnxqt.__version__})
    for line in sys.stdin:
        group, name, folder = json.loads(line)
        row = judge(Case(group, name, Path(folder)), lambda stage: answer({"stage": stage}))
        answer({"row": row})


class Worker:
    """A child process that judges models; started anew after a crash, a time-out or many models."""

    def __init__(self, command: Sequence[str], log: Path, timeout: float) -> None:
        self._command, self._log, self._timeout = command, log, timeout
        self._process: subprocess.Popen[str] | None = None
        self._judged = 0

    def judge(self, case: Case) -> Row:
        """The row of one model."""
        started = time.perf_counter()
        process = self._running()
        stage = "run"
        timer = threading.Timer(self._timeout, _kill, (process,))
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps([case.group, case.name, str(case.folder)]) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                answer = json.loads(line)
                if "row" in answer:
                    self._judged += 1
                    return dict(answer["row"])
                stage = answer["stage"]
        except BrokenPipeError:
            pass
        finally:
            timed_out = not timer.is_alive()
            timer.cancel()
        seconds = time.perf_counter() - started
        message = f"no result after {self._timeout:g} s" if timed_out else _obituary(process)
        self.close()
        return {
            "set": case.group,
            "name": case.name,
            "outcome": "not runnable" if stage == "run" else "fails",
            "stage": stage,
            "error": "time-out" if timed_out else "crash",
            "message": message,
            "where": "",
            "seconds": round(seconds, 2),
        }

    def close(self) -> None:
        """End the process and what it started."""
        if self._process is not None:
            _kill(self._process)
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    stream.close()
        self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._judged >= MODELS_PER_WORKER:
            self.close()
        if self._process is None:
            self._judged = 0
            with self._log.open("a") as log:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    start_new_session=True,
                    cwd=self._log.parent,
                )
            assert self._process.stdout
            if "ready" not in self._process.stdout.readline():
                raise SystemExit(f"a child process does not start: see {self._log}")
        return self._process


def _kill(process: subprocess.Popen[str]) -> None:
    """End a child process and the training process that it may have started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _obituary(process: subprocess.Popen[str]) -> str:
    code = process.wait()
    return f"the process was killed by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"


def judge_all(cases: Sequence[Case], workers: Sequence[Worker], done: Callable[[Row], None]) -> None:
    """Judge models, several at a time; `done` gets each row, one at a time."""
    pending: queue.SimpleQueue[Case] = queue.SimpleQueue()
    for case in cases:
        pending.put(case)
    lock = threading.Lock()
    problems: list[BaseException] = []

    def work(worker: Worker) -> None:
        try:
            while not problems:
                try:
                    case = pending.get_nowait()
                except queue.Empty:
                    return
                row = worker.judge(case)
                with lock:
                    done(row)
        except BaseException as error:  # noqa: BLE001 (raised again in the main thread)
            problems.append(error)
        finally:
            worker.close()

    threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


# --- the command line -----------------------------------------------------------------------------------


def main() -> None:
    """Judge the models that the command line asks for."""
    options = _options()
    if options.serve:
        serve()
        return
    out: Path = options.out.resolve()
    groups = [group for group in SETS if group in options.sets.split(",")]
    out.mkdir(parents=True, exist_ok=True)
    cases = [case for group in groups for case in collect(group, out / "models" / group, options.zoo)]
    if options.only:
        cases = [case for case in cases if case.name == options.only]
    results = out / ("only.jsonl" if options.only else "results.jsonl")
    if not options.resume:
        results.unlink(missing_ok=True)
    rows = _read_rows(results)
    known = {(row["set"], row["name"]) for row in rows}
    pending = [case for case in cases if (case.group, case.name) not in known]
    child = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--serve"]
    workers = [Worker(child, out / f"worker-{number}.log", options.timeout) for number in range(options.jobs)]
    with results.open("a") as stream:

        def done(row: Row) -> None:
            rows.append(row)
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            counts = Counter(row["outcome"] for row in rows)
            note = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
            print(f"{len(rows)}/{len(known) + len(pending)}: {note}; {row['set']}/{row['name']}", file=sys.stderr)
            if len(rows) % 100 == 0:
                (out / "failures.md").write_text(failures(rows))

        judge_all(pending, workers, done)
    rows.sort(key=lambda row: (SETS.index(row["set"]), row["name"]))
    if options.only:
        print(json.dumps(rows, indent=1))
        return
    (out / "failures.md").write_text(failures(rows))
    command = f"python tools/zoo.py --out zoo/\npython tools/coverage.py --zoo zoo/ --sets {options.sets}"
    failed = options.zoo / "failed.json"
    write_report(rows, options.report, command, json.loads(failed.read_text()) if failed.exists() else {})
    print("\n".join(summary(rows)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the pipeline ends on ONNX's test models and on the zoo.")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"), help="folder that tools/zoo.py filled")
    parser.add_argument("--out", type=Path, default=Path("coverage"), help="folder for models, samples and results")
    parser.add_argument("--report", type=Path, default=Path("."), help="folder for COVERAGE.md and coverage.json")
    parser.add_argument("--sets", default=",".join(SETS), help="comma-separated, of %(default)s")
    parser.add_argument("--only", help="the name of a single model; prints its row and writes no report")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds per model")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wrong = set(arguments.sets.split(",")) - set(SETS)
    if wrong:
        parser.error(f"--sets names {', '.join(sorted(wrong))}, which is no set: choose of {', '.join(SETS)}")
    if not arguments.serve and "zoo" in arguments.sets.split(",") and not any(arguments.zoo.glob("*.onnx")):
        parser.error(f"--zoo {arguments.zoo} holds no model: run 'python tools/zoo.py --out {arguments.zoo}' first")
    return arguments


def _read_rows(path: Path) -> list[Row]:
    """The rows of an earlier run; a line that was cut off is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


if __name__ == "__main__":
    main()
