"""Fixtures of the S3 tests."""

from collections.abc import Iterator

import pytest

from fault_proxy import FaultProxy
from seaweed import S3Server, s3_server

__all__ = ["faulty_server", "proxy", "s3_server"]


@pytest.fixture(scope="session")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """The one proxy in front of the S3 server; each test sets its schedule."""
    with FaultProxy(s3_server.endpoint).running() as proxy:
        yield proxy


@pytest.fixture
def faulty_server(s3_server: S3Server, proxy: FaultProxy) -> S3Server:
    """The S3 server behind the proxy."""
    return s3_server._replace(endpoint=proxy.endpoint)
