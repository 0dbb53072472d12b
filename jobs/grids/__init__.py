"""What `dpal ablate` does: grid files, the processes of a grid, and its table."""
