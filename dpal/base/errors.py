"""Errors a user can mend, each with its exit code; anything else is a bug and exits with 1.

Every error takes one string, so it survives a process border (pickle, Ray, a Slurm log).
"""

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_STORAGE = 4
EXIT_RUN_AGAIN = 75


class DpalError(Exception):
    """Base of all errors that end a command with one sentence instead of a traceback."""

    exit_code = EXIT_BUG


class ConfigError(DpalError):
    """A recipe, argument or weights file that does not fit; mended by editing what it names."""

    exit_code = EXIT_CONFIG


class DataError(DpalError):
    """Images, shards or targets that are missing, damaged, or belong to something else."""

    exit_code = EXIT_DATA


class StorageError(DpalError):
    """Storage that refuses, cannot be reached, or is full."""

    exit_code = EXIT_STORAGE


class StopRequested(DpalError):
    """The run stopped because it was asked to, with its state committed; run it again."""

    exit_code = EXIT_RUN_AGAIN
