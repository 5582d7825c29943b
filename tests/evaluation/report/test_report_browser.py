"""The report of a complete run in a real offline browser; skipped without one."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from browsers import BROWSER, needs_browser
from PIL import Image
from saved_run import save_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.run import evaluate_run
from findrec.evaluation.suites.suites import run_suite, write_suite

NUM_ITEMS = 40


def browse(page: Path, scratch: Path, *flags: str) -> tuple[str, list[str]]:
    """What a browser prints for a page, and what the page's console said. No host is resolved."""
    assert BROWSER is not None
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--enable-logging=stderr", "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run"]
    command += [f"--user-data-dir={scratch / 'profile'}", "--allow-file-access-from-files"]
    command += ["--virtual-time-budget=8000", *flags, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, re.findall(r"CONSOLE[^\n]*", done.stderr)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two models and a baseline with all suites, items that have pictures, and odd titles."""
    root = tmp_path_factory.mktemp("report")
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, NUM_ITEMS, size=int(rng.integers(5, 40))).tolist() for _ in range(30)]
    titles = [f"<script>alert({v})</script> a rather long title of the film & {v}" for v in range(1, 41)]
    features = {"text": rng.standard_normal((NUM_ITEMS, 6)), "image": rng.standard_normal((NUM_ITEMS, 5))}
    features["image"][::5] = np.nan
    data: DataFolder = write_data_folder(
        root / "data", histories, texts=titles, features=features, num_items=NUM_ITEMS
    )
    (root / "pictures").mkdir()
    for item, raw in enumerate(data.items["raw"].to_pylist(), 1):
        if item % 5:
            drawn = Image.new("RGB", (300, 200), (6 * item, 90, 255 - 6 * item))
            drawn.save(root / "pictures" / f"{raw}.jpg")
    (root / "pictures" / "notes.jpg").write_bytes(b"no picture")
    (root / "small").mkdir()
    settings = ("evaluation.baselines=[popularity, sasrec]", f"evaluation.pictures={root / 'pictures'}")
    folder = save_run(root / "small", data, *settings)
    write_suite(folder, run_suite(folder, "noise", levels=[50], draws=1, resamples=200))
    write_suite(folder, run_suite(folder, "length", levels=[5], resamples=200))
    evaluate_run(folder)
    return folder


def test_page_of_a_complete_run(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") > 10
    assert page.count("<article>") == 6
    for text in ("Wrong features", "Short histories", "Which differences are real", "gate entropy", "torch"):
        assert text in page
    assert 'alt="ksd_text"' in page
    assert "<script" not in page
    names = {path.stem for path in (run / "plots").glob("*.png")}
    wanted = {"routing", "alignment-ksd_text", "suite-noise", "suite-length", "strata", "lists-ils_text"}
    assert wanted <= names
    assert names == {path.stem for path in (run / "plots").glob("*.svg")}


@needs_browser
def test_browser_check_detects_errors(tmp_path: Path) -> None:
    """The browser reports a script error and an external picture, which the next test relies on."""
    page = tmp_path / "bad.html"
    page.write_text("<img src='https://example.invalid/a.png'><script>missing()</script>")
    _, console = browse(page, tmp_path, "--dump-dom")
    assert any("missing is not defined" in line for line in console)


@needs_browser
@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (500, False)])
def test_page_in_a_browser(run: Path, tmp_path: Path, width: int, dark: bool) -> None:
    picture = tmp_path / "page.png"
    flags = [f"--window-size={width},1800", f"--screenshot={picture}", *(["--force-dark-mode"] * dark)]
    _, console = browse(run / "report.html", tmp_path, *flags)
    assert console == []
    grey = np.asarray(Image.open(picture).convert("L"), dtype=np.float64)
    assert grey.shape == (1800, width)
    assert (np.median(grey) < 60) == dark, "the background is dark only in dark mode"
    different = np.abs(grey - np.median(grey)) > 40
    assert different.mean() > 0.01, "not blank"
    tenths = [part.mean() for part in np.array_split(different, 10)]
    assert min(tenths) > 0.001, "something is written all the way down"


@needs_browser
def test_page_fits_a_phone_and_shows_every_picture(run: Path, tmp_path: Path) -> None:
    """A page around it measures it at the width of a phone, with everything opened that can be."""
    around = tmp_path / "around.html"
    around.write_text(
        f"""<iframe id="f" width="390" height="800" src="{(run / "report.html").as_uri()}"></iframe>
        <p id="said">nothing</p><script>
        onload = () => setTimeout(() => {{
          const page = document.getElementById("f").contentDocument;
          page.querySelectorAll("details").forEach((part) => part.open = true);
          const pictures = [...page.images];
          document.getElementById("said").textContent = JSON.stringify([
            page.documentElement.scrollWidth, pictures.length,
            pictures.filter((one) => !one.complete || !one.naturalWidth).length,
            page.querySelectorAll("table").length, page.body.innerText.includes("leave-one-out")]);
        }}, 2000);</script>"""
    )
    dom, console = browse(around, tmp_path, "--dump-dom")
    assert console == []
    actual = re.search(r'id="said">\[(\d+),(\d+),(\d+),(\d+),(\w+)\]', dom)
    assert actual is not None, dom[-300:]
    assert int(actual[1]) <= 390, "nothing but tables is scrolled sideways"
    assert int(actual[2]) > 40
    assert int(actual[3]) == 0
    assert int(actual[4]) >= 6
    assert actual[5] == "true"
