"""From published FastVLM checkpoints to bundles that fastvlm_mlx loads."""
