#!/usr/bin/env bash
# Build .venv-compare/NAME for each library that `fastvlm-bench compare` knows, or for those named as arguments.
# Each has the library as its users get it and nothing of the others. Does nothing where it is up to date.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=benchmarks/environments

rivals=("$@")
[[ $# == 0 ]] && rivals=(mlx-vlm transformers mlx-lm)
for rival in "${rivals[@]}"; do
    venv=.venv-compare/$rival
    wanted=$(cat "$here/setup.sh" "$here/$rival.txt" .ci/constraints.txt | cksum)
    [[ -f $venv/.done && $(cat "$venv/.done") == "$wanted" ]] && continue
    "${PYTHON:-python3}" -m venv "$venv"
    pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --constraint .ci/constraints.txt)
    # torch goes first, so that nothing after it looks for another. On Linux the default build brings gigabytes
    # of CUDA libraries: point pip at PyTorch's CPU wheels (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS) where that matters.
    if [[ $rival == transformers ]]; then "${pip[@]}" torch; fi
    "${pip[@]}" --requirement "$here/$rival.txt"
    # Its server, audio and training packages aren't needed here.
    if [[ $rival == mlx-vlm ]]; then "${pip[@]}" --no-deps mlx-vlm==0.7.10; fi
    echo "$wanted" >"$venv/.done"
done
