"""The page in a real browser, by keyboard alone; skipped without one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from browsers import Tab, needs_browser, opened
from http_service import served

from findrec.datasets.folder.data_folder import DataFolder
from findrec.serving.http.app import create_app
from findrec.serving.http.events import EventStore
from findrec.serving.recommender import Recommender

ITEMS = "[...document.querySelectorAll('#list li small')].map((one) => one.textContent.split(' ')[0])"
PAST = "[...document.querySelectorAll('#past li small')].map((one) => one.textContent.split(' ')[0])"


async def fill(tab: Tab, name: str, text: str) -> None:
    """Replace the text of a field that Tab reaches, and press Enter."""
    await tab.tab_to(f"it.id === '{name}'")
    await tab.value("document.activeElement.select()")
    await tab.type(text)
    await tab.press("Enter")


@needs_browser
@pytest.mark.parametrize("width", [390, 1200])
def test_the_page_by_keyboard(trained: Path, data: DataFolder, tmp_path: Path, width: int):
    recommender = Recommender.load(trained)

    async def go(address: str) -> None:
        async with opened(address, tmp_path, width=width) as tab:
            # A visitor: the popular items, then an item that is found by its title and added.
            await tab.until("document.querySelectorAll('#list li').length === 20")
            assert "most popular items" in await tab.value("document.getElementById('how').textContent")
            await fill(tab, "words", "item 17")
            await tab.until("document.querySelectorAll('#found button').length === 1")
            await tab.tab_to("it.closest('#found') !== null")
            await tab.press("Enter")
            await tab.until("document.getElementById('how').textContent === 'Ranked by: findrec'")
            (want,) = recommender.recommend(histories=[["17"]], k=20, exclude_seen=True)
            assert await tab.value(ITEMS) == want.items
            assert await tab.value(PAST) == ["17"]
            assert await tab.value("document.querySelectorAll('.moved.up').length") > 0

            # A user, to whom the first item of the list is added.
            await tab.value("document.activeElement.blur()")
            await fill(tab, "user", "3")
            await tab.until("document.getElementById('who').textContent === 'User 3'")
            (want,) = recommender.recommend(["3"], k=20, exclude_seen=True)
            await tab.until(f"{ITEMS}.join() === '{','.join(want.items)}'")
            await tab.tab_to("it.closest('#list') !== null")
            await tab.press("Enter")
            await tab.until("document.querySelectorAll('#past li.appended').length === 1")
            past = data.histories([3])
            items = [*map(str, past.item.tolist()), want.items[0]]
            times = [*past.timestamp.tolist(), int(past.timestamp[-1]) + 1]
            (want,) = recommender.recommend(histories=[items], times=[times], k=20, exclude_seen=True)
            await tab.until(f"{ITEMS}.join() === '{','.join(want.items)}'")
            assert (await tab.value(PAST))[0] == items[-1]

            # A user who does not exist is not chosen.
            await fill(tab, "user", "ghost")
            await tab.until("document.getElementById('message').textContent.includes(\"user 'ghost'\")")
            assert await tab.value("state.user") == "3"
            assert await tab.value(PAST) == items[::-1][:50]
            tab.problems.clear()  # the browser reports the status 404

            # A filter, and one that is wrong.
            await fill(tab, "only", "price<20; category=third 1")
            await tab.until("document.querySelectorAll('#list li').length < 20")
            assert {int(item) % 3 for item in await tab.value(ITEMS)} == {1}
            assert tab.problems == []
            await fill(tab, "only", "colour=red")
            await tab.until("document.getElementById('message').textContent.includes(\"no column 'colour'\")")

            assert await tab.value("document.documentElement.scrollWidth") <= width
            unlabelled = "[...document.querySelectorAll('button')].filter((one) => !one.textContent).length"
            assert await tab.value(unlabelled) == 0
            assert tab.asked
            assert [url for url in tab.asked if not url.startswith(address)] == []

    with served(create_app(recommender, EventStore(tmp_path / "events.sqlite"))) as port:
        asyncio.run(go(f"http://127.0.0.1:{port}/"))
