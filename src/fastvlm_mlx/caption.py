"""A folder of images, one answer each, as lines of JSON: pipelined, and resumable at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.bundle import MANIFEST
from fastvlm_mlx.errors import ContextLengthError, DiskSpaceError, FastVLMError, ImageError, InputError
from fastvlm_mlx.manifest import Manifest
from fastvlm_mlx.types import BATCH_SIZE, IMAGE_SUFFIXES, GenerationOptions

if TYPE_CHECKING:
    from fastvlm_mlx.batch import Request
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.pictures import Picture

READERS = 2  # threads that decode and resize, which Pillow does without Python's lock
_AHEAD = 2  # images that an encoder on other hardware is given before their turn
_ANSWER = ("image", "text", "finish_reason", "tokens")  # of a line; all else tells its job
# What of GenerationOptions doesn't decide an answer, or can't be given for several answers at a time.
_ASIDE = {"progress", "draft", "num_draft_tokens", "kv_bits", "kv_group_size", "max_kv_size", "prefill_step_size"}


@dataclass(frozen=True, slots=True)
class Job:
    """What is asked about every image; a file of answers belongs to one of these.

    Attributes:
        prompt: the question.
        model: name or folder, for who reads the answers.
        model_files: tells the model by what its files hold, see `files_digest`.
        system: replaces the default system prompt.
        resolution: side in pixels, None for the model's own.
        aspect: "pad", "crop", "stretch", "native", "anyres" or None for the model's own.
        grid: of the tiles for "anyres", None for the model's own.
        loading: arguments of `load` that decide what the model computes, such as quantize and dtype.
        options: how to decode.
    """

    prompt: str
    model: str
    model_files: str
    system: str | None = None
    resolution: int | None = None
    aspect: str | None = None
    loading: Mapping[str, object] = field(default_factory=dict)
    options: GenerationOptions = field(default_factory=GenerationOptions)
    grid: str | None = None

    @property
    def record(self) -> dict[str, object]:
        """What each line repeats of it: all that decides an answer, so that those of two jobs don't get mixed up.

        What isn't given is left out; values are what JSON has, a list for a tuple.
        """
        names = ("prompt", "model", "model_files", "system", "resolution", "aspect", "grid")
        decoding = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name not in _ASIDE}
        given = {name: getattr(self, name) for name in names} | dict(self.loading) | decoding
        record: dict[str, object] = json.loads(json.dumps({k: v for k, v in given.items() if v is not None}))
        return record


def files_digest(bundle: Path) -> str:
    """What tells a model wherever its bundle lies: 16 hex digits over the SHA-256 of each file, from its manifest.

    Raises:
        BundleError, ConfigError: no manifest, or a damaged one.
    """
    files = {name: file.sha256 for name, file in Manifest.from_file(bundle / MANIFEST).files.items()}
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Which options two records differ in, from what to what; "" for records of the same job."""

    def tell(record: Mapping[str, object], name: str) -> str:
        return json.dumps(record[name]) if name in record else "not given"

    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if "model_files" not in names and "model" in names:
        names.remove("model")  # another name or path of the same files
    return ", ".join(f"{name} was {tell(before, name)} and is {tell(now, name)} now" for name in names)


def find_images(folder: Path) -> list[str]:
    """Images in a folder and below it, by their path within it, in order; hidden ones are left out.

    Raises:
        InputError: no folder, or no image in it.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give the folder with the images")
    found = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{folder} has no image; known endings are {' '.join(sorted(IMAGE_SUFFIXES))}")
    return found


class AnswerFile:
    """Lines of JSON, each written at once; what a kill left half-written is cut off when it is opened again.

    Args:
        path: of the file; made if need be.
        job: what its lines must be about.
        shared: others may have it open at the same time, to read.

    Attributes:
        done: images that have an answer.

    Raises:
        InputError: it holds something else, or answers to another question, or another process writes to it.
    """

    def __init__(self, path: Path, job: Job, shared: bool = False) -> None:
        self.path, self._record = path, job.record
        self.done: set[str] = set()
        self._lines: list[bytes] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as exc:
            raise InputError(f"can't write to {path}: {exc.strerror}; choose another file with -o") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
            self._read(path, cut=not shared)
        except BlockingIOError as exc:
            os.close(self._file)
            raise InputError(f"another process writes to {path}; wait for it, or choose another file with -o") from exc
        except BaseException:
            os.close(self._file)
            raise

    def add(self, image: str, answer: dict[str, object]) -> None:
        """Append an answer, in one write."""
        line = json.dumps({"image": image} | answer | self._record, ensure_ascii=False) + "\n"
        # A file's name that isn't UTF-8 has lone surrogates in Python; backslashreplace writes them as JSON does.
        self._write(line.encode(errors="backslashreplace"))
        self.done.add(image)

    def take(self, other: AnswerFile) -> None:
        """Append the answers of another file that this one lacks."""
        for line in other._lines:
            image = json.loads(line)["image"]
            if image not in self.done:
                self._write(line + b"\n")
                self.done.add(image)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, data: bytes) -> None:
        if os.write(self._file, data) != len(data):
            raise DiskSpaceError(f"no space left while writing {self.path}; free some space and run it again")

    def _read(self, path: Path, cut: bool) -> None:
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                image, _ = str(entry["image"]), entry["prompt"]
                before = {name: value for name, value in entry.items() if name not in _ANSWER}
            except (ValueError, KeyError, TypeError) as exc:
                raise InputError(f"{path}:{number} is no answer of this command; choose another file with -o") from exc
            if differences := _differences(before, self._record):
                raise InputError(
                    f"{path} holds answers to another job: {differences}; give the same options again, or choose "
                    "another file with -o"
                )
            self.done.add(image)
            self._lines.append(line)
        if cut and len(whole) < len(data):  # only now: it is one of ours
            os.truncate(path, len(whole))


def part_of(out: Path, rank: int) -> Path:
    """Where one of several processes writes its share."""
    return out.with_name(f"{out.stem}.rank{rank}{out.suffix}")


def merge_parts(out: Path, job: Job) -> None:
    """Bring the shares of several processes together; also those that were left by a kill.

    Raises:
        InputError: as `AnswerFile`.
    """
    shares = re.compile(rf"{re.escape(out.stem)}\.rank[0-9]+{re.escape(out.suffix)}")  # as `part_of` calls them
    with closing(AnswerFile(out, job)) as whole:
        for path in sorted(path for path in out.parent.iterdir() if shares.fullmatch(path.name)):
            with closing(AnswerFile(path, job)) as part:
                whole.take(part)
            path.unlink()


def answer_images(
    model: FastVLM,
    folder: Path,
    names: Sequence[str],
    job: Job,
    unreadable: Callable[[str, FastVLMError], object],
    batch_size: int = BATCH_SIZE,
) -> Iterator[tuple[str, dict[str, object]]]:
    """Answer for each image, several at a time; images are read in threads, ahead of their turn.

    They are encoded ahead only by an encoder on other hardware than MLX's (Core ML). In MLX, encoder and decoder share
    a device and take turns: the next image is encoded when an answer has ended and made room for it.

    Args:
        model: answers.
        folder: where the images are.
        names: paths within it.
        job: what to ask, and how.
        unreadable: called for an image that can't be read or fills the context, which is then left out.
        batch_size: answers that are decoded together.

    Yields:
        A name, and its answer's text, finish reason and number of tokens; in the order in which they end.
    """
    from fastvlm_mlx.batch import Request, decode_together

    begun: list[str] = []
    smallest = model.view(job.resolution, job.aspect, job.grid).tokens or 1
    model.positions(job.prompt, [smallest], job.system)  # an error here is one of every image

    def requests() -> Iterator[Request]:
        for name, picture in _read_ahead(model, folder, names, job, unreadable, batch_size):
            try:
                spans = model.positions(job.prompt, [picture.tokens], job.system)
            except ContextLengthError as exc:  # the next one may be of another shape
                unreadable(name, exc)
                continue
            begun.append(name)
            yield Request(spans, [picture])

    for number, result in decode_together(model, requests(), job.options, batch_size):
        answer: dict[str, object] = {"text": result.text, "finish_reason": result.finish_reason}
        yield begun[number], answer | {"tokens": result.generation_tokens}


def _read_ahead(
    model: FastVLM,
    folder: Path,
    names: Sequence[str],
    job: Job,
    unreadable: Callable[[str, FastVLMError], object],
    batch_size: int,
) -> Iterator[tuple[str, Picture]]:
    """Pictures in order, decoded in threads a little ahead of their use."""
    vision, view = model.engine.vision, model.view(job.resolution, job.aspect, job.grid)
    waiting: deque[tuple[str, Future[Picture]]] = deque()
    rest = iter(names)
    with ThreadPoolExecutor(READERS, "fastvlm-read") as readers:
        try:
            while True:
                for name in islice(rest, batch_size + _AHEAD - len(waiting)):
                    waiting.append((name, readers.submit(vision.open, folder / name, view)))
                if not waiting:
                    return
                name, opened = waiting.popleft()
                try:
                    picture = opened.result()
                except (ImageError, ContextLengthError) as exc:
                    unreadable(name, exc)
                    continue
                if vision.runs_beside:
                    for following in [picture, *(f.result() for _, f in islice(waiting, _AHEAD) if _succeeded(f))]:
                        vision.begin(following)
                yield name, picture
        finally:
            for _, opened in waiting:
                opened.cancel()


def _succeeded(future: Future[Picture]) -> bool:
    return future.done() and future.exception() is None
