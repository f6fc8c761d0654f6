#!/usr/bin/env bash
# Build .venv-parity: this library beside transformers, timm, torch (CPU) and mlx-vlm. Does nothing when up to date.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-parity
stamp=$venv/.done
here=tests/parity
wanted=$(cat "$here/setup.sh" "$here/requirements.txt" .ci/constraints.txt pyproject.toml | cksum)
[[ -f $stamp && $(cat "$stamp") == "$wanted" ]] && exit 0

"${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt)

# torch goes first, so that nothing after it looks for another. On Linux the default build brings gigabytes of CUDA
# libraries: point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) where that matters.
"${pip[@]}" torch
"${pip[@]}" --requirement "$here/requirements.txt" --editable .
"${pip[@]}" --no-deps mlx-vlm==0.7.10 peft==0.21.2 accelerate==1.15.0
echo "$wanted" >"$stamp"
