"""Questions to the Hugging Face hub, downloads, and what goes wrong with them in one sentence each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fastvlm_mlx.bundle import CONFIG
from fastvlm_mlx.errors import BundleError, HubError

APPLE_LICENCE = "apple-amlr"
_TIMEOUT_S = 30.0
_PACKAGES = ("vision.mlpackage/", "fastvithd.mlpackage/")  # a bundle's, and Apple's own
_SMALL_FILES = r".*\.json|merges\.txt|tokenizer\.model|(?i:licen[sc]e|notice).*"


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository as the hub describes it, and the files of it that are needed."""

    commit: str
    files: list[str]
    licence: str | None


class UnreachableError(HubError):
    """The hub gives no answer, so that what was downloaded before has to do."""


def is_offline() -> bool:
    """Whether the user told the hub's client to stay off the network ($HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def list_repository(repo: str, revision: str) -> Listing:
    """Ask the hub what a repository holds.

    Raises:
        BundleError: the name can't be a repository's.
        UnreachableError: no answer. HubError: an answer, but no.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S)
    except HFValidationError as exc:
        raise BundleError(f"{repo!r} can't be the name of a repository; give ORG/NAME") from exc
    except _failures() as exc:
        raise _explain(exc, repo, revision) from exc
    names = [sibling.rfilename for sibling in info.siblings or []]
    files = select_files(names)
    if CONFIG not in files or not info.sha:
        found = ", ".join(names[:5]) or "nothing"
        raise HubError(f"{repo} holds no FastVLM: {CONFIG} and weights are expected, found {found}")
    licences = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    card = info.card_data
    licences += [str(card[key]) for key in ("license", "license_name") if card and card.get(key)]
    licence = APPLE_LICENCE if APPLE_LICENCE in licences else next(iter(licences), None)
    return Listing(info.sha, files, licence)


def select_files(names: list[str]) -> list[str]:
    """The files of a repository that a bundle or a converter needs, and the terms they come under.

    No pictures, code or copies of the weights for other programs;
    `.bin` shards only where there are no others.
    """
    weights = r".*\.safetensors"
    if not any("/" not in name and name.endswith(".safetensors") for name in names):
        weights = r"pytorch_model.*\.bin"
    needed = re.compile(f"{_SMALL_FILES}|{weights}")
    return [n for n in names if n.startswith(_PACKAGES) or ("/" not in n and needed.fullmatch(n))]


def download(repo: str, revision: str, files: list[str]) -> Path:
    """Bring these files into the hub's own cache, with its progress bars.

    Returns:
        The snapshot's folder, named by the commit.

    Raises:
        HubError: with what to do about it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except _failures() as exc:
        raise _explain(exc, repo, revision) from exc


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises where the network, the hub or the disk fails."""
    from huggingface_hub import errors

    # httpx's root, which isn't an OSError; hf_xet, which moves the bytes, raises RuntimeError
    return (errors.HTTPError, OSError, RuntimeError)  # type: ignore[attr-defined]


def _explain(exc: Exception, repo: str, revision: str) -> HubError:
    """One sentence on what is wrong and what to do."""
    from huggingface_hub import errors

    page, log_in = f"https://huggingface.co/{repo}", "log in with `hf auth login`"
    if isinstance(exc, errors.GatedRepoError):
        return HubError(f"{repo} is gated: ask for access at {page}, then {log_in}")
    if isinstance(exc, errors.RepositoryNotFoundError):
        return HubError(f"the hub has no {repo}, or it is private; check the name, or {log_in}")
    if isinstance(exc, errors.RevisionNotFoundError):
        return HubError(f"{repo} has no revision {revision!r}; see {page}/commits/main")
    if isinstance(exc, errors.HfHubHTTPError):
        status = exc.response.status_code
        if status >= 500 or status == 429:
            return UnreachableError(f"the hub answers {repo} with status {status}; try again later")
        return HubError(f"the hub refuses {repo} with status {status}; {log_in}")
    if isinstance(exc, errors.LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception):
        return _explain(exc.__cause__, repo, revision)  # the client looked into its cache first
    reason = str(exc).partition("\n")[0] or type(exc).__name__
    if isinstance(exc, OSError) and exc.errno and not isinstance(exc, ConnectionError | TimeoutError):
        return HubError(f"can't store {repo}: {reason}")
    return UnreachableError(
        f"can't reach the Hugging Face hub for {repo} ({reason}); check the network, or the path if a folder was meant"
    )
