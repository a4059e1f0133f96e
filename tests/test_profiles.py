"""Back ends as data, and profiles from files."""

import dataclasses
from pathlib import Path

import onnx
import pytest

from onnxqt.errors import UsageError
from onnxqt.profiles import PROFILES, Accumulator, Arithmetic, Policy, parse_precision, profile_text, read_profile


def written(folder: Path, text: str, name: str = "npu.toml") -> Path:
    path = folder / name
    path.write_text(text, "utf-8")
    return path


# --- the rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROFILES)
def test_row_is_consistent(name: str) -> None:
    profile = PROFILES[name]
    policy = profile.policy
    assert profile.name == name
    assert profile.title
    assert profile.source
    assert policy.precisions
    assert [str(parse_precision(precision)) for precision in policy.precisions] == list(policy.precisions)
    assert not parse_precision(policy.precisions[0]).dynamic
    assert all(onnx.defs.has(operator) for operator in (*policy.operators, *policy.fixed_outputs))
    assert len(set(policy.operators)) == len(policy.operators)
    assert set(policy.fixed_outputs) <= set(policy.operators)
    assert not (policy.narrow and not policy.symmetric)
    assert profile.evidence in ("validated", "modelled")
    assert bool(profile.assumed) == (profile.evidence == "modelled")


@pytest.mark.parametrize("name", PROFILES)
def test_row_obeys_the_rules_for_files(name: str, tmp_path: Path) -> None:
    """Each value is one that its type allows; and the file that is printed is the profile."""
    profile = read_profile(written(tmp_path, profile_text(PROFILES[name])))
    assert profile == dataclasses.replace(PROFILES[name], evidence="modelled")


@pytest.mark.parametrize("name", ["w8", "w9a8", "w8a5", "w8a8-dynamic", "W8A8", "w8a8-sym-pc", ""])
def test_unknown_precision(name: str) -> None:
    with pytest.raises(UsageError, match=f"unknown precision '{name}': expected w.*such as w8a8 or w8a8-dyn"):
        parse_precision(name)


# --- files ----------------------------------------------------------------------------------------------


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    profile = read_profile(written(tmp_path, ""))
    assert (profile.name, profile.evidence, profile.source) == ("npu", "modelled", "npu.toml")
    assert (profile.policy, profile.arithmetic) == (Policy(), Arithmetic())


def test_file_changes_its_base(tmp_path: Path) -> None:
    text = """
        base = "tflite_ref"
        title = "NPU é 24 bits"
        [policy]
        operators = ["Conv", "Relu"]
        [policy.fixed_outputs]
        Sigmoid = [1, -128]
        [arithmetic]
        product = "fixed16_away"
        batched = "xnnpack"
        depthwise = ""
        table = "float"
        [arithmetic.accumulator]
        bits = 24
        overflow = "saturate"
    """
    profile, base = read_profile(written(tmp_path, text)), PROFILES["tflite_ref"]
    assert profile == dataclasses.replace(
        base,
        name="npu",
        title="NPU é 24 bits",
        evidence="modelled",
        policy=dataclasses.replace(base.policy, operators=("Conv", "Relu"), fixed_outputs={"Sigmoid": (1.0, -128)}),
        arithmetic=dataclasses.replace(
            base.arithmetic,
            product="fixed16_away",
            batched="xnnpack",
            table="float",
            accumulator=Accumulator(24, "saturate"),
        ),
    )


BAD: dict[str, tuple[str, str]] = {
    "unknown-base": ('base = "tpu"', "base is 'tpu', which is no profile: name one of tflite_ref, "),
    "base-of-another-type": ("base = 3", "base is 3, which is no profile"),
    "unknown-key": ('colour = "red"', "unknown key 'colour' = 'red': allowed here is name, title, source, policy"),
    "evidence": ('evidence = "validated"', "unknown key 'evidence' = 'validated'"),
    "unknown-key-of-policy": ("[policy]\nrange = 1", "unknown key 'policy.range' = 1: allowed here is precisions, "),
    "unknown-key-of-accumulator": ("[arithmetic.accumulator]\nwidth = 1", "unknown key 'arithmetic.accumulator.width'"),
    "no-table": ('policy = "minmax"', r"policy is 'minmax': expected a table \[policy\]"),
    "unknown-rule": (
        '[arithmetic]\nproduct = "magic"',
        "arithmetic.product is 'magic': expected one of 'float32_even', 'float32_away', .*'shift_up'",
    ),
    "rule-of-another-operator": ('[arithmetic]\nadd = "dpu"', "arithmetic.add is 'dpu': expected one of 'ort', 'tfl"),
    "rule-of-16-bits": (
        '[arithmetic]\nproduct16 = "x"',
        "product16 is 'x': expected one of 'float32_even', .*'openvino', ''$",
    ),
    "rule-of-two-activations": (
        '[arithmetic]\nbatched = "x"',
        "batched is 'x': expected one of .*, '', 'none', 'xnnpack'$",
    ),
    "xnnpack-of-a-constant-matrix": (
        '[arithmetic]\ndense = "xnnpack"',
        "dense is 'xnnpack': expected one of 'float32_",
    ),
    "none-of-a-product": ('[arithmetic]\ngrouped = "none"', "grouped is 'none': expected one of 'float32_even'"),
    "rule-of-transfers": ('[arithmetic]\ntransfer = "even"', "transfer is 'even': expected one of 'ort', 'xnnpack', "),
    "rule-of-resizing": (
        '[arithmetic]\nresize = "ruy"',
        "arithmetic.resize is 'ruy': expected one of 'tflite', 'xnnpack', 'float'$",
    ),
    "rounding-of-tables": (
        '[arithmetic]\ntable = "affine"',
        "table is 'affine': expected one of 'even', 'away', 'up', 'tflite', 'xnnpack', 'float'$",
    ),
    "rounding-of-floats": (
        '[arithmetic]\nquantize = "float"',
        "quantize is 'float': expected one of 'even', 'away', 'up', 'affine'$",
    ),
    "field-of-before": (
        "[arithmetic]\nfloat_bias = true",
        "unknown key 'arithmetic.float_bias' = True: allowed here is",
    ),
    "rule-is-a-number": ("[arithmetic]\nadd = 3", "arithmetic.add is 3: expected one of 'ort'"),
    "rule-is-a-list": ("[arithmetic]\nadd = []", r"arithmetic.add is \[\]: expected one of 'ort'"),
    "unknown-choice": ('[policy]\nranges = "best"', "policy.ranges is 'best': expected one of 'minmax', 'percentile'"),
    "no-truth": ("[policy]\nsigned = 1", "policy.signed is 1: expected true or false"),
    "no-whole-number": (
        "[arithmetic.accumulator]\nbits = 24.0",
        "arithmetic.accumulator.bits is 24.0: expected a whole number from 16 to 64",
    ),
    "truth-for-a-number": ("[arithmetic.accumulator]\nbits = true", "bits is True: expected a whole number"),
    "truth-for-bits": ("[arithmetic.accumulator]\npair_bits = true", "pair_bits is True: expected a whole number"),
    "too-few-bits": ("[arithmetic.accumulator]\nbits = 8", "bits is 8: expected a whole number from 16 to 64"),
    "negative-bits": ("[arithmetic.accumulator]\npair_bits = -1", "pair_bits is -1: expected a whole number from 0"),
    "no-text": ("title = 3", "title is 3: expected text in one line"),
    "two-lines": (r'title = "a\nb"', r"title is 'a\\nb': expected text in one line"),
    "no-list": ('[policy]\noperators = "Conv"', "policy.operators is 'Conv': expected a list of names"),
    "list-of-numbers": ("[policy]\noperators = [1]", r"policy.operators is \[1\]: expected a list of names"),
    "unknown-operator": (
        '[policy]\noperators = ["Conv", "Convolution"]',
        "policy.operators has 'Convolution': expected names of ONNX operators, such as Conv",
    ),
    "unknown-operator-of-a-grid": ("[policy.fixed_outputs]\nSig = [1.0, 0]", "policy.fixed_outputs has 'Sig'"),
    "grid-without-zero-point": ("[policy.fixed_outputs]\nTanh = [1.0]", r"fixed_outputs is .*: expected a table of \["),
    "grid-of-scale-0": ("[policy.fixed_outputs]\nTanh = [0.0, 0]", r"fixed_outputs is .*: expected a table of \["),
    "grid-of-scale-nan": ("[policy.fixed_outputs]\nTanh = [nan, 0]", r"fixed_outputs is .*: expected a table of \["),
    "grid-beyond-8-bits": ("[policy.fixed_outputs]\nTanh = [1.0, 256]", r"fixed_outputs is .*: expected a table of \["),
    "grids-in-a-list": ("[policy]\nfixed_outputs = []", r"fixed_outputs is \[\]: expected a table of"),
    "no-precision": ("[policy]\nprecisions = []", r"policy.precisions is \[\]: expected at least one, such as w8a8"),
    "unknown-precision": ('[policy]\nprecisions = ["w9a8"]', "policy.precisions: unknown precision 'w9a8': expected"),
    "name-of-a-path": ('name = "../x"', r"name is '\.\./x': expected up to 64 letters"),
    "no-toml": ("base = = 1", "is not TOML: .*; see 'onnxqt profiles NAME' for one"),
    "nested": ("x = " + "[" * 5000, "is not TOML"),
    "huge": ("#" * (1 << 20) + "\n", "has more than 1 MiB: give the TOML file of a profile"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_one_line_that_says_what_is_allowed(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    path = written(tmp_path, text)
    with pytest.raises(UsageError, match=message) as caught:
        read_profile(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_long_values_are_cut(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"add is 'x{56}\.\.\.: expected"):
        read_profile(written(tmp_path, f'[arithmetic]\nadd = "{"x" * 500}"'))


def test_name_of_a_file_that_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name is 'my npu': expected"):
        read_profile(written(tmp_path, "", "my npu.toml"))


def test_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "npu.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"npu\.toml' is not TOML"):
        read_profile(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the profile '.*no\.toml' \(No such file.*\): give a TOML file"):
        read_profile(tmp_path / "no.toml")
    with pytest.raises(UsageError, match=r"cannot read the profile .*: give a TOML file"):
        read_profile(tmp_path)
