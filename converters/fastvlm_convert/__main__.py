"""`python -m fastvlm_convert`: the same as `fastvlm-convert`."""

from fastvlm_convert.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
