"""Frozen-feature evaluation: one file per downstream task."""
