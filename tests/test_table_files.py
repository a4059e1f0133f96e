"""A table as files: read back bit by bit, edited by hand, and by people who mean no good."""

import json
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from table_cases import SCHEMES, entry, net, table

from onnxqt.errors import ExportError
from onnxqt.files import file_sha256
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.table import (
    Entry,
    NodeRef,
    Stats,
    Table,
    View,
    files,
    read_table,
    reading,
    table_quantizers,
    write_table,
)
from onnxqt.table.encode import json_text
from onnxqt.table.views import same_params

SCHEMA = json.loads((Path(files.__file__).parent / "table.schema.json").read_text())

Json = dict[str, Any]
Edit = Callable[[Json], object]


def odd() -> Table:
    """What no calibration of the small network gives: blocks, powers of two, 16 bits, strange names, odd numbers."""
    scales = np.random.default_rng(0).integers(1, 0x7F800000, 400, np.uint32).view(np.float32)  # any positive float32
    blocks = np.float32(2.0) ** -np.arange(6, dtype=np.float32).reshape(3, 2)
    points = np.arange(6, dtype=np.int32).reshape(3, 2)
    views = (
        View(("a",), QParams(blocks, points, Grid(4, signed=False), 1, 2)),
        View(("b", "c"), QParams(scales[:3], np.zeros(3, np.int32), Grid(16, signed=True, narrow=True), 0)),
    )
    stats = Stats(
        7, -0.1, 1 / 3, {0.5: 0.1, 1e-05: 0.3, 1.25e-7: 1.0, 0.999999999999999: 2.0}, np.array([0.5, 2.0, 4.5]), 0.75
    )
    many = View(("a",), QParams(scales, np.zeros(400, np.int32), Grid(3, signed=True), 0))
    shifts = np.arange(400, dtype=np.int32) % 8
    shifted = View(("b",), QParams(scales, shifts, Grid(3, signed=False), 0))
    return Table(
        (
            Entry("b\n'\"é/ 0", "weight", (3, 4), None, (NodeRef("n", "Conv", 1),), aliases={"rknn": "z", "mnn": "y"}),
            Entry("w", "weight", (3, 4), views=views, stats=stats, source="user", rounding="adaround"),
            Entry("many", "weight", (400,), views=(many, shifted), sha256="0" * 64),
            Entry("huge", "activation", None, stats=Stats(2, -1e308, 5e-324, {}, np.array([2.0**40, 3]), 1.0)),
        ),
        ("a", "b", "c"),
        producer="x",
    )


def equal(one: Any, other: Any) -> bool:
    """Bit by bit, arrays and what holds them."""
    if isinstance(one, QParams):
        return (
            same_params(one, other)
            and (one.scale.dtype, one.zero_point.dtype) == (other.scale.dtype, other.zero_point.dtype)
            and one.scale.shape == other.scale.shape
            and one.scale.tobytes() == other.scale.tobytes()
        )
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, Table | Entry | View | Stats):
        return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    if isinstance(one, tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize("made", [table, odd])
def test_a_table_reads_back_bit_by_bit(made: Callable[[], Table], tmp_path: Path) -> None:
    """Among them scales of every exponent of float32, subnormal ones as well."""
    write_table(made(), tmp_path / "table.json")
    assert equal(made(), read_table(tmp_path / "table.json"))


def test_equal_tells_tables_apart() -> None:
    views = odd().entries[1].views
    params = replace(views[1].params, scale=np.nextafter(views[1].params.scale, np.float32(9)))
    changed = replace(odd().entries[1], views=(views[0], replace(views[1], params=params)))
    assert not equal(odd().entries[1], changed)
    assert not equal(odd(), replace(odd(), samples=1))


@pytest.mark.parametrize("made", [table, odd])
def test_the_same_table_gives_the_same_bytes(made: Callable[[], Table], tmp_path: Path) -> None:
    written = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        paths = write_table(made(), tmp_path / name / "table.json")
        assert [path.name for path in paths] == ["table.json", "table.safetensors"]
        written.append([path.read_bytes() for path in paths])
        again = write_table(read_table(paths[0]), tmp_path / name / "again.json")
        assert [path.read_bytes() for path in again] == written[-1]
    assert written[0] == written[1]
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("made", [table, odd])
def test_the_file_follows_its_schema(made: Callable[[], Table], tmp_path: Path) -> None:
    write_table(made(), tmp_path / "table.json")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads((tmp_path / "table.json").read_text()), SCHEMA)


def test_the_order_of_aliases_does_not_matter(tmp_path: Path) -> None:
    written = []
    for aliases in ({"mnn": "1", "rknn": "2"}, {"rknn": "2", "mnn": "1"}):
        write_table(Table((Entry("x", "input", aliases=aliases),), ()), tmp_path / "t.json")
        written.append((tmp_path / "t.json").read_bytes())
    assert written[0] == written[1]


def test_biases_have_no_clip(tmp_path: Path) -> None:
    content = json.loads(written(tmp_path).read_text())
    clips = {found["name"]: ["clip" in shown for shown in found["qparams"]] for found in content["tensors"]}
    assert clips["b"] == [False] * 5
    assert clips["w"] == [True] * 3


def test_a_small_table_is_one_file(tmp_path: Path) -> None:
    small = Table(odd().entries[1:2], ("a", "b", "c"))
    assert write_table(small, tmp_path / "t.json") == [tmp_path / "t.json"]
    assert equal(small, read_table(tmp_path / "t.json"))


def test_large_arrays_lie_beside_the_file_and_what_follows_from_them_nowhere(tmp_path: Path) -> None:
    write_table(table(), tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    found = next(tensor for tensor in content["tensors"] if tensor["name"] == "k")
    index = content["tensors"].index(found)
    assert found["qparams"][0]["scale"] == {"$ref": f"{index}.0.scale"}
    assert not {"clip", "scale_f32_hex", "zero_point"} & set(found["qparams"][0])
    arrays = load_file(tmp_path / "table.safetensors")
    params = entry("k").views[0].params
    np.testing.assert_array_equal(arrays[f"{index}.0.scale"], params.scale)
    assert {key.split(".")[-1] for key in arrays} == {"counts", "scale"}
    assert arrays["0.counts"].dtype == np.uint32


def test_scales_have_the_bits_and_the_clip_of_their_float32(tmp_path: Path) -> None:
    write_table(odd(), tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    blocks, channels = content["tensors"][1]["qparams"]
    assert blocks["scale"] == [[1.0, 0.5], [0.25, 0.125], [0.0625, 0.03125]]
    assert blocks["pow2_exponent"] == [[0, -1], [-2, -3], [-4, -5]]
    assert blocks["scale_f32_hex"] == ["3f800000", "3f000000", "3e800000", "3e000000", "3d800000", "3d000000"]
    assert blocks["clip"]["min"] == [[0.0, -0.5], [-0.5, -0.375], [-0.25, -0.15625]]
    assert blocks["clip"]["max"] == [[15.0, 7.0], [3.25, 1.5], [0.6875, 0.3125]]
    assert (blocks["granularity"], blocks["symmetric"], channels["symmetric"]) == ("block", False, True)
    assert (channels["qmin"], channels["qmax"], channels["pow2_exponent"]) == (-32767, 32767, None)
    scale = odd().entries[1].views[1].params.scale
    assert channels["scale_f32_hex"] == [struct.pack(">f", value).hex() for value in scale]
    assert channels["clip"]["max"] == [float(str(value)) for value in np.float32(32767) * scale]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_clip_gives_its_scale_back(scheme: str) -> None:
    """(hi - lo) / steps: two ends and the quotient are each rounded once, so it is off by at most one unit."""
    for found in table().entries:
        params = found.params(scheme)
        if params is None or found.role == "bias":
            continue
        low, high = View((scheme,), params).clip
        steps = 2 * params.grid.qmax if params.grid.signed else params.grid.qmax - params.grid.qmin
        again = ((high.astype(np.float64) - low) / steps).astype(np.float32)
        np.testing.assert_array_max_ulp(again, params.scale, maxulp=1)


# --- edited by hand -------------------------------------------------------------------------------------


def written(folder: Path, change: Edit = lambda content: None) -> Path:
    """The table's files, after a change to the JSON file."""
    path = folder / "table.json"
    write_table(table(), path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


def tensor(name: str, change: Edit) -> Edit:
    def edit(content: Json) -> None:
        change(next(found for found in content["tensors"] if found["name"] == name))

    return edit


def view(change: Edit, name: str = "y", index: int = 0) -> Edit:
    return tensor(name, lambda found: change(found["qparams"][index]))


def edited(folder: Path, change: Edit, scheme: str = "w8a8-sym-pc", name: str = "y") -> QParams:
    params = entry(name, read_table(written(folder, change))).params(scheme)
    assert params is not None
    return params


def drop(*names: str, **values: Any) -> Edit:
    def edit(found: Json) -> None:
        for name in names:
            del found[name]
        found.update(values)

    return edit


def test_an_edited_scale_counts_once_what_follows_from_it_is_deleted(tmp_path: Path) -> None:
    params = edited(tmp_path, view(drop("clip", "scale_f32_hex", scale=[0.1])))
    assert (float(params.scale), int(params.zero_point)) == (float(np.float32(0.1)), 0)
    assert params.scale.shape == ()


@pytest.mark.parametrize(
    ("index", "scheme", "low", "high", "scale", "zero_point"),
    [
        (0, "w8a8-sym-pc", -12.7, 12.7, 0.1, 0),
        (0, "w8a8-sym-pc", -12.8, 12.7, 12.8 / 127, 0),  # 'symmetric' is still there
        (1, "w8a8-asym-pc", -2.5, 23.0, 0.1, 25),
        (1, "w8a8-asym-pc", 3.0, 25.5, 0.1, 0),  # zero is always inside
    ],
)
def test_an_edited_clip_gives_the_scale(
    index: int, scheme: str, low: float, high: float, scale: float, zero_point: int, tmp_path: Path
) -> None:
    clip = {"min": [low], "max": [high]}
    params = edited(tmp_path, view(drop("scale", "scale_f32_hex", "zero_point", clip=clip), index=index), scheme)
    assert (int(params.zero_point), params.scale.shape) == (zero_point, ())
    assert params.scale.dtype == np.float32
    np.testing.assert_array_max_ulp(params.scale, np.float32(scale), maxulp=1)


def test_an_edited_clip_of_channels(tmp_path: Path) -> None:
    clip = {"min": [-127.0 * n for n in range(1, 6)], "max": [127.0 * n for n in range(1, 6)]}
    params = edited(tmp_path, view(drop("scale", "scale_f32_hex", "pow2_exponent", clip=clip), "u"), name="u")
    np.testing.assert_array_equal(params.scale, np.arange(1, 6, dtype=np.float32))


def test_without_symmetric_a_lopsided_clip_of_signed_codes_has_a_zero_point(tmp_path: Path) -> None:
    clip = {"min": [-2.8], "max": [22.7]}
    params = edited(tmp_path, view(drop("scale", "scale_f32_hex", "zero_point", "symmetric", clip=clip)))
    np.testing.assert_array_max_ulp(params.scale, np.float32(0.1), maxulp=1)
    assert params.zero_point == -100


def test_a_clip_may_miss_its_scale_by_a_hundredth_of_a_step(tmp_path: Path) -> None:
    scale = float(edited(tmp_path, view(drop())).scale)
    clip = {"min": [-127.009 * scale], "max": [127.009 * scale]}
    assert edited(tmp_path, view(drop(clip=clip))).scale == np.float32(scale)
    clip = {"min": [-127.011 * scale], "max": [127.011 * scale]}
    with pytest.raises(ExportError, match="'scale' and 'clip' disagree"):
        edited(tmp_path, view(drop(clip=clip)))


def test_biases_follow_the_scales_of_their_operands(tmp_path: Path) -> None:
    change = view(drop("clip", "scale_f32_hex", scale=[0.25]), "x")
    read = read_table(written(tmp_path, change))
    bias, weight = entry("b", read).params("w4a8-sym-pc"), entry("w", read).params("w4a8-sym-pc")
    assert bias is not None
    assert weight is not None
    np.testing.assert_array_equal(bias.scale, np.float32(0.25) * weight.scale)


def test_fields_that_follow_may_all_be_left_out(tmp_path: Path) -> None:
    """A view of scale, zero point and width alone is the same view; so is the rest of an entry."""
    kept = ("schemes", "bits", "signed", "narrow", "axis", "scale", "zero_point")

    def bare(content: Json) -> None:
        for name in ("producer", "numerics", "calibration"):
            del content[name]
        for found in content["tensors"]:
            del found["quantize"]
            found["qparams"] = [{key: shown[key] for key in kept if key in shown} for shown in found["qparams"]]

    read = read_table(written(tmp_path, bare))
    assert equal(read.entries, table().entries)
    assert (read.producer, read.samples) == ("", 0)


def test_an_entry_needs_only_its_name_role_and_views(tmp_path: Path) -> None:
    content = {
        "format": "onnxqt.quant_table",
        "version": "1.0",
        "schemes": ["s"],
        "tensors": [
            {
                "name": "x",
                "role": "input",
                "qparams": [{"schemes": ["s"], "bits": 8, "signed": True, "qmin": -127, "scale": [1]}],
            }
        ],
    }
    jsonschema.validate(content, SCHEMA)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    found = entry("x", read_table(path))
    assert found.source == "user"
    assert found.views[0].params.grid == Grid(8, signed=True, narrow=True)


def test_quantizers_of_an_edited_table(tmp_path: Path) -> None:
    read = read_table(written(tmp_path, view(drop("clip", "scale_f32_hex", scale=[0.5]))))
    quantizers = table_quantizers(read, net().plan, "w8a8-sym-pc")
    assert quantizers.activations["y"].scale == np.float32(0.5)
    assert same_params(quantizers.activations["x"], net().quantizers("w8a8-sym-pc").activations["x"])


# --- refused --------------------------------------------------------------------------------------------


def reference(name: str, key: Any) -> Edit:
    return lambda found: found.update({name: {"$ref": key}})


def histogram(**changes: Any) -> Edit:
    return tensor("y", lambda found: found["stats"]["hist"].update(changes))


def put(**changes: Any) -> Edit:
    return lambda content: content.update(changes)


HOSTILE: list[tuple[Edit, str]] = [
    (put(format="other"), "is not a table of version 1.0 of onnxqt.quant_table: give a table"),
    (put(version="2.0"), "is not a table of version 1.0"),
    (put(tensors={}), "table.json': 'tensors' must be a list of objects, not {}: correct the entry"),
    (put(tensors=[3]), r"'tensors' must be a list of objects, not \[3\]"),
    (put(more=1), "there is no field 'more'"),
    (lambda content: content.pop("schemes"), "'schemes' is missing"),
    (put(schemes=["a", "a"]), "'schemes' has one twice"),
    (put(schemes=["a"]), "tensor 'x': scheme 'w8a8-sym-pc' is not among the table's 'schemes'"),
    (put(numerics={"rounding": "up"}), "'numerics' must be"),
    (put(model={"opset": -1}), "model: 'opset' must be a whole number of at least 0, not -1"),
    (put(producer=[]), r"'producer' must be an object, not \[\]"),
    (put(arrays_sha256="../../x"), "'arrays_sha256' must be 64 hexadecimal digits or null, not '../../x'"),
    (put(arrays_sha256="0" * 64), "the file of arrays beside it is not the one that 'arrays_sha256' names"),
    (put(arrays_sha256=None), "'counts' refers to an array, but the table has no 'arrays_sha256'"),
    (lambda content: content["tensors"].append(content["tensors"][0]), "activation x is listed twice"),
    (lambda content: content["tensors"][0].pop("name"), "tensor 0: 'name' is missing"),
    (lambda content: content["tensors"][0].update(name=""), "tensor '': 'name' must be a text that is not empty"),
    (lambda content: content["tensors"][0].update(name=["x"] * 99), "tensor 0: 'name' must be a text that is not"),
    (tensor("y", put(role="state")), "tensor 'y': 'role' must be one of input, activation, output, weight, bias, not"),
    (tensor("y", put(shape=[-1])), r"'shape' must be null or a list of lengths, null where free, not \[-1\]"),
    (tensor("y", put(consumers=[{"node": "n"}])), "tensor 'y', consumers: 'op' is missing"),
    (tensor("y", put(aliases={"mnn": 3})), "'aliases' must be an object, each value a text that is not empty"),
    (tensor("y", put(quantize=False)), "'quantize' contradicts 'qparams'"),
    (tensor("y", put(product_of=["x"])), "'product_of' must name an activation and a weight"),
    (tensor("y", put(sha256="ab")), "'sha256' must be 64 hexadecimal digits or null"),
    (tensor("y", put(qparams=[1])), "'qparams' must be a list of objects"),
    (tensor("y", lambda found: found["qparams"].append(found["qparams"][0])), "two of its qparams are for one scheme"),
    (tensor("y", lambda found: found["stats"].update(min=9e9)), "stats: 'min' is larger than 'max'"),
    (tensor("y", lambda found: found["stats"].update(absmax=1)), "'absmax' contradicts 'min' and 'max'"),
    (tensor("y", lambda found: found["stats"].update(quantiles={"half": 1})), "'quantiles' must have shares such as"),
    (tensor("y", lambda found: found["stats"].update(quantiles={"nan": 1})), "'quantiles' must have shares such as"),
    (tensor("y", lambda found: found["stats"].update(quantiles={"1.5": 1})), "'quantiles' must have shares such as"),
    (tensor("y", lambda found: found["stats"].update(min=True)), "'min' must be a finite number, not True"),
    (histogram(lo=0), "hist: 'lo' must be minus 'hi', and 'hi' more than 0"),
    (histogram(bins=3), "hist: 'counts' must be as many numbers of at least 0 as 'bins' says"),
    (histogram(bins=2, counts=[-1, 1]), "'counts' must be as many numbers of at least 0"),
    (view(drop("bits")), "tensor 'y', qparams 0: 'bits' is missing"),
    (view(put(bits=1)), "'bits' must be a whole number from 2 to 32, not 1"),
    (view(put(bits=True)), "'bits' must be a whole number from 2 to 32, not True"),
    (view(put(qmax=99)), "'qmin' and 'qmax' must be -128 and 127, those of its bits"),
    (view(put(scales=[1])), "there is no field 'scales'"),
    (view(put(scale=[])), "'scale' must be a list, each a finite number"),
    (view(put(scale="0.1")), "'scale' must be a list of numbers or"),
    (view(put(scale=["0.1"])), "'scale' must be a list, each a finite number"),
    (view(put(scale=[[1], [1, 2]])), "'scale' must be a list, each a finite number"),
    (view(put(scale=[1e39])), "'scale' has a number that is too large for float32"),
    (view(put(scale=[-1.0])), "scale must be finite and > 0"),
    (view(put(scale=[1e-60])), "scale must be finite and > 0"),
    (view(put(scale=[1, 2], zero_point=[0, 0])), "without an axis there must be one scale"),
    (view(put(zero_point=[0.5])), "'zero_point' must be a list, each a whole number"),
    (view(put(zero_point=[1 << 40])), "'zero_point' has a number that is too large for int32"),
    (view(put(zero_point=[200])), "'zero_point' must lie between -128 and 127"),
    (view(put(zero_point=[0, 0])), "'scale' and 'zero_point' must have one shape"),
    (view(put(axis=0)), "tensor 'y', qparams 0: 'granularity' must be 'channel', by its axis and block_size"),
    (view(put(block_size=4)), "blocks of 4 along axis None: expected an axis"),
    (view(put(axis=5), "u"), "tensor 'u': axis 5 is none of its 2 axes"),
    (view(put(axis=0), "u"), r"tensor 'u': scale has the shape \[5\], but \[6\] is needed"),
    (view(drop("scale_f32_hex", "clip", scale=[[1] * 5], zero_point=[[0] * 5]), "u"), "without a block_size 'scale'"),
    (view(put(symmetric=False)), "'symmetric' contradicts 'signed' and 'zero_point'"),
    (view(put(scale_f32_hex=["3f800000"])), "'scale' and 'scale_f32_hex' disagree; delete scale_f32_hex to keep"),
    (view(put(pow2_exponent=[-3])), "'scale' and 'pow2_exponent' disagree; delete pow2_exponent"),
    (view(drop("scale_f32_hex", scale=[0.5])), "'scale' and 'clip' disagree; delete the one that is not to count"),
    (view(put(clip={"min": [0]})), "clip: 'max' is missing"),
    (view(put(clip={"min": [0], "max": [0, 1]})), "'scale' and 'clip' disagree"),
    (view(drop("scale", "clip")), "'scale' is missing, and so is 'clip', which it could follow from"),
    (view(drop("scale", clip={"min": [1], "max": [1]})), "'clip' must have as many values of 'min' as of 'max', and"),
    (view(drop("scale", clip={"min": [1], "max": [2, 3]})), "'clip' must have as many values of 'min' as of 'max'"),
    (view(reference("scale", "no such"), "k"), "table.safetensors' has no array 'no such' of numbers"),
    (view(reference("scale", 3), "k"), "'scale' must be a list of numbers or"),
    (view(put(scale={"$ref": "0.counts", "file": "/etc/passwd"}), "k"), "'scale' must be a list of numbers or"),
    (view(reference("scale", "0.counts"), "k"), r"'scale' refers to uint32 of shape \(8192,\), not to finite float32"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[message[:40] for _, message in HOSTILE])
def test_a_wrong_field_is_one_line(change: Edit, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read_table(written(tmp_path, change))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is not JSON .*: give a calibration table"),
        (b"[]", "holds no JSON object"),
        (b"\xff\xfe", "is not text"),
        (b'{"format": "a", "format": "b"}', "'format' stands twice in one object"),
        (b'{"format": NaN}', "NaN is no number of JSON"),
        (b'{"a": ' * 100_000, "nests too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not JSON"),
    ],
)
def test_a_file_that_is_no_table_is_one_line(raw: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_bytes(raw)
    with pytest.raises(ExportError, match=message) as caught:
        read_table(path)
    assert "\n" not in str(caught.value)


def test_files_that_are_absent_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"cannot read '.*absent.json' \(No such file"):
        read_table(tmp_path / "absent.json")
    path = written(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "FILE_LIMIT", 1000)
        with pytest.raises(ExportError, match=r"table.json' is larger than 0 MiB"):
            read_table(path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "ARRAYS_LIMIT", 1000)
        with pytest.raises(
            ExportError, match=r"table.safetensors' is larger than 0 GiB: give the file that was written"
        ):
            read_table(path)
    (tmp_path / "table.safetensors").unlink()
    with pytest.raises(ExportError, match=r"table.safetensors' cannot be read \(No such file"):
        read_table(path)


def with_arrays(folder: Path, raw: bytes) -> Path:
    """The table with other bytes for its arrays, and their hash in the JSON file."""
    path = written(folder)
    (folder / "table.safetensors").write_bytes(raw)
    content = json.loads(path.read_text())
    content["arrays_sha256"] = file_sha256(folder / "table.safetensors")
    path.write_text(json.dumps(content))
    return path


def safetensors(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is no safetensors file"),
        (struct.pack("<Q", 1 << 62) + b"{}", "is no safetensors file"),
        (safetensors(b"{"), "is no safetensors file"),
        (safetensors({"0.counts": {"dtype": "F32", "shape": [2], "data_offsets": [0, 800]}}, b"0" * 8), "is no safet"),
        (safetensors({"0.counts": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}, b"0" * 8), "is no safet"),
        (safetensors({"0.counts": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"0" * 8), "is no safet"),
        (
            safetensors({"0.counts": {"dtype": "F16", "shape": [4], "data_offsets": [0, 8]}}, b"0" * 8),
            "as float16, which",
        ),
        (safetensors({"0.counts": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}), r"of shape \(0,\), not to"),
        (
            safetensors(
                {"0.counts": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, struct.pack("<f", np.inf)
            ),
            "not to finite float64",
        ),
    ],
)
def test_hostile_arrays_are_one_line(raw: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message) as caught:
        read_table(with_arrays(tmp_path, raw))
    assert "\n" not in str(caught.value)


def test_arrays_of_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    header = {"0.counts": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}
    with pytest.raises(ExportError, match=r"table.safetensors' has"):
        read_table(with_arrays(tmp_path, safetensors(header, b"0000")))


def test_another_file_of_arrays_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    arrays: dict[str, Array] = load_file(tmp_path / "table.safetensors")
    save_file({**arrays, "0.counts": arrays["0.counts"][::-1].copy()}, tmp_path / "table.safetensors")
    with pytest.raises(ExportError, match="is not the one that 'arrays_sha256' names"):
        read_table(path)


def test_a_table_cannot_be_its_own_file_of_arrays(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot be the JSON file of a table: name it table.json"):
        write_table(table(), tmp_path / "table.safetensors")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "table.json").mkdir()
    with pytest.raises(ExportError, match=r"cannot write '.*table.json' \(.*\): free the disk or choose another file"):
        write_table(Table((), ()), tmp_path / "table.json")
    assert [path.name for path in tmp_path.iterdir()] == ["table.json"]


@pytest.mark.parametrize(
    "change",
    [
        put(more=1),
        put(version="1.1"),
        put(arrays_sha256="x"),
        tensor("y", put(role="state")),
        tensor("y", put(shape=[-1])),
        view(drop("bits")),
        view(drop("scale", "clip")),
        view(put(scale=["1"])),
        view(put(zero_point=[0.5])),
        view(put(scale_f32_hex=["3F800000"])),
        histogram(hi=0),
    ],
)
def test_the_schema_refuses(change: Edit, tmp_path: Path) -> None:
    content = json.loads(written(tmp_path, change).read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


def test_text_keeps_short_objects_and_lists_of_numbers_on_one_line() -> None:
    content = {"a": {"b": [1, 2]}, "c": [list(range(99)), {"d": ["x" * 60, "y" * 60]}]}
    text = json_text(content)
    assert json.loads(text) == content
    assert [line.strip()[:14] for line in text.splitlines()] == [
        *("{", '"a": {"b": [1,', '"c": [', "[0, 1, 2, 3, 4", "{", '"d": ["xxxxxxx', "}", "]", "}"),
    ]
