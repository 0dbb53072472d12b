"""Errors a user can mend, each with its exit code; anything else is a bug and exits with 1.

Every error takes one string, so it survives a process border (pickle, Ray, a Slurm log).
"""

import errno

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_STORAGE = 4
EXIT_RUN_AGAIN = 75

# A disk or folder that a user can mend; a missing file (ENOENT) is always checked for by name.
_MENDABLE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
    errno.ESTALE,
}


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

    @classmethod
    def of(cls, error: OSError) -> "StorageError | None":
        """What the file system said, in one sentence; None for what only a bug can cause."""
        if error.errno not in _MENDABLE:
            return None
        where = f"cannot use {str(error.filename)!r}: " if error.filename is not None else ""
        return cls(f"{where}{error.strerror}")


class StopRequested(DpalError):
    """The run stopped because it was asked to, with its state committed; run it again."""

    exit_code = EXIT_RUN_AGAIN
