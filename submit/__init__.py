"""Submit scripts to SLURM through submitit."""
