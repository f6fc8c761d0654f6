"""Push a bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle import MANIFEST, Bundle
from fastvlm_mlx.errors import HubError, InputError
from fastvlm_mlx.hub import REPOSITORY
from fastvlm_mlx.hub_cache import APPLE_NOTICE
from fastvlm_mlx.hub_client import APPLE_LICENCE

CARD = """---
{metadata}
---
# {name}

{origin}, converted for fastvlm-mlx.
{terms}
```python
from fastvlm_mlx import load

model = load("{repo}")
print(model.generate("photo.jpg", "Describe the image."))
```

Changes made to the source:

{changes}
"""
TERMS = """
This is a Model Derivative, for research purposes only; see [LICENSE](LICENSE).
{notice}
"""


def upload(bundle_path: Path, repo: str) -> str:
    """Create the repository if needed; upload a model card, then the bundle's files.

    Files that the repository holds besides are left alone.

    Args:
        bundle_path: a bundle's folder.
        repo: "org/name".

    Returns:
        The address of the commit.

    Raises:
        BundleError: no bundle, or a damaged one. InputError: `repo` can't be a name.
        HubError: no login, no right, no connection.
    """
    from huggingface_hub import HfApi, errors

    bundle = Bundle.open(bundle_path)
    if not REPOSITORY.fullmatch(repo):
        raise InputError(f"{repo!r} is no repository name; give ORG/NAME")
    # The root of httpx, which is no OSError; ValueError: a refused card; RuntimeError: a part that got lost.
    failures = (errors.HTTPError, OSError, ValueError, RuntimeError)  # type: ignore[attr-defined]
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        # The card goes first, so that the weights are never there without their terms.
        card = model_card(bundle, repo).encode()
        api.upload_file(
            path_or_fileobj=card, path_in_repo="README.md", repo_id=repo, commit_message="Add the model card"
        )
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=bundle_path,
            allow_patterns=[*bundle.manifest.files, MANIFEST],  # what else lies in the folder stays here
            commit_message="Add the bundle",
        )
    except failures as exc:
        raise HubError(_explain(exc, repo)) from exc
    return str(commit.commit_url)


def model_card(bundle: Bundle, repo: str) -> str:
    """README.md of the uploaded bundle: source, terms, how to use it, what was changed."""
    manifest = bundle.manifest
    source, revision = manifest.source.id, manifest.source.revision
    metadata = ["library_name: fastvlm-mlx", "pipeline_tag: image-text-to-text"]
    if manifest.licence:
        metadata.append(f"license: {manifest.licence}")
    origin = source
    if REPOSITORY.fullmatch(source):  # the hub refuses a base model that isn't one of its own
        metadata.append(f"base_model: {source}")
        metadata += ["base_model_relation: quantized"] if bundle.config.quantization else []
        origin = f"[{source}](https://huggingface.co/{source})"
    metadata += ["tags:", "- fastvlm", "- mlx"]
    return CARD.format(
        metadata="\n".join(metadata),
        name=repo.partition("/")[2],
        origin=origin + (f" at revision {revision}" if revision else ""),
        terms=TERMS.format(notice=APPLE_NOTICE) if manifest.licence == APPLE_LICENCE else "",
        repo=repo,
        changes="\n".join(f"- {change}" for change in manifest.changes),
    )


def _explain(exc: Exception, repo: str) -> str:
    """One sentence on what is wrong and what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    while isinstance(exc, RuntimeError) and isinstance(exc.__cause__, Exception):
        exc = exc.__cause__  # the client wraps what happened to one of the files
    if isinstance(exc, HfHubHTTPError) and exc.response.status_code in (401, 403):
        return f"you may not write to {repo}; log in with `hf auth login` and a token that may write there"
    if isinstance(exc, HfHubHTTPError):
        return f"can't upload to {repo}: the hub answers with status {exc.response.status_code}; try again later"
    reason = " ".join(str(exc).split()) or type(exc).__name__
    return f"can't upload to {repo}: {reason}"
