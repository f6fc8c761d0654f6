"""`python -m mlx_vlm`, for FastVLM of any shape: `python -P mlx_vlm_cli.py generate --model FOLDER ...`."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    from mlx_vlm.models.fastvlm.config import VisionConfig  # the command imports it anyway

    # They are class attributes there and no fields: what config.json says of them is ignored.
    config = Path(sys.argv[sys.argv.index("--model") + 1]) / "config.json"
    shape = json.loads(config.read_text(encoding="utf-8"))["vision_config"]
    VisionConfig.layers, VisionConfig.embed_dims = shape["layers"], shape["embed_dims"]
    runpy.run_module("mlx_vlm", run_name="__main__")
