"""Push a bundle to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import HubError

CARD = """---
library_name: fastvlm-mlx
pipeline_tag: image-text-to-text
base_model: {source}
{licence}tags: [fastvlm, mlx]
---
# {name}

{source} converted for [fastvlm-mlx]. {notice}

```python
from fastvlm_mlx import load

model = load("{repo}")
print(model.generate("photo.jpg", "Describe the image."))
```

Changes made:
{changes}
"""


def upload(bundle_path: Path, repo: str) -> str:
    """Create the repository if needed and upload the bundle with a model card.

    Args:
        bundle_path: a bundle's folder.
        repo: "org/name".

    Returns:
        The address of the commit.

    Raises:
        HubError: no login, no right, no connection.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    bundle = Bundle.open(bundle_path)
    api = HfApi()
    try:
        api.create_repo(repo, exist_ok=True)
        api.upload_file(
            path_or_fileobj=model_card(bundle, repo).encode(), path_in_repo="README.md", repo_id=repo,
            commit_message="Add the model card",
        )  # fmt: skip
        commit = api.upload_folder(repo_id=repo, folder_path=bundle_path, commit_message="Add the bundle")
    except HFValidationError as exc:
        raise HubError(f"{repo!r} is no repository name: {exc}; give ORG/NAME") from exc
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as exc:
        raise HubError(f"can't upload to {repo}: {exc}; log in with `hf auth login` and try again") from exc
    return str(commit.commit_url)


def model_card(bundle: Bundle, repo: str) -> str:
    """README.md of the uploaded bundle: source, licence, how to use it, what was changed."""
    manifest = bundle.manifest
    licence = ""
    if manifest.licence:
        licence = f"license: {manifest.licence}\nlicense_name: {manifest.licence}\nlicense_link: LICENSE\n"
    notice = (bundle.path / "NOTICE").read_text(encoding="utf-8") if bundle.has("NOTICE") else ""
    return CARD.format(
        source=manifest.source.id,
        licence=licence,
        name=repo.partition("/")[2] or repo,
        notice=notice.partition("\n")[0],
        repo=repo,
        changes="\n".join(f"- {change}" for change in manifest.changes),
    )
