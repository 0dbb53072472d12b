"""Fixtures of the S3 tests."""

from seaweed import s3_server

__all__ = ["s3_server"]
