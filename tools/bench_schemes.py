"""What checkpoints gain under onnxqt's own schemes, in the integer emulator.

    python tools/bench_schemes.py --original MODEL label=CHECKPOINT... --data DIR [--schemes NAME...] [--json FILE]

DIR holds `calib/*.npz` and `eval/*.npz`. Under each scheme every float model is quantized as `onnxqt export --ranges
mse` does it, calibrated on at most 512 samples of `calib`, and run on all samples of `eval`: the original so is PTQ.
Prints Markdown: the share of right samples in percent, the float models first; and of each family of schemes

    mean drop = mean over its schemes of (float of the original - share)

over the schemes in which no model failed. Exit code 1: some scheme failed.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence

from bench_policies import (
    Results,
    as_json,
    caption,
    emulated,
    make_task,
    named_models,
    parser_of,
    reference_of,
    report,
    table,
    tell,
)

from onnxqt.errors import OnnxqtError
from onnxqt.profiles import PROFILES
from onnxqt.schemes import Scheme, parse_scheme

SCHEMES = tuple(
    f"{bits}-{symmetry}-{granularity}"
    for bits in ("w8a8", "w4a8", "w4a4")
    for symmetry in ("sym", "asym")
    for granularity in ("pt", "pc")
)


def _is(weight_bits: int, activation_bits: int) -> Callable[[Scheme], bool]:
    return lambda scheme: (scheme.weight_bits, scheme.activation_bits) == (weight_bits, activation_bits)


def _asym_pc(scheme: Scheme) -> bool:
    return scheme.per_channel and not scheme.symmetric


FAMILIES: Mapping[str, Callable[[Scheme], bool]] = {
    "w8a8": _is(8, 8),
    "w4a8 pc": lambda scheme: _is(4, 8)(scheme) and scheme.per_channel,
    "w4a8 pt": lambda scheme: _is(4, 8)(scheme) and not scheme.per_channel,
    "w4a4 asym pc": lambda scheme: _is(4, 4)(scheme) and _asym_pc(scheme),
    "w4a4 rest": lambda scheme: _is(4, 4)(scheme) and not _asym_pc(scheme),
    "all": lambda scheme: True,
}


def mean_drops(results: Results) -> dict[str, dict[str, float]]:
    """Mean drop from the original's float of each family that has complete rows, by label of the model."""
    target = next(iter(results.floats.values()))
    rows = results.complete
    found = {}
    for family, belongs in FAMILIES.items():
        members = [row for name, row in rows.items() if belongs(parse_scheme(name))]
        if members:
            drops = {label: [target - row[label] for row in members] for label in results.floats}
            found[f"mean drop, {family}"] = {label: math.fsum(each) / len(each) for label, each in drops.items()}
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = parser_of(__doc__)
    parser.add_argument("--original", required=True, metavar="MODEL", help="path or label=path")
    parser.add_argument("checkpoints", nargs="*", metavar="label=CHECKPOINT")
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="NAME", help="default: 12 of them")
    args = parser.parse_args(arguments)
    try:
        schemes = [parse_scheme(name) for name in dict.fromkeys(args.schemes)]
        original = args.original if "=" in args.original else f"original={args.original}"
        models = named_models([original, *args.checkpoints])
        task = make_task(models, args.data, [PROFILES[args.profile]], schemes)
        results = emulated(task, reference_of(task))
        ends = mean_drops(results)
        text = caption(task, results, f"emulated as {args.profile}") + "\n" + table("scheme", results, ends)
        return report(text, as_json(task, results, ends), args.json)
    except OnnxqtError as error:
        tell(f"Error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
