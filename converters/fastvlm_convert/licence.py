"""The terms that come with the weights: copied, named, and never lost on the way."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fastvlm_mlx.hub_cache import APPLE_NOTICE
from fastvlm_mlx.hub_client import APPLE_LICENCE

APPLE_MARK = "Apple Machine Learning Research Model"


def copy_licence(
    source: Path, target: Path, source_id: str, changes: Sequence[str], declared: str | None = None
) -> str | None:
    """Copy LICENSE* and NOTICE*; write the notice and change record that Apple's licence asks for.

    Args:
        source: the checkpoint folder.
        target: the bundle being written.
        source_id: the name to give the source.
        changes: what the conversion did, in words.
        declared: short name of the terms by the source's page, for a source whose files don't hold them.

    Returns:
        The licence's short name, None where the source ships none that is known.
    """
    texts: list[str] = []
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE")):
            shutil.copyfile(file, target / file.name)
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
    if declared != APPLE_LICENCE and not any(APPLE_MARK in text for text in texts):
        return declared
    lines = [
        APPLE_NOTICE,
        "",
        f"This is a Model Derivative of {source_id}, for research purposes only. Changes made:",
    ]
    notice = target / "NOTICE"
    before = notice.read_text(encoding="utf-8", errors="replace") + "\n" if notice.exists() else ""
    notice.write_text(before + "\n".join([*lines, *(f"- {change}" for change in changes)]) + "\n", encoding="utf-8")
    return APPLE_LICENCE
