"""Folders of images: which are found, what becomes of a pixel, what is refused."""

import io
import os
import struct
import sys
import tracemalloc
import zlib
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_files import F32, I64, same

from onnxqt.data import PRESETS, DataSource, InputSpec, Preprocessing, Samples, check_labels, open_samples
from onnxqt.data import images as module
from onnxqt.errors import DataError, InstallationError, UsageError
from onnxqt.numerics import Array

U8 = np.dtype(np.uint8)
RAW = Preprocessing("raw")
CHW = InputSpec("x", F32, (None, 3, 5, 4))


def pixels(seed: int, height: int = 5, width: int = 4) -> Array:
    """A random image in colours."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, image: Array) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def flat(folder: Path, count: int = 3, **size: int) -> Path:
    for number in range(count):
        save(folder / f"{number:03}.png", pixels(number, **size))
    return folder


def opened(folder: Path, preprocessing: Preprocessing = RAW, spec: InputSpec = CHW) -> Samples:
    return open_samples(DataSource(str(folder), preprocessing), [spec])


def only(folder: Path, preprocessing: Preprocessing = RAW, spec: InputSpec = CHW) -> Array:
    """What the model is fed, of all images."""
    (batch,) = opened(folder, preprocessing, spec).batches(100)
    return batch.inputs["x"]


# What is found


def test_a_flat_folder_in_order_without_labels(tmp_path: Path) -> None:
    samples = opened(flat(tmp_path))
    assert (samples.count, samples.has_labels, samples.source) == (3, False, str(tmp_path))
    (batch,) = samples.batches(9)
    assert batch.labels is None
    wanted = np.stack([pixels(number) for number in range(3)]).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(batch.inputs["x"], wanted, strict=True)


def classes(folder: Path, names: list[str], each: int = 2) -> Path:
    for place, name in enumerate(names):
        for number in range(each):
            save(folder / name / f"{number}.png", np.full((5, 4, 3), 10 * place + number, np.uint8))
    return folder


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    classes(tmp_path, ["dog", "cat", ".hidden"])
    (tmp_path / "bird").mkdir()  # a class without an image here keeps its number
    (tmp_path / "README.txt").write_text("photos")
    (batch,) = opened(tmp_path).batches(9)
    assert batch.labels is not None
    assert batch.labels.dtype == I64
    assert batch.labels.tolist() == [1, 1, 2, 2]
    assert batch.inputs["x"][:, 0, 0, 0].tolist() == [10, 11, 0, 1]


def test_folders_named_by_numbers_are_classes_of_these_numbers(tmp_path: Path) -> None:
    classes(tmp_path, ["0", "2", "10"], each=1)
    (batch,) = opened(tmp_path).batches(9)
    assert batch.labels is not None
    assert {int(x): label for x, label in zip(batch.inputs["x"][:, 0, 0, 0], batch.labels.tolist(), strict=True)} == {
        0: 0,
        10: 2,
        20: 10,
    }


def test_a_single_image(tmp_path: Path) -> None:
    path = save(tmp_path / "a.PNG", pixels(1))
    save(tmp_path / "b.png", pixels(2))
    np.testing.assert_array_equal(only(path)[0], pixels(1).transpose(2, 0, 1))


@pytest.mark.parametrize(("suffix", "mode"), [("bmp", "RGB"), ("ppm", "RGB"), ("tiff", "RGB"), ("png", "P")])
def test_lossless_formats(tmp_path: Path, suffix: str, mode: str) -> None:
    image = pixels(3) // 86 * 102  # colours of the palette that Pillow takes
    Image.fromarray(image).convert(mode).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(only(tmp_path)[0], image.transpose(2, 0, 1))


def test_a_name_does_not_say_the_format(tmp_path: Path) -> None:
    """As in ImageNet, where one file called JPEG is a PNG."""
    save(tmp_path / "a.png", pixels(1)).rename(tmp_path / "a.JPEG")
    np.testing.assert_array_equal(only(tmp_path)[0], pixels(1).transpose(2, 0, 1))


def test_images_in_both_places(tmp_path: Path) -> None:
    classes(flat(tmp_path), ["cat"])
    with pytest.raises(DataError, match=r"has images directly in it, such as 000\.png, and in folders, such as cat"):
        opened(tmp_path)


# What becomes of them


def test_imagenet_by_its_definition(tmp_path: Path) -> None:
    """An image whose shorter side is 256 already: the centre, scaled and normalised.

    Values are computed in float64 and rounded once, so they equal the same formula exactly.
    """
    image = pixels(0, 256, 303)
    save(tmp_path / "a.png", image)
    found = only(tmp_path, PRESETS["imagenet"], InputSpec("x", F32, (None, 3, 224, 224)))
    left = 40  # round(79 / 2) with the tie to even
    centre = image[16:240, left : left + 224].astype(np.float64)
    wanted = (centre / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    # `pixel * (1 / 255)` for `pixel / 255` differs by less than 2^-52 of at most 1, divided by 0.2: invisible in
    # float32 but where the value lies on a rounding tie, so one unit in the last place is allowed.
    np.testing.assert_array_max_ulp(found[0], wanted.transpose(2, 0, 1).astype(np.float32), maxulp=1)


def test_cifar_by_its_definition(tmp_path: Path) -> None:
    image = pixels(1, 32, 32)
    save(tmp_path / "a.png", image)
    found = only(tmp_path, PRESETS["cifar"], InputSpec("x", F32, (None, 3, 32, 32)))
    wanted = (image / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    np.testing.assert_array_max_ulp(found[0], wanted.transpose(2, 0, 1).astype(np.float32), maxulp=1)  # as above


@pytest.mark.parametrize(("height", "width", "size"), [(10, 15, (8, 12)), (15, 10, (12, 8)), (9, 13, (8, 11))])
def test_resizing_the_shorter_side(tmp_path: Path, height: int, width: int, size: tuple[int, int]) -> None:
    save(tmp_path / "a.png", pixels(0, height, width))
    found = only(tmp_path, Preprocessing("p", resize=(8,)), InputSpec("x", F32, (None, 3, None, None)))
    assert found.shape == (1, 3, *size)


def test_resizing_both_sides_and_the_filters(tmp_path: Path) -> None:
    """A board of single black and white pixels, halved: nearest keeps its colours, bilinear means over them."""
    board = np.indices((16, 24)).sum(0) % 2 * 255
    save(tmp_path / "a.png", np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8))
    spec = InputSpec("x", F32, (None, 3, 8, 12))
    nearest = only(tmp_path, Preprocessing("p", resize=(8, 12), filter="nearest"), spec)
    bilinear = only(tmp_path, Preprocessing("p", resize=(8, 12)), spec)
    assert set(np.unique(nearest)) <= {0, 255}
    inner = bilinear[:, :, 1:-1, 1:-1]
    assert 127 <= inner.min() <= inner.max() <= 128


@pytest.mark.parametrize(
    ("preprocessing", "shape", "axes"),
    [
        (RAW, (None, 3, None, None), (2, 0, 1)),
        (RAW, (None, None, None, 3), (0, 1, 2)),
        (RAW, (None, None, None, None), (2, 0, 1)),
        (Preprocessing("p", layout="hwc"), (None, None, None, None), (0, 1, 2)),
    ],
)
def test_layouts(tmp_path: Path, preprocessing: Preprocessing, shape: Any, axes: tuple[int, ...]) -> None:
    save(tmp_path / "a.png", pixels(0))
    found = only(tmp_path, preprocessing, InputSpec("x", F32, shape))
    np.testing.assert_array_equal(found[0], pixels(0).transpose(axes))


def test_colours(tmp_path: Path) -> None:
    image = pixels(0)
    save(tmp_path / "a.png", image)
    bgr = Preprocessing("p", colour="bgr", mean=(1.0, 2.0, 4.0), std=(0.5, 1.0, 2.0))
    wanted = (image[:, :, ::-1] - np.array([1.0, 2.0, 4.0])) / [0.5, 1.0, 2.0]
    np.testing.assert_array_equal(only(tmp_path, bgr)[0], wanted.transpose(2, 0, 1))
    grey = np.asarray(Image.fromarray(image).convert("L"))
    for shape in ((None, 1, 5, 4), (None, 5, 4, 1), (None, 5, 4)):
        found = only(tmp_path, RAW, InputSpec("x", F32, shape))
        assert found.shape[1:] == shape[1:]
        np.testing.assert_array_equal(found.reshape(5, 4), grey)


def test_models_that_take_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(0))
    found = only(tmp_path, RAW, InputSpec("x", U8, (None, 5, 4, 3)))
    np.testing.assert_array_equal(found[0], pixels(0), strict=True)
    signed = Preprocessing("p", mean=(128.0,), dtype="int8")
    found = only(tmp_path, signed, InputSpec("x", np.dtype(np.int8), (None, 5, 4, 3)))
    np.testing.assert_array_equal(found[0], (pixels(0).astype(int) - 128).astype(np.int8), strict=True)


# Streams of them


def test_shuffled_covers_classes_and_resumes(tmp_path: Path) -> None:
    samples = opened(classes(tmp_path, ["a", "b", "c", "d"], each=4))
    epoch = list(islice(samples.shuffled(4, seed=0), 4))
    first = [int(x) for batch in epoch for x in batch.inputs["x"][:, 0, 0, 0]]
    assert sorted(first) == sorted(10 * place + number for place in range(4) for number in range(4))
    assert any(len(set(batch.labels.tolist())) > 1 for batch in epoch if batch.labels is not None)
    whole = list(islice(samples.shuffled(4, seed=0), 7))
    resumed = list(islice(opened(tmp_path).shuffled(4, seed=0, skip=3), 4))
    assert all(same(a, b) for a, b in zip(whole[3:], resumed, strict=True))


def test_splits(tmp_path: Path) -> None:
    rest, held = opened(classes(tmp_path, ["a", "b"], each=5)).split(0.2, 10)
    parts = [[int(x) for batch in part.batches(3) for x in batch.inputs["x"][:, 0, 0, 0]] for part in (rest, held)]
    assert sorted(parts[0] + parts[1]) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert len(parts[1]) == 2


def test_labels_are_checked_without_decoding(tmp_path: Path) -> None:
    samples = opened(classes(tmp_path, ["a", "b", "c"], each=1))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    check_labels(samples, 3)
    with pytest.raises(DataError, match=r"the label of sample 2 of the file is 2, but the model has 2 classes"):
        check_labels(samples, 2)


def test_images_are_decoded_on_demand_and_kept_within_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT", 4 * 60)  # four images of 5 x 4 in three colours
    decoded: list[str] = []
    original = module.decoded

    def spy(path: Path, *rest: Any) -> Array:
        decoded.append(path.name)
        return original(path, *rest)

    monkeypatch.setattr(module, "decoded", spy)
    samples = opened(flat(tmp_path, 10))
    assert decoded == ["000.png"]
    first = list(samples.batches(3))
    assert len(decoded) == 10
    again = list(samples.batches(3))
    assert decoded[10:] == [f"{number:03}.png" for number in range(4, 10)]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_LIMIT", 1 << 20)
    for number in range(64):
        save(tmp_path / f"{number:03}.png", np.full((256, 256, 3), number, np.uint8))
    samples = opened(tmp_path, RAW, InputSpec("x", F32, (None, 3, 256, 256)))
    tracemalloc.start()
    seen = [int(x) for batch in samples.batches(2) for x in batch.inputs["x"][:, 0, 0, 0]]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == list(range(64))
    # An image is 768 KiB as float32: two batches of two, copies on the way, the cache; all images would be 48 MiB.
    assert peak < 8 << 20


def test_the_hash_depends_on_the_preprocessing_and_the_images(tmp_path: Path) -> None:
    flat(tmp_path / "a")
    base = opened(tmp_path / "a").sha256()
    assert opened(tmp_path / "a", Preprocessing("another name")).sha256() == base
    moved = (tmp_path / "a").rename(tmp_path / "b")
    assert opened(moved).sha256() == base
    scaled = opened(moved, Preprocessing("raw", scale=0.5)).sha256()
    save(moved / "001.png", pixels(9))
    assert len({base, scaled, opened(moved).sha256()}) == 3


# What is refused


def test_images_without_a_preprocessing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds images, .* pass --preprocess with one of imagenet, cifar, none or a"):
        open_samples(flat(tmp_path), [CHW])


def test_images_for_several_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds images, which feed one input, .* inputs \['x', 'y'\]; save \.npz"):
        open_samples(DataSource(str(flat(tmp_path)), RAW), [CHW, InputSpec("y", F32, (None, 2))])


def test_a_preprocessing_for_what_are_no_images(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    with pytest.raises(UsageError, match=r"--preprocess imagenet is for images, but .* has \.npy files.*leave it out"):
        open_samples(DataSource(str(tmp_path), PRESETS["imagenet"]), [InputSpec("x", F32, (None, 3))])


def test_inputs_without_axes_for_images(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds images, but the model's input 'x' has shape \(samples, 60\)"):
        opened(flat(tmp_path), RAW, InputSpec("x", F32, (None, 60)))


def test_colours_without_an_axis_for_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images in rgb have channels, but .* layout hw .* colour = \"grey\""):
        opened(flat(tmp_path), Preprocessing("p", colour="rgb"), InputSpec("x", F32, (None, 5, 4)))


def test_an_input_called_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gives the array 'labels', but so is the model's input called; rename"):
        opened(classes(tmp_path, ["a"]), RAW, InputSpec("labels", F32, (None, 3, 5, 4)))


@pytest.mark.parametrize("key", ["mean", "std"])
def test_statistics_of_another_number_of_channels(tmp_path: Path, key: str) -> None:
    three = Preprocessing("p", **{key: (1.0, 2.0, 3.0)})  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"{key} of the preprocessing 'p' has 3 values, but images in grey have 1"):
        opened(flat(tmp_path), three, InputSpec("x", F32, (None, 1, 5, 4)))


@pytest.mark.parametrize(
    ("spec", "preprocessing"),
    [
        (InputSpec("x", U8, (None, 3, 5, 4)), Preprocessing("p", scale=1 / 255)),
        (InputSpec("x", np.dtype(np.int8), (None, 3, 5, 4)), RAW),
        (InputSpec("x", np.dtype(np.float16), (None, 3, 5, 4)), Preprocessing("p", scale=1e4)),
        (InputSpec("x", np.dtype(bool), (None, 3, 5, 4)), RAW),
    ],
    ids=["fractions", "too large", "infinite", "bool"],
)
def test_values_that_the_type_does_not_have(tmp_path: Path, spec: InputSpec, preprocessing: Preprocessing) -> None:
    with pytest.raises(DataError, match=r"gives values from 0 to .*, which are not all .*; change scale, mean, std"):
        opened(flat(tmp_path), preprocessing, spec)


def test_a_type_that_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"array 'x' is uint8, but the model wants float32"):
        opened(flat(tmp_path), Preprocessing("p", dtype="uint8"))


def test_a_first_image_of_another_size(tmp_path: Path) -> None:
    message = (
        r"000\.png becomes a sample of shape \(3, 7, 4\) by .* 'raw', but the model wants \(samples, 3, 5, 4\); set"
    )
    with pytest.raises(DataError, match=message):
        opened(flat(tmp_path, height=7))


def test_a_later_image_of_another_size(tmp_path: Path) -> None:
    save(flat(tmp_path) / "001.png", pixels(0, 5, 9))
    samples = opened(tmp_path)
    with pytest.raises(DataError, match=r"001\.png becomes a sample of shape \(3, 5, 9\)"):
        list(samples.batches(2))
    free = opened(tmp_path, RAW, InputSpec("x", F32, (None, 3, None, None)))
    assert [batch.inputs["x"].shape[3] for batch in free.batches(1)] == [4, 9, 4]
    with pytest.raises(DataError, match=r"001\.png gives a sample of shape \(3, 5, 9\), but another .* --batch-size 1"):
        list(free.batches(2))


def test_an_image_smaller_than_the_part_to_cut_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"000\.png has 4 x 5 pixels, too few to cut 5 x 4 out; set resize"):
        opened(flat(tmp_path), Preprocessing("p", crop=(4, 5)))


def test_deep_images(tmp_path: Path) -> None:
    Image.fromarray(np.full((5, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png has more than 8 bits per channel \(mode I;16\); save it with 8"):
        opened(tmp_path)


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size, and has no pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(bytes(64))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def encoded(suffix: str) -> bytes:
    """A whole image in a format that Pillow knows."""
    stream = io.BytesIO()
    Image.fromarray(pixels(0)).save(stream, suffix)
    return stream.getvalue()


@pytest.mark.parametrize("side", [10_000, 60_000], ids=["above the limit", "above Pillow's own"])
def test_decompression_bombs(tmp_path: Path, side: int) -> None:
    (tmp_path / "a.png").write_bytes(png_header(side, side))
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"a\.png (has {side} x {side} pixels, more than|cannot be read \(Image size)"):
        opened(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_resizing_to_a_bomb(tmp_path: Path) -> None:
    """The shorter side is one pixel, so the longer one grows by as much as that."""
    save(tmp_path / "a.png", np.zeros((1, 5000, 3), np.uint8))
    with pytest.raises(DataError, match=r"a\.png is resized to 1280000 x 256 pixels, more than 89478485 allowed"):
        opened(tmp_path, PRESETS["imagenet"], InputSpec("x", F32, (None, 3, 224, 224)))


@pytest.mark.parametrize(
    "content",
    [b"", b"no image", png_header(4, 5), encoded("eps"), encoded("gif")],
    ids=["empty", "text", "no pixels", "postscript", "gif"],
)
def test_what_is_no_image_of_a_known_format(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "a.png", pixels(0))
    (tmp_path / "b.png").write_bytes(content)
    samples = opened(tmp_path)
    with pytest.raises(DataError, match=r"b\.png cannot be read \(.+\); check it or write it again") as error:
        list(samples.batches(2))
    assert "\n" not in str(error.value)


def test_random_damage_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for suffix in ("png", "jpeg", "bmp", "tiff", "webp", "ppm"):
        stream = io.BytesIO()
        Image.fromarray(pixels(0, 16, 16)).save(stream, suffix)
        good = np.frombuffer(stream.getvalue(), np.uint8)
        for trial in range(60):
            bad = good.copy()
            places = rng.integers(0, min(len(bad), 200), size=1 + trial % 4)
            bad[places] = rng.integers(0, 256, size=len(places))
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(bad[: None if trial % 3 else int(rng.integers(0, len(bad)))].tobytes())
            try:
                only(path, Preprocessing("p", resize=(5, 4)))
            except DataError as error:
                assert "\n" not in str(error)  # noqa: PT017 - damage need not be noticed


def test_an_image_that_is_gone(tmp_path: Path) -> None:
    samples = opened(flat(tmp_path))
    os.unlink(tmp_path / "001.png")
    with pytest.raises(DataError, match=r"001\.png cannot be read \(.*No such file"):
        list(samples.batches(2))
    with pytest.raises(DataError, match=r"001\.png cannot be read \(.*No such file"):
        samples.sha256()


def test_pillow_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(InstallationError, match=r"reading images needs Pillow: pip install 'onnxqt\[images\]'"):
        opened(tmp_path)
