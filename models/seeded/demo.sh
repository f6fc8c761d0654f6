#!/usr/bin/env bash
# From a checkpoint as published to an answer about a photograph, every step as a user would type it.
#   demo.sh BIN     BIN: the folder of the environment's commands
set -euo pipefail
bin=$1
photo=build/astronaut.png

# Show a command, then run it from the environment.
show() {
    printf '\n$'
    printf ' %q' "$@"
    printf '\n'
    "$bin/$1" "${@:2}"
}

mkdir -p build
"$bin/python" models/seeded/make_checkpoint.py build/seeded-tiny
cp "$("$bin/python" -c 'import skimage; print(skimage.data_dir)')/astronaut.png" "$photo"

show fastvlm-convert build/seeded-tiny --no-coreml

echo
echo "The weights are seeded random numbers: the answers below mean nothing. What they show is that everything works."
show fastvlm generate --model models/converted/seeded-tiny --image "$photo" \
    --prompt "What is in this picture?" --max-tokens 24 --stats
show fastvlm-bench --resolution 256,512
