"""The beds that runs are tried on: a real Slurm of some release, at some site, on nodes of some kind; and what is
done to runs there. Used by tests and by scripts/matrix."""
