"""Fixtures of the S3 tests."""

from fault_proxy import faulty_server, proxy
from seaweed import s3_server

__all__ = ["faulty_server", "proxy", "s3_server"]
