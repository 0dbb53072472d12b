"""Where a job runs and how it is watched; torch-free."""
