"""Calibration and test images for those who have an ImageNet folder, ready for a network.

The folder holds one folder a class, with its images in it: folder/class_name/*.JPEG, jpg or png.

    images = image_batches("imagenet/train", count=1024)
    quantize_(model, images)
    for x, labels in labelled_batches("imagenet/val", batch_size=64):
        correct += (model(x).argmax(1) == labels).sum()
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in 0..1
SUFFIXES = (".jpeg", ".jpg", ".png")


class LabelledBatches:
    """Batches of (images, labels); each pass reads the files again, so any number is possible.

    ``files`` are the drawn ones with their class, in the order of the batches.
    """

    def __init__(
        self,
        files: list[tuple[Path, int]],
        classes: list[str],
        batch_size: int,
        size: int,
        resize: int,
        workers: int,
    ) -> None:
        self.files, self.classes, self.batch_size = files, classes, batch_size
        self._size, self._resize, self._workers = size, resize, workers

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(self._workers) as pool:  # Pillow decodes without Python's lock
            for begin in range(0, len(self.files), self.batch_size):
                chosen = self.files[begin : begin + self.batch_size]
                images = pool.map(self._read, [path for path, _ in chosen])
                yield torch.stack(list(images)), torch.tensor([label for _, label in chosen])

    def _read(self, path: Path) -> Tensor:
        return read_image(path, self._size, self._resize)


class ImageBatches:
    """The images of LabelledBatches without their labels."""

    def __init__(self, labelled: LabelledBatches) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return len(self.labelled)

    def __iter__(self) -> Iterator[Tensor]:
        return (images for images, _ in self.labelled)


def image_batches(
    folder: str | Path,
    *,
    batch_size: int = 32,
    count: int | None = None,
    size: int = 224,
    resize: int = 256,
    seed: int = 0,
    workers: int = 4,
) -> ImageBatches:
    """The images of :func:`labelled_batches`, for calibration."""
    return ImageBatches(
        labelled_batches(
            folder,
            batch_size=batch_size,
            count=count,
            size=size,
            resize=resize,
            seed=seed,
            workers=workers,
        )
    )


def labelled_batches(
    folder: str | Path,
    *,
    batch_size: int = 32,
    count: int | None = None,
    size: int = 224,
    resize: int = 256,
    seed: int = 0,
    workers: int = 4,
) -> LabelledBatches:
    """Images float32 [n, 3, size, size] with labels int64 [n], as networks are tested on ImageNet.

    The shorter side becomes ``resize`` pixels, bilinear with antialiasing, the centre is cut out,
    and each colour is normalised with ImageNet's mean and standard deviation. A label is the place
    of the class's folder among all of them in sorted order. ``count`` images (None: all) are drawn
    by ``seed`` without replacement, as evenly over the classes as these allow, and come in an order
    drawn so too. ``workers`` threads read files; an image is read when its batch is due.

    Raises FileNotFoundError for a folder that is missing or has no images, ImportError without
    Pillow, ValueError for numbers out of range. The iteration raises OSError for a file that is
    no readable image, with its name.
    """
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("reading images needs the package Pillow: pip install pillow")
    least = {"batch_size": (batch_size, 1), "size": (size, 1), "resize": (resize, size)}
    least["workers"] = (workers, 1)
    for name, (value, limit) in least.items():
        if value < limit:
            raise ValueError(f"{name} must be at least {limit}, got {value}")
    classes = _classes(Path(folder))
    available = sum(map(len, classes.values()))
    if available == 0:
        rule = f"folder must hold class folders with images ({', '.join(SUFFIXES)})"
        raise FileNotFoundError(f"{rule}, got none in {folder}")
    if count is not None and not 1 <= count <= available:
        raise ValueError(f"count must be from 1 to the {available} images there, got {count}")
    files = _drawn(list(classes.values()), available if count is None else count, seed)
    return LabelledBatches(files, list(classes), batch_size, size, resize, workers)


def _classes(folder: Path) -> dict[str, list[Path]]:
    """Class names and their files, both sorted; a folder without images keeps its place."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder must be an existing folder, got {folder}")
    classes = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = (f for f in path.iterdir() if f.suffix.lower() in SUFFIXES)
            classes[path.name] = sorted(f for f in files if not f.name.startswith("."))
    return classes


def _drawn(classes: list[list[Path]], count: int, seed: int) -> list[tuple[Path, int]]:
    """In turn one image of each class that has some left, the classes in an order of their own."""
    source = random.Random(seed)
    left = [source.sample(files, len(files)) for files in classes]
    order = source.sample(range(len(classes)), len(classes))
    drawn: list[tuple[Path, int]] = []
    while len(drawn) < count:
        drawn += [(left[label].pop(), label) for label in order if left[label]]
    return drawn[:count]


def read_image(path: Path, size: int = 224, resize: int = 256) -> Tensor:
    """One file as :func:`labelled_batches` says, [3, size, size]; OSError names what is unreadable.

    Grey, palette and CMYK images become RGB, and transparency is dropped.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            colours = _rgb(image)
    # What Pillow raises for broken files: SyntaxError by its PNG reader, for one.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"every image must be readable, got {path}: {error}") from error
    shorter = min(colours.size)
    width, height = (resize * side // shorter for side in colours.size)
    # Pillow's bilinear filter widens as it shrinks an image: that is the antialiasing.
    colours = colours.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    colours = colours.crop((left, top, left + size, top + size))
    x = torch.from_numpy(np.array(colours)).permute(2, 0, 1).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    elif image.mode == "P":  # at once, Pillow warns of some kinds of transparency
        image = image.convert("RGBA")
    return image.convert("RGB")
