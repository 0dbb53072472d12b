"""The metrics endpoint of a stage, as its recipe section asks for it."""

from dpal.base.errors import ConfigError
from dpal.base.telemetry import (
    DATA_SKIPPED,
    DECODE_FALLBACK,
    STORAGE_REFETCHES,
    STORAGE_RETRIES,
    MemoryTelemetry,
    PrometheusTelemetry,
    Telemetry,
)


def open_telemetry(port: int, run: str, key: str) -> Telemetry:
    """Serve the catalogue on `port`, or keep it in memory when `port` is 0.

    Args:
        key: recipe key that `port` comes from, for the error.

    Raises:
        ConfigError: when the port is taken.
    """
    if not port:
        return MemoryTelemetry()
    try:
        telemetry = PrometheusTelemetry(port, run)
    except OSError as error:
        raise ConfigError(
            f"{key}={port}: {error.strerror or error}; accepted is a free port, or 0"
        ) from None
    telemetry.report(DATA_SKIPPED, 0, reason="damaged")
    for counter in (STORAGE_RETRIES, STORAGE_REFETCHES, DECODE_FALLBACK):
        telemetry.report(counter, 0)  # a series from the start: what is absent cannot be watched
    return telemetry
