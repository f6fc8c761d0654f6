"""What of the hub is on this disk: snapshots, what they were converted to, and the terms that were shown."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastvlm_mlx.bundle import CONFIG, MANIFEST
from fastvlm_mlx.config import FORMAT_VERSION
from fastvlm_mlx.files import cache_dir, write_text

APPLE_NOTICE = (  # the licence asks that every copy carries this sentence
    "Apple Machine Learning Research Model is licensed under the "
    "Apple Machine Learning Research Model License Agreement."
)
# What a snapshot may lack where another program downloaded it, so that nothing says which files are needed.
_UNNEEDED = ["*.md", ".git*", "*.py", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.onnx*"]


@dataclass(frozen=True, slots=True)
class Record:
    """What was downloaded of a repository, so that a start without network can tell.

    Attributes:
        revisions: what was asked for -> the commit that it was then; written when all of it has arrived.
        files: commit -> the files that are needed of it; written before they are fetched.
        licence: short name of the terms.
    """

    revisions: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    licence: str | None = None

    def commit(self, revision: str) -> str:
        """The commit that a branch was when it was downloaded; a commit is itself."""
        return self.revisions.get(revision, revision)


def read_record(repo: str) -> Record:
    """What is known of a repository; an empty record where nothing is, or the file is damaged."""
    try:
        return Record(**json.loads(_record_file(repo).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Record()


def write_record(repo: str, record: Record) -> None:
    """Remember a download; an unwritable cache only costs later starts a question to the hub."""
    try:
        write_text(_record_file(repo), json.dumps(asdict(record), indent=2))
    except OSError:
        return


def known_repositories() -> list[str]:
    """Every repository that something was downloaded of."""
    slugs = {folder.name for folder in (cache_dir() / "converted").glob("*--*")}
    slugs |= {file.stem for file in (cache_dir() / "hub").glob("*--*.json")}
    return sorted(slug.replace("--", "/", 1) for slug in slugs)  # the hub allows no "--" in names


def converted_path(repo: str, commit: str) -> Path:
    """Where the bundle made of a commit belongs."""
    return cache_dir() / "converted" / _slug(repo) / commit


def converted(repo: str, commit: str) -> Path | None:
    """The bundle made of a commit, None where there is none that this version reads."""
    path = converted_path(repo, commit)
    return path if bundle_format(path) == FORMAT_VERSION else None


def newest_converted(repo: str) -> Path | None:
    """The bundle made last of any of a repository's commits."""
    manifests = (cache_dir() / "converted" / _slug(repo)).glob(f"[!.]*/{MANIFEST}")
    newest_first = sorted(manifests, key=lambda file: file.stat().st_mtime, reverse=True)
    return next((f for m in newest_first if (f := converted(repo, m.parent.name))), None)


def snapshot(repo: str, revision: str) -> Path | None:
    """The snapshot in the hub's own cache, None where files are missing; never goes to the network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    record = read_record(repo)
    commit = record.commit(revision)
    files = record.files.get(commit)
    try:
        found = snapshot_download(
            repo,
            revision=commit,
            local_files_only=True,
            allow_patterns=files,
            ignore_patterns=None if files else _UNNEEDED,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    folder = Path(found)
    needed = record.files.get(folder.name, [CONFIG])
    return folder if all((folder / name).exists() for name in needed) else None


def bundle_format(folder: Path) -> object:
    """The format version of the bundle in a folder, None where it holds no bundle."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_ours = (folder / MANIFEST).is_file() and isinstance(config, dict)
    return config.get("format_version") if is_ours else None


def show_terms(repo: str) -> None:
    """Print what Apple's research licence asks for, once per repository and machine."""
    shown = cache_dir() / "licences" / f"{_slug(repo)}.txt"
    if shown.exists():
        return
    terms = f"https://huggingface.co/{repo}/blob/main/LICENSE"
    text = f"{repo} is for research purposes only; its terms: {terms}\n{APPLE_NOTICE}"
    print(text, file=sys.stderr)
    try:
        write_text(shown, text + "\n")
    except OSError:
        return  # then they are shown again


def _record_file(repo: str) -> Path:
    return cache_dir() / "hub" / f"{_slug(repo)}.json"


def _slug(repo: str) -> str:
    return repo.replace("/", "--")
