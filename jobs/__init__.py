"""Composition root: the `dpal` command and one module per verb."""
