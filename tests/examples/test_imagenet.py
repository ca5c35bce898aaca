"""The loader of an ImageNet folder, on images made here."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

Image = pytest.importorskip("PIL.Image")

from examples.imagenet import MEAN, STD, image_batches, labelled_batches, read_image  # noqa: E402

COUNTS = {"n01": 5, "n02": 3, "n03": 0, "n04": 4}
SMALL = {"size": 16, "resize": 20}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four classes, one of them empty, and things that are no images; each image has one grey."""
    for label, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.full((24, 30 + i, 3), 40 * label + 8 * i, np.uint8)
            suffix = ("JPEG", "png", "jpg")[i % 3]
            Image.fromarray(pixels).save(tmp_path / name / f"{name}_{i}.{suffix}")
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "n01" / "._n01_0.JPEG").write_text("no image")
    (tmp_path / "readme.png").write_text("no image")
    (tmp_path / ".cache").mkdir()
    return tmp_path


def pixel_values(x: Tensor) -> Tensor:
    """Normalised images as 0..255 again."""
    shape = (3, 1, 1)
    return 255 * (x * torch.tensor(STD).view(shape) + torch.tensor(MEAN).view(shape))


def test_batches_hold_every_image_once(folder: Path) -> None:
    batches = image_batches(folder, batch_size=5, **SMALL)
    got = list(batches)
    assert len(batches) == 3
    assert [tuple(x.shape) for x in got] == [(5, 3, 16, 16), (5, 3, 16, 16), (2, 3, 16, 16)]
    assert all(x.dtype == torch.float32 and x.is_contiguous() for x in got)
    greys = pixel_values(torch.cat(got)).mean((1, 2, 3)).round().long().tolist()
    wanted = [40 * k + 8 * i for k, n in enumerate(COUNTS.values()) for i in range(n)]
    assert sorted(greys) == pytest.approx(sorted(wanted), abs=1)


def test_batches_can_be_read_again(folder: Path) -> None:
    batches = image_batches(folder, batch_size=4, workers=2, **SMALL)
    first, second = list(batches), list(batches)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = torch.cat(list(image_batches(str(folder), batch_size=12, workers=1, **SMALL)))
    assert torch.equal(torch.cat(first), alone)


def test_labels_are_places_in_sorted_order(folder: Path) -> None:
    batches = labelled_batches(folder, batch_size=5, **SMALL)
    assert batches.classes == ["n01", "n02", "n03", "n04"]
    seen: Counter[int] = Counter()
    for images, labels in batches:
        assert labels.dtype == torch.int64
        assert len(labels) == len(images)
        greys = pixel_values(images).mean((1, 2, 3)).round().long()
        assert torch.equal((greys + 2) // 40, labels)
        seen.update(labels.tolist())
    assert seen == {0: 5, 1: 3, 3: 4}  # the empty class keeps its place


@pytest.mark.parametrize("count", range(1, 13))
def test_count_is_drawn_evenly_over_classes(folder: Path, count: int) -> None:
    batches = labelled_batches(folder, count=count, **SMALL)
    assert len(batches.files) == len({path for path, _ in batches.files}) == count
    per_class = Counter(label for _, label in batches.files)
    assert all(path.parent.name == f"n0{label + 1}" for path, label in batches.files)
    most = max(per_class.values())
    for label, available in ((0, 5), (1, 3), (3, 4)):
        assert per_class[label] >= min(available, most - 1)


def test_seed_decides_which(folder: Path) -> None:
    def drawn(seed: int, count: int = 4) -> list[str]:
        batches = labelled_batches(folder, count=count, seed=seed, **SMALL)
        return [path.name for path, _ in batches.files]

    assert drawn(1) == drawn(1)
    assert len({tuple(sorted(drawn(seed))) for seed in range(20)}) > 5
    assert {path for seed in range(40) for path in drawn(seed)} == set(drawn(0, 12))
    assert drawn(1, 8)[:4] == drawn(1)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (48, 48), (30, 41)], ids=str)
def test_geometry_is_that_of_an_antialiased_resize(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Against torch's own resize of the same pixels."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = pixel_values(read_image(tmp_path / "a.png", size=24, resize=32))
    height, width = (32 * side // min(shape) for side in shape)
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    wanted = F.interpolate(x, size=(height, width), mode="bilinear", antialias=True)[0]
    top, left = round((height - 24) / 2), round((width - 24) / 2)
    wanted = wanted[:, top : top + 24, left : left + 24]
    assert (got - wanted).abs().max() < 2  # Pillow rounds after each of two passes
    assert (got - wanted).abs().mean() < 0.6


def test_normalisation(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (255, 0, 51)).save(tmp_path / "a.png")
    x = read_image(tmp_path / "a.png", size=8, resize=10)
    wanted = [(value - m) / s for value, m, s in zip((1, 0, 0.2), MEAN, STD, strict=True)]
    torch.testing.assert_close(x, torch.tensor(wanted).view(3, 1, 1).expand(3, 8, 8))


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("L", "jpg"), ("LA", "png"), ("RGBA", "png"), ("1", "png"), ("CMYK", "jpg")],
)
def test_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (20, 20), (255, 255, 255)).convert(mode).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    x = pixel_values(read_image(path, size=8, resize=10))
    torch.testing.assert_close(x, torch.full((3, 8, 8), 255.0), rtol=0, atol=2)


def test_palette_with_transparency_becomes_rgb_without_warning(tmp_path: Path) -> None:
    image = Image.new("P", (20, 20), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=bytes([255, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = pixel_values(read_image(tmp_path / "a.png", size=8, resize=10))
    colours = torch.tensor([200.0, 100.0, 50.0]).view(3, 1, 1)
    torch.testing.assert_close(x, colours.expand(3, 8, 8), rtol=0, atol=1e-3)


def test_sixteen_bits_are_scaled_not_cut_off(tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(tmp_path / "a.png")
    x = pixel_values(read_image(tmp_path / "a.png", size=8, resize=10))
    torch.testing.assert_close(x, torch.full((3, 8, 8), 156.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("suffix", ["png", "jpeg"])
@pytest.mark.parametrize("broken", ["empty", "text", "cut"])
def test_unreadable_images_are_named(folder: Path, suffix: str, broken: str) -> None:
    path = folder / "n03" / f"bad.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    data = path.read_bytes()
    contents = {"empty": b"", "text": b"no image at all", "cut": data[: len(data) // 2]}
    path.write_bytes(contents[broken])
    with pytest.raises(OSError, match=rf"^every image must be readable, got .*bad\.{suffix}"):
        list(image_batches(folder, **SMALL))


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^folder must be an existing folder, got .*none"):
        image_batches(tmp_path / "none")
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "a.txt").write_text("")
    Image.new("RGB", (9, 9)).save(tmp_path / "outside.png")
    with pytest.raises(FileNotFoundError, match=r"^folder must hold class folders .*got none in"):
        image_batches(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 13}, "count must be from 1 to the 12 images there, got 13"),
        ({"count": 0}, "count must be from 1 to the 12 images there, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"size": 224, "resize": 200}, "resize must be at least 224, got 200"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_wrong_numbers_are_refused(folder: Path, arguments: dict[str, int], message: str) -> None:
    for make in (image_batches, labelled_batches):
        with pytest.raises(ValueError, match=f"^{message}"):
            make(folder, **arguments)


def test_pillow_is_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="Pillow: pip install pillow"):
        image_batches(folder)
