"""The resolved recipe in the run folder, from which other commands and processes go on."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from dpal.base.errors import StorageError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe


def save_recipe(recipe: Recipe) -> Path:
    """Write `<run>/recipe.yaml`, without credentials, unless it says the same already."""
    path, text = RunLayout(recipe.run_dir).recipe, recipe.to_yaml()
    # Host and process: two pods that share a volume may have the same process number.
    aside = path.with_suffix(f".{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        if path.exists() and path.read_text() == text:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):  # its folder may be a file
            aside.unlink(missing_ok=True)
        raise StorageError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return path


def credentials(recipe: Recipe) -> dict[str, str]:
    """The recipe's storage credentials as the AWS variables a child process reads."""
    values = {
        "AWS_ACCESS_KEY_ID": recipe.storage.key.get_secret_value(),
        "AWS_SECRET_ACCESS_KEY": recipe.storage.secret.get_secret_value(),
    }
    return {name: value for name, value in values.items() if value}
