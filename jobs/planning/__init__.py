"""What `dpal plan` does: rates, a workload, and the arithmetic between them."""
