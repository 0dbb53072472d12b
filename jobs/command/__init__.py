"""The words of the `dpal` command: what may be said, and what is done then."""
