"""`fastvlm-bench doctor`: what can be checked on this machine alone, as one report for a bug report.

diagnosis.py   all checks in turn
machine.py     the machine, the versions, macOS; mac.py asks macOS
model.py       the bundle and its files
mlx_side.py    MLX's device, FastViTHD in MLX, an answer
coreml_side.py Core ML's times on each compute unit, its features beside MLX's
placement.py   where Core ML's plan puts the ops
worker.py      the child process where whatever may crash or hang is run
report.py      Markdown and JSON, without names of people
"""
