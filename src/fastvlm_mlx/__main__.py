"""`python -m fastvlm_mlx`: the same as `fastvlm`."""

from fastvlm_mlx.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
