"""Frozen networks as teachers, the student, and the dynamic pattern decoder."""
