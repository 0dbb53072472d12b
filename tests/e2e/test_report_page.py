"""The report in a real browser: it shows everything, and asks nobody for anything."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpal.base.layout import RunLayout
from dpal.base.recipe import Recipe
from jobs import report
from jobs.reporting.data import gather, read_history
from jobs.reporting.page import page

from made_up_run import made_up_recipe, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
OUTSIDE = "http://127.0.0.1:9/x.png"  # the discard port: refused at once
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

PROBE = """<script>
const refused = [];
document.addEventListener("securitypolicyviolation", (e) => refused.push(e.blockedURI));
addEventListener("load", async () => {
  const charts = [...document.querySelectorAll("[data-chart]")].map((chart) => {
    const svg = chart.querySelector("svg"), box = svg.getBoundingClientRect();
    const at = { clientX: box.left + box.width / 2, clientY: box.top + 30 };
    svg.dispatchEvent(new PointerEvent("pointermove", at));
    return chart.querySelector(".tip").innerText;
  });
  await new Promise((done) => setTimeout(done, 50));
  const requested = performance.getEntriesByType("resource").map((entry) => entry.name)
    .filter((name) => !name.startsWith("data:"));
  const images = [...document.images].map((image) => image.naturalWidth);
  const overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  const paper = getComputedStyle(document.body).backgroundColor;
  const pre = document.createElement("pre");
  pre.id = "probe";
  pre.textContent = JSON.stringify({ charts, images, overflow, refused, requested, paper });
  document.body.append(pre);
});
</script>"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    made_up = made_up_recipe(tmp_path_factory.mktemp("runs"))
    write_run(made_up)
    return made_up


@pytest.fixture(scope="module")
def text(recipe: Recipe) -> str:
    return page(gather(recipe))


def _look(text: str, folder: Path, *, width: int = 1200, dark: bool = False) -> dict[str, Any]:
    """Open the page with the probe in it; returns what the probe saw, and the DOM."""
    file = folder / "report.html"
    file.write_text(text.replace("<title>", f"{PROBE}<title>", 1))
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={1 - dark}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    assert probe is not None, done.stderr[-2000:]
    return {**json.loads(html.unescape(probe.group(1))), "dom": done.stdout}


def _without_policy(text: str) -> str:
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert bare != text
    return bare


@needs_browser
def test_page_shows_numbers_pictures_and_charts_and_requests_nothing(text: str, tmp_path: Path):
    seen = _look(_without_policy(text), tmp_path)  # the policy would hide a request
    assert seen["requested"] == []
    assert len(seen["images"]) == 3
    assert min(seen["images"]) > 300
    assert seen["overflow"] <= 0
    for headline in ("63.7", "52.9", "untrained 21.3", "teacher 81.0", "5.51", "300"):
        assert f">{headline}<" in seen["dom"], headline
    assert len(seen["charts"]) == 9
    for tip in seen["charts"]:
        assert re.match(r"step \d+\n", tip), tip
    router = next(tip for tip in seen["charts"] if "identity" in tip)
    assert re.search(r"identity 0\.\d+\nshape 0\.\d+\nrelation 0\.\d+", router)


@needs_browser
def test_phone_in_the_dark_has_no_sideways_scroll(text: str, tmp_path: Path):
    dark = _look(text, tmp_path, width=500, dark=True)
    assert dark["overflow"] <= 0
    assert dark["refused"] == []
    assert max(int(value) for value in re.findall(r"\d+", dark["paper"])) < 40


@needs_browser
@pytest.mark.parametrize("policy", [True, False])
def test_an_outside_request_or_a_broken_picture_is_noticed(text: str, tmp_path: Path, policy: bool):
    spoilt = text.replace("</header>", f'</header><img src="{OUTSIDE}">', 1)
    spoilt = re.sub(r"data:image/webp;base64,.{40}", "data:image/webp;base64,AAAA", spoilt, count=1)
    seen = _look(spoilt if policy else _without_policy(spoilt), tmp_path)
    assert seen["refused"] == ([OUTSIDE] if policy else [])
    assert seen["requested"] == [OUTSIDE]
    assert seen["images"].count(0) == 2


def test_page_names_no_outside_address_and_no_secret(text: str):
    assert not re.search(r'(?:src|href|action)="(?!data:|#)', text)
    assert "url(" not in text
    for secret in ("KEY-AbC123", "SECRET-XyZ789"):
        assert secret not in text


def test_captions_are_escaped(text: str):
    assert "&lt;not photographs&gt;" in text
    assert "<not photographs>" not in text


def test_of_a_repeated_step_the_last_row_counts(recipe: Recipe):
    history = read_history(RunLayout(recipe.run_dir).events)
    assert [step.step for step in history.steps] == list(range(1, 301))
    assert history.steps[149].data_s == 1e-3
    assert history.steps[150].data_s == 0.5e-3
    assert history.world_sizes == (2, 2)
    assert history.finished


def test_log_cut_short_by_a_kill_is_still_read(recipe: Recipe, tmp_path: Path):
    whole = RunLayout(recipe.run_dir).events.read_bytes()
    cut = tmp_path / "events.jsonl"
    cut.write_bytes(whole[: whole.index(b'"step": 40,') + 30])
    history = read_history(cut)
    assert len(history.steps) == 39
    assert not history.finished


def test_run_without_anything_gives_a_page_of_sentences(tmp_path: Path):
    result = report.run(made_up_recipe(tmp_path))
    assert not result.skipped
    text = RunLayout(made_up_recipe(tmp_path).run_dir).report.read_text()
    for sentence in (
        "No scores yet",
        "No pictures yet",
        "No training step yet",
        "Nothing exported",
    ):
        assert sentence in text
    assert "manifest" in text  # why there are no pictures


def test_report_is_written_again_only_when_something_changed(tmp_path: Path):
    recipe = made_up_recipe(tmp_path)
    layout = RunLayout(recipe.run_dir)
    assert not report.run(recipe).skipped
    before = layout.report.stat().st_mtime_ns
    assert report.run(recipe).skipped
    assert layout.report.stat().st_mtime_ns == before
    layout.evaluation.write_text(
        '[{"task": "reid", "model": "student", "data": "x", "metrics": {"mAP": 12.5}}]'
    )
    assert not report.run(recipe).skipped
    assert "12.5" in layout.report.read_text()
    assert not list(layout.root.glob(".*")), "nothing is left aside"
