"""Files on disk: hashes, folders that appear whole or not at all, and where caches live."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastvlm_mlx.errors import DiskSpaceError, InputError

CHUNK_BYTES = 8 << 20


def file_at(path: str | os.PathLike[str]) -> Path:
    """The file that a path stands for; `~` is the home folder."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for an unknown ~user)


def cache_dir() -> Path:
    """Folder for converted hub models and other things that can be made again.

    `$FASTVLM_CACHE` if set, else `~/Library/Caches/fastvlm-mlx` on macOS, else `$XDG_CACHE_HOME/fastvlm-mlx`
    (default `~/.cache`).
    """
    if chosen := os.environ.get("FASTVLM_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "fastvlm-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "fastvlm-mlx"


def sha256(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, in hex; `progress` is called with the bytes of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if progress:
                progress(len(chunk))
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a kill, meets the old content or the new one, never a part."""
    with replaced_file(path) as file:
        file.write(text.encode())


@contextmanager
def replaced_file(path: Path) -> Iterator[BinaryIO]:
    """Give a temporary file beside `path` to write in; put it in `path`'s place at the end, if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        # mkstemp makes it private; it is an ordinary file, or stays as open as it was.
        Path(temporary).chmod(path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def require_space(folder: Path, needed_bytes: int) -> None:
    """Raise DiskSpaceError, before anything is written, if `folder`'s disk lacks `needed_bytes`."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"the output needs {needed_bytes / 1e6:.0f} MB, {folder} has {free / 1e6:.0f} MB free; "
            "free some space or choose another place with -o"
        )


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` to write in; put it in `target`'s place at the end.

    After an error nothing is left and an older `target` stands as it was. After a kill at any moment
    `target` is the old folder or the new one, or it is missing while the old one waits as
    `.NAME.previous`, which the next call puts back. Leftovers of killed runs are removed.

    A link as `target` stays; what it points to is replaced.

    Raises:
        DiskSpaceError: the disk was full. InputError: there is no right to write there.
    """
    target = target.resolve()
    previous = target.with_name(f".{target.name}.previous")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(target)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_marker(target)}{os.getpid()}-", dir=target.parent))
    except (PermissionError, FileExistsError, NotADirectoryError) as exc:
        raise InputError(f"can't write to {target.parent}: {exc.strerror}; choose another place with -o") from exc
    temporary.chmod(0o777 & ~_umask())  # mkdtemp makes it private; the bundle is an ordinary folder
    try:
        yield temporary
        if target.exists():
            target.rename(previous)
        temporary.rename(target)
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskSpaceError(
                f"no space left while writing {target}; free some space or choose another place with -o"
            ) from exc
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(target)


def recover_folder(target: Path) -> None:
    """Finish what a killed `replaced_folder` left: put the old folder back, remove half-written ones."""
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists():
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)
    for leftover in target.parent.glob(f"{glob.escape(_marker(target))}*"):
        owner = leftover.name.removeprefix(_marker(target)).partition("-")[0]
        if not (owner.isdigit() and _is_running(int(owner))):
            shutil.rmtree(leftover, ignore_errors=True)


def _marker(target: Path) -> str:
    """How half-written folders beside a target begin; process ids mean something on their own machine only."""
    return f".{target.name}.partial-{platform.node() or 'local'}-"


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
