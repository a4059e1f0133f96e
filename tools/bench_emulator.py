"""How fast the emulator is: one quantized file under every profile, beside ONNX Runtime, in one run.

    python tools/bench_emulator.py FILE --data DIR [--profile NAME]... [--threads 2]

Prints Markdown: seconds for all samples of DIR and their ratio to ONNX Runtime's, both on the same threads, the median
of three rounds in turn; and the peak memory of a process that holds all samples, both programs and nothing else.
"""

import argparse
import pathlib
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from onnxqt.data import InputSpec, open_samples
from onnxqt.emulate import load_program
from onnxqt.profiles import PROFILES
from onnxqt.runtime import Session

BATCH = 64
ROUNDS = 3


def seconds(run: Callable[[Mapping[str, Any]], object], batches: list[Mapping[str, Any]], threads: int) -> float:
    """Time of all batches, several at once."""
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(run, batches):
            pass
    return time.perf_counter() - started


def row(args: argparse.Namespace, name: str) -> str:
    """The measurements of one profile."""
    emulated = load_program(args.file, PROFILES[name].arithmetic)
    specs = [InputSpec(name, np.dtype(dtype), shape or ()) for name, (dtype, shape) in emulated.inputs.items()]
    batches = [batch.inputs for batch in open_samples(args.data, specs).take(args.samples).batches(BATCH)]
    runtime = Session(args.file, threads=args.threads)  # its threads share each batch
    emulated.run(batches[0])
    runtime.run(batches[0])
    pairs = [(seconds(emulated.run, batches, args.threads), seconds(runtime.run, batches, 1)) for _ in range(ROUNDS)]
    ours, theirs = (statistics.median(pair[i] for pair in pairs) for i in (0, 1))
    ratio = statistics.median(a / b for a, b in pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"| {name} | {ours:.1f} | {theirs:.1f} | {ratio:.2f} | {peak:.0f} |"


def main() -> None:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--profile", action="append", choices=list(PROFILES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)  # one profile in a process of its own
    args = parser.parse_args()
    if args.row:
        print(row(args, args.profile[0]))
        return
    print(f"{args.file.name}, {args.samples} samples, {args.threads} threads\n")
    print("| profile | seconds | ONNX Runtime, seconds | ratio | peak memory, MB |")
    print("|---|--:|--:|--:|--:|", flush=True)
    common = [sys.executable, __file__, str(args.file), "--data", str(args.data), "--row"]
    common += ["--threads", str(args.threads), "--samples", str(args.samples)]
    for name in args.profile or PROFILES:
        subprocess.run([*common, "--profile", name], check=True)


if __name__ == "__main__":
    main()
