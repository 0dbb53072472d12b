"""`dpal report`: one self-contained HTML page about a run."""

import hashlib
import os
import re
from pathlib import Path

from dpal.base.errors import DpalError
from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs.reporting.data import gather
from jobs.reporting.page import DIGEST_META, page
from jobs.stage import StageResult


def run(recipe: Recipe) -> StageResult:
    """Write `report.html` of the run; skipped when nothing that it shows has changed.

    Pictures are drawn first where they are missing or stale. What a run does not have yet
    (scores, pictures, an export) becomes a sentence in the page.
    """
    inputs = gather(recipe, _draw_pictures(recipe), _version())
    target = RunLayout(recipe.run_dir).report
    if _digest_of(target) == inputs.digest:
        return StageResult("report", True, f"{target} is up to date")
    write_atomically(target, page(inputs))
    return StageResult("report", False, f"{target} ({target.stat().st_size / 1e6:.1f} MB)")


def write_atomically(target: Path, text: str) -> None:
    """Write a text file aside, then publish it under its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, target)


def _draw_pictures(recipe: Recipe) -> str:
    """Draw the previews; returns why they could not be drawn, or an empty text."""
    from jobs import preview  # needs torch and a teacher; the page alone does not

    try:
        preview.run(recipe)
    except DpalError as error:
        return str(error)
    return ""


def _version() -> str:
    """Digest of the code and style that make the page, so that a new version draws it anew."""
    here = Path(__file__).parent
    sources = sorted([*here.glob("report*.py"), here / "words.py", *here.glob("page/*")])
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


def _digest_of(page_file: Path) -> str:
    if not page_file.is_file():
        return ""
    with page_file.open(encoding="utf-8", errors="replace") as lines:
        head = lines.read(4096)
    found = re.search(rf'<meta name="{DIGEST_META}" content="([0-9a-f]+)">', head)
    return found.group(1) if found else ""
