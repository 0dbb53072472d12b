"""What `dpal report` does: the parts of a run's page."""
