"""`python -m fastvlm_bench`: the same as `fastvlm-bench`."""

from fastvlm_bench.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
