"""Every code block of the README and of docs/ is run, in a folder that holds a finished run.

Python blocks are executed. Of bash blocks, `make` lines are checked with `make -n`, and `dpal`
lines are executed as they stand; docs write commands that take long with `--dry-run`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHOWN = {"text", "yaml", "json", "console"}  # read by people only


class Block(NamedTuple):
    page: str
    number: int
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        for number, (language, text) in enumerate(FENCE.findall(page.read_text())):
            assert language in SHOWN | {"python", "bash"}, f"{page.name}: block in {language!r}"
            if language in languages:
                found.append(Block(page.name, number, language, text))
    return found


def name(block: Block) -> str:
    return f"{block.page}-{block.number}"


@pytest.fixture(scope="module")
def folder(finished_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder as the docs assume it: a finished `runs/demo`, `photos/`, the recipes."""
    place = tmp_path_factory.mktemp("docs")
    (place / "runs").mkdir()
    shutil.copytree(finished_demo, place / "runs" / "demo")
    shutil.copytree(place / "runs/demo/synthetic/persons", place / "photos")
    shutil.copytree(ROOT / "jobs" / "recipes", place / "jobs" / "recipes")
    return place


def run(command: list[str], folder: Path) -> None:
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, (
        f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )


@pytest.mark.parametrize("block", blocks("python"), ids=name)
def test_python_block_runs(block: Block, folder: Path) -> None:
    # timm needs a native torchvision, which a CPU-only torch does not have.
    run([sys.executable, "-c", f"import dpal.model.timm_import\n{block.text}"], folder)


@pytest.mark.parametrize("block", blocks("bash"), ids=name)
def test_bash_block_runs(block: Block, folder: Path) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        assert words[0] in {"make", "dpal"}, f"{block.page}: {line!r} is not a command of ours"
        if words[0] == "make":
            run(["make", "-n", *words[1:]], ROOT)
        else:
            run(words, folder)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(
        r"`((?:dpal|data_tools|jobs|cluster|tests|docs|docker)/[\w./-]+)`", text
    ):
        assert (ROOT / path).exists(), f"{page.name} names {path}"
