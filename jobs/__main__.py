"""The `dpal` command: one verb, and how its end is told."""

import os
import sys
import traceback
from collections.abc import Sequence

from dpal.base.errors import EXIT_BUG, EXIT_DONE, DpalError, StorageError
from jobs.command.parser import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the return value is the exit code (see `dpal.base.errors`)."""
    arguments = parse(argv)
    try:
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except DpalError as error:
        return _told(arguments.verb, error)
    except KeyboardInterrupt:
        _tell(arguments.verb, "interrupted; run the same command again")
        return 130
    except BrokenPipeError:  # `dpal logs JOB | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except Exception as error:
        known = StorageError.of(error) if isinstance(error, OSError) else None
        if known is not None:
            return _told(arguments.verb, known)
        traceback.print_exc()
        _tell(arguments.verb, "this is a bug; please report the above")
        return EXIT_BUG


def _told(verb: str, error: DpalError) -> int:
    _tell(verb, str(error))
    return error.exit_code


def _tell(verb: str, sentence: str) -> None:
    """One write for the whole line: other ranks write to the same place at the same time."""
    sys.stderr.write(f"dpal {verb}: {sentence}\n")


if __name__ == "__main__":
    sys.exit(main())
