"""Adapters, one for each way in which person images lie about; `open_source` chooses one."""

from data_tools.sources.opening import open_source

__all__ = ["open_source"]
