"""The caller's own pictures."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from PIL import Image

from fastvlm_convert.calibration.pictures import Pictures, file_picture
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.files import sha256
from fastvlm_mlx.image import open_image

MAX_PICTURES = 64  # each is run at every size; at 1024 px that takes seconds


def from_folder(folder: Path) -> Pictures:
    """Take the pictures of a folder, sorted by name; its own folders and hidden files are left out.

    Each file is decoded once to see that it can be, and again whenever its picture is made.

    Args:
        folder: holds image files. Of more than `MAX_PICTURES`, so many are taken, evenly spread.

    Raises:
        InputError: no folder, not readable, or without any image.
    """
    files = _files(folder)
    images: list[Path] = []
    skipped, usable = [], []
    for file in files:
        if _is_image(file):
            images.append(file)
        else:
            skipped.append(f"{file.name} is no image that Pillow reads; left out")
    taken = _spread(images, MAX_PICTURES)
    for file in taken:
        try:
            open_image(file)
        except ImageError as exc:
            skipped.append(f"{exc}; left out")
        else:
            usable.append(file)
    if not usable:
        why = f"none of its {len(files)} files can be read as one" if files else "it is empty"
        raise InputError(f"the calibration folder {folder} must hold images, but {why}; put JPEG or PNG files into it")
    note = f"{len(taken)} of the {len(images)} images in {folder} were taken, evenly spread"
    return Pictures(
        name=folder.resolve().name,
        digest=hashlib.sha256("".join(map(sha256, usable)).encode()).hexdigest(),
        makers=tuple(map(file_picture, usable)),
        skipped=tuple(skipped),
        note=note if len(taken) < len(images) else "",
    )


def _files(folder: Path) -> list[Path]:
    """Files of a folder, by name; not hidden ones, which file managers leave behind."""
    try:
        return sorted(f for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
    except FileNotFoundError as exc:
        raise InputError(f"the calibration folder {folder} doesn't exist; check the path") from exc
    except NotADirectoryError as exc:
        raise InputError(f"calibration needs a folder of images, but {folder} is a file; give its folder") from exc
    except OSError as exc:
        raise InputError(f"the calibration folder {folder} can't be read ({exc}); check its permissions") from exc


def _is_image(file: Path) -> bool:
    """Whether it begins as an image does: thousands of files can be asked, as nothing is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's limit on pixels; open_image has its own
            Image.open(file).close()
    except Image.DecompressionBombError:
        return True
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _spread(files: list[Path], most: int) -> list[Path]:
    """All files, or `most` of them from the first to the last at even distances."""
    if len(files) <= most:
        return files
    return [files[round(i * (len(files) - 1) / (most - 1))] for i in range(most)]
