"""File systems of fsspec, set up for this project: no cache, no retries of their own."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any

import fsspec
from fsspec.asyn import sync

from dpal.base.errors import ConfigError
from dpal.base.inputs import Storage


def check_scheme(url: str) -> None:
    """Raise ConfigError unless there is a file system for the URL."""
    scheme = url.partition("://")[0]
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError):
        raise ConfigError(
            f"storage url {url!r}: scheme {scheme!r} is unknown or its fsspec package is not "
            "installed; accepted are a local path, file://, s3://"
        ) from None


def open_filesystem(url: str, storage: Storage) -> Any:
    """A file system for a URL: of this caller alone, and asked anew at every call."""
    scheme = url.partition("://")[0]
    if scheme not in ("s3", "s3a"):
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False)
    config: dict[str, Any] = {
        "connect_timeout": storage.timeout_s,
        "read_timeout": storage.timeout_s,
        "signature_version": "s3v4",  # of signed URLs too
        "retries": {"total_max_attempts": 1},  # retries are counted and bounded here, once
    }
    variables = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    if storage.endpoint_url or any(os.environ.get(name) for name in variables):
        config["s3"] = {"addressing_style": "path"}
    filesystem = fsspec.filesystem(
        "s3",
        endpoint_url=storage.endpoint_url or None,
        key=storage.key.get_secret_value() or None,
        secret=storage.secret.get_secret_value() or None,
        config_kwargs=config,
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    filesystem.retries = 1
    return filesystem


def within(seconds: float, fs: Any, request: Callable[[], Awaitable[Any]]) -> Any:
    """Run a request of an asynchronous file system, cancelled when it takes too long."""

    async def bounded() -> Any:
        return await asyncio.wait_for(request(), seconds)

    return sync(fs.loop, bounded)
