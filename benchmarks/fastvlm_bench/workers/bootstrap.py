"""Run a side where this package isn't installed: `python -P bootstrap.py SIDE SETUP`.

It makes this package importable, and nothing that is installed beside it: the rival's environment stays its own.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    package = Path(__file__).resolve().parents[1]
    spec = importlib.util.spec_from_file_location(
        package.name, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[package.name] = module
    spec.loader.exec_module(module)
    side = sys.argv.pop(1)
    runpy.run_module(f"{package.name}.workers.{side}", run_name="__main__")
