"""The pages in evaluation/protocols are the ones that rows name."""

from __future__ import annotations

from pathlib import Path

from findrec.datasets.folder import DataFolder
from findrec.datasets.memory import write_data_folder
from findrec.evaluation.metrics import describe_protocol, split_title
from findrec.paths import PACKAGE

PROTOCOLS = PACKAGE.parent / "evaluation" / "protocols"


def test_every_split_has_its_page(folder: DataFolder, tmp_path: Path) -> None:
    times = [[0, 0, 60, 60, 120], [0, 60, 60, 120, 120]]
    baskets = write_data_folder(
        tmp_path / "baskets", [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]], times, unit="timestamp"
    )
    titles = {split_title(folder), split_title(baskets)}
    assert titles == {"leave-one-out", "leave-one-basket-out"}
    pages = {page.stem: page.read_text(encoding="utf-8") for page in PROTOCOLS.glob("*.md")}
    assert set(pages) == titles
    assert all(pages[title].startswith(f"# {title}\n") for title in titles)


def test_protocol_line(folder: DataFolder) -> None:
    line = describe_protocol(folder, mask_seen=True)
    assert line == "leave-one-out, full catalogue (40 items), seen items removed, ties at expected rank"
