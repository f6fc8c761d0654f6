"""A model's name becomes a local bundle: embedded, a folder, or downloaded (and converted) from the hub."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import fastvlm_zoo
from fastvlm_mlx import hub_cache as cache
from fastvlm_mlx.bundle import CONFIG, MANIFEST
from fastvlm_mlx.converter import run_converter
from fastvlm_mlx.errors import BundleError, HubError, InputError
from fastvlm_mlx.hub_client import APPLE_LICENCE, UnreachableError, download, is_offline, list_repository

_DEFAULT_REVISION = "main"
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_noted: set[str] = set()  # models whose note this process has printed


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A known model; `where` is "embedded", "converted", "downloaded" or "not downloaded".

    `bytes` is its size on disk or, where it isn't there, what would be downloaded.
    """

    name: str
    repo: str | None
    revision: str | None
    parameters: str
    licence: str | None
    where: str
    path: Path | None
    bytes: int
    note: str | None


def resolve(
    model: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Find a model's bundle; download and convert the model where that hasn't been done yet.

    Args:
        model: None for the embedded default; the folder of a bundle; a name of the zoo; or "org/name" on the
            Hugging Face hub, whether that repository holds a bundle or a published checkpoint.
        revision: commit, branch or tag on the hub, asked for anew each time; default the commit that was
            downloaded first, which a later move of the branch doesn't change.
        local_files_only: never go to the network.

    Returns:
        The folder of a bundle: the one given, a snapshot in the hub's own cache, or
        `cache_dir()/converted/ORG--NAME/COMMIT`.

    Raises:
        BundleError: no such folder, a folder that is no bundle, or an unknown name.
        InputError: a revision for something that isn't on the hub.
        HubError: the hub can't be reached, hasn't got it, won't give it, or what it gave can't be converted.
    """
    path = _local_path(model)
    entry = None if path else fastvlm_zoo.default() if model is None else _find_entry(str(model))
    if entry:
        _print_note(entry)
        path = entry.path
    if path:
        if revision is not None:
            raise InputError(f"revision {revision!r} is for models on the hub; {path} is a local folder")
        return _check_folder(path)
    repo = entry.repo if entry and entry.repo else str(model)
    if not REPOSITORY.fullmatch(repo):
        raise BundleError(f"no model is called {repo!r}; {_expected()}")
    wanted = revision or (entry.revision if entry else None) or _DEFAULT_REVISION
    if local_files_only or is_offline():
        return _from_cache(repo, wanted)
    if revision is None and (pinned := cache.read_record(repo).revisions.get(wanted)):
        # Pinned to the commit of the first download: the same weights tomorrow, and no question to the hub.
        try:
            return _from_cache(repo, wanted)
        except HubError:
            wanted = pinned  # deleted since; that commit again
    return _from_hub(repo, wanted, entry)


def list_models() -> list[ModelInfo]:
    """The zoo's models, then what else was downloaded; the network isn't asked."""
    zoo = fastvlm_zoo.entries()
    models = [_describe_entry(entry) for entry in zoo]
    for repo in cache.known_repositories():
        if repo in {entry.repo for entry in zoo}:
            continue
        record = cache.read_record(repo)
        revision = next(reversed(record.revisions), _DEFAULT_REVISION)
        where, path = _locate(repo, revision)
        if path:
            models.append(ModelInfo(repo, repo, revision, "", record.licence, where, path, _folder_bytes(path), None))
    return models


def _describe_entry(entry: fastvlm_zoo.Entry) -> ModelInfo:
    where, path = "embedded", entry.path
    if entry.repo and entry.revision:
        where, path = _locate(entry.repo, entry.revision)
    size = _folder_bytes(path) if path else entry.download_bytes
    return ModelInfo(
        entry.name, entry.repo, entry.revision, entry.parameters, entry.licence, where, path, size, entry.note
    )  # fmt: skip


def _locate(repo: str, revision: str) -> tuple[str, Path | None]:
    commit = cache.read_record(repo).commit(revision)
    if path := cache.converted(repo, commit) or cache.newest_converted(repo):
        return "converted", path
    if path := cache.snapshot(repo, revision):
        return "downloaded", path
    return "not downloaded", None


def _folder_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _local_path(model: str | os.PathLike[str] | None) -> Path | None:
    """The folder that is meant, None where a name is meant."""
    if model is None:
        return None
    text = os.fspath(model)
    path = Path(os.path.expanduser(text))  # noqa: PTH111 (Path.expanduser raises for an unknown ~user)
    explicit = text.startswith(("./", "../", "/", "~")) or text.count(os.sep) > 1
    return path if explicit or not isinstance(model, str) or (text and path.exists()) else None


def _check_folder(path: Path) -> Path:
    if (path / MANIFEST).is_file():
        return path
    if (path / CONFIG).is_file():
        raise BundleError(f"{path} is a checkpoint that isn't converted yet; run `fastvlm-convert {path}`")
    if not path.exists():
        raise BundleError(f"there is no {path}; {_expected()}")
    raise BundleError(f"{path} is no bundle: it has no {MANIFEST}; give a folder that fastvlm-convert wrote")


def _find_entry(name: str) -> fastvlm_zoo.Entry | None:
    """A model of the zoo by its name or its repository; capitals don't matter, as on the hub."""
    known = {text.lower(): e for e in fastvlm_zoo.entries() for text in (e.name, e.repo) if text}
    return known.get(name.lower())


def _expected() -> str:
    names = ", ".join(entry.name for entry in fastvlm_zoo.entries())
    return f"give the folder of a bundle, ORG/NAME on the hub, or one of {names}"


def _print_note(entry: fastvlm_zoo.Entry) -> None:
    if entry.note and entry.name not in _noted:
        _noted.add(entry.name)
        print(f"{entry.name}: {entry.note}", file=sys.stderr)


def _from_cache(repo: str, revision: str) -> Path:
    if folder := cache.converted(repo, cache.read_record(repo).commit(revision)):
        return folder
    if snapshot := cache.snapshot(repo, revision):
        return _as_bundle(repo, snapshot)
    # All but the converted bundle may have been deleted to save space.
    if revision == _DEFAULT_REVISION and (folder := cache.newest_converted(repo)):
        return folder
    raise HubError(f"{repo} ({revision}) isn't, or not completely, on this disk; load it once with the network")


def _from_hub(repo: str, revision: str, entry: fastvlm_zoo.Entry | None) -> Path:
    """Download what is missing; a commit that was converted before needs nothing of its source any more."""
    try:
        listing = list_repository(repo, revision)
    except UnreachableError as exc:
        try:
            folder = _from_cache(repo, revision)
        except HubError:
            raise exc from exc.__cause__  # what is wrong is the network
        print(f"the hub can't be reached; using what was downloaded of {repo}", file=sys.stderr)
        return folder
    licence = entry.licence if entry else listing.licence
    record = cache.read_record(repo)
    record = replace(record, files={**record.files, listing.commit: listing.files})
    cache.write_record(repo, record)  # before: what an interrupted download lacks must be known
    if not (found := cache.converted(repo, listing.commit)):
        if licence == APPLE_LICENCE:
            cache.show_terms(repo)
        found = download(repo, revision, listing.files)
    # The folder's name, since the branch may have moved on after it was listed.
    revisions = {**record.revisions, revision: found.name}
    cache.write_record(repo, replace(record, revisions=revisions, licence=licence))
    return _as_bundle(repo, found)


def _as_bundle(repo: str, snapshot: Path) -> Path:
    """The snapshot itself if it is a bundle, else what it converts to."""
    if cache.bundle_format(snapshot) is not None:
        return snapshot
    commit = snapshot.name
    if folder := cache.converted(repo, commit):
        return folder
    target = cache.converted_path(repo, commit)
    print(f"converting {repo} into {target}; later starts find it there", file=sys.stderr)
    arguments = [str(snapshot), "-o", str(target), "--source-id", repo, "--revision", commit]
    if licence := cache.read_record(repo).licence:
        arguments += ["--licence", licence]
    if sys.platform != "darwin":
        arguments.append("--no-coreml")  # nothing here could run it
    try:
        code = run_converter(arguments, silent=True)  # stdout is for answers
    except OSError as exc:
        raise HubError(f"can't start the converter of {repo}, {sys.executable}: {exc}") from exc
    if code:
        raise HubError(f"{repo} can't be converted (exit code {code}); `fastvlm-convert {snapshot}` says why")
    return target
