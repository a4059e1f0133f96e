"""Presets and TOML files of preprocessing."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from onnxqt.data import PRESETS, Preprocessing, parse_preprocessing
from onnxqt.data.preprocessing import from_plain
from onnxqt.errors import UsageError

FULL = """
base = "imagenet"
resize = [300, 400]
crop = 280
filter = "bicubic"
colour = "bgr"
layout = "hwc"
scale = 0.5
mean = [1, 2.5, 3]
std = 2
dtype = "float16"
"""


def write(folder: Path, text: str) -> str:
    path = folder / "net.toml"
    path.write_text(text)
    return str(path)


def test_presets_by_name() -> None:
    assert set(PRESETS) == {"imagenet", "cifar", "none"}
    for name, preset in PRESETS.items():
        assert parse_preprocessing(name) is preset
        assert preset.name == name
    assert PRESETS["none"] == Preprocessing("none")


def test_every_key_of_a_file(tmp_path: Path) -> None:
    found = parse_preprocessing(write(tmp_path, FULL))
    assert found == Preprocessing(
        "net.toml", (300, 400), (280, 280), "bicubic", "bgr", "hwc", 0.5, (1.0, 2.5, 3.0), (2.0,), "float16"
    )
    keys = {line.split(" = ")[0] for line in FULL.strip().splitlines()}
    assert keys == {field.name for field in fields(Preprocessing)} - {"name"} | {"base"}


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("", {}),
        ("resize = 300", {"resize": (300,)}),
        ("resize = []\ncrop = []", {"resize": (), "crop": ()}),
        ("crop = [3, 4]", {"crop": (3, 4)}),
    ],
)
def test_a_file_changes_its_base(tmp_path: Path, text: str, changes: dict[str, Any]) -> None:
    found = parse_preprocessing(write(tmp_path, f'base = "imagenet"\n{text}'))
    assert found == replace(PRESETS["imagenet"], name="net.toml", **changes)


def test_a_file_without_a_base(tmp_path: Path) -> None:
    assert parse_preprocessing(write(tmp_path, "scale = 2")) == Preprocessing("net.toml", scale=2.0)


@pytest.mark.parametrize("text", ["", FULL, 'base = "cifar"\ncrop = 28'])
def test_plain_data_goes_through_json(tmp_path: Path, text: str) -> None:
    preprocessing = parse_preprocessing(write(tmp_path, text))
    assert from_plain(json.loads(json.dumps(preprocessing.plain()))) == preprocessing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "size = 3",
            r"unknown key 'size' = 3: allowed is base, resize, crop, filter, colour, layout, scale, mean, std",
        ),
        ('name = "x"', r"unknown key 'name' = 'x'"),
        ('base = "torch"', r"base is 'torch': expected one of imagenet, cifar, none"),
        ("base = [1]", r"base is \[1\]: expected one of"),
        ("resize = 0", r"resize is 0: expected pixels from 1 to 16384: one number, \[height, width\] or \[\]"),
        ("resize = 16385", r"resize is 16385: expected pixels"),
        ("resize = 2.5", r"resize is 2.5: expected pixels"),
        ("resize = true", r"resize is True: expected pixels"),
        ("crop = [1, 2, 3]", r"crop is \[1, 2, 3\]: expected pixels"),
        ("crop.x = 3", r"crop is \{'x': 3\}: expected pixels"),
        ('filter = "lanczos"', r"filter is 'lanczos': expected one of nearest, bilinear, bicubic"),
        ('colour = ["rgb"]', r"colour is \['rgb'\]: expected one of rgb, bgr, grey"),
        ("layout = 3", r"layout is 3: expected one of chw, hwc, hw"),
        ("scale = 0", r"scale is 0: expected a number other than 0"),
        ("scale = nan", r"scale is nan: expected a number"),
        ("scale = [1]", r"scale is \[1\]: expected a number"),
        (f"scale = 1{'0' * 400}", r"scale is 1000.*\.\.\.: expected a number"),
        ("mean = []", r"mean is \[\]: expected one number, or one per channel"),
        ("mean = [1, 2]", r"mean is \[1, 2\]: expected one number"),
        ("mean = [1, 2, inf]", r"mean is \[1, 2, inf\]: expected"),
        ("std = [1, 2, 0]", r"std is \[1, 2, 0\]: expected one positive number"),
        ('dtype = "int16"', r"dtype is 'int16': expected one of float32"),
        ("resize = ", r"is not TOML: .*; write lines such as 'resize = 256'"),
        ("x = " + "[" * 5000, r"is not TOML: "),
        ("#" * (1 << 17), r"has more than 64 KiB: give the TOML file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"'.*net\.toml'.*{message}") as error:
        parse_preprocessing(write(tmp_path, text))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_what_is_neither_a_preset_nor_a_file(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"unknown preprocessing 'vgg': give a TOML file or one of imagenet, cifar, no"
    ):
        parse_preprocessing("vgg")
    with pytest.raises(UsageError, match=r"cannot read the preprocessing '.*no\.toml' \(No such file"):
        parse_preprocessing(str(tmp_path / "no.toml"))


def test_plain_data_is_checked() -> None:
    with pytest.raises(UsageError, match=r"the preprocessing: resize is \['a'\]: expected pixels"):
        from_plain({"name": "p", "resize": ["a"]})
    with pytest.raises(UsageError, match=r"the preprocessing: unknown key 'module' = 'os'"):
        from_plain({"name": "p", "module": "os"})
