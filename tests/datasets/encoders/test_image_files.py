"""Finding and decoding untrusted images."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from findrec.datasets.encoders import image_files
from findrec.datasets.encoders.encoder import BrokenInputError
from findrec.datasets.encoders.image_files import decode, find_images
from findrec.errors import FindRecError


def picture(kind: str = "JPEG", size: tuple[int, int] = (20, 30), colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG with a header only: no pixel is there."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_plain_formats_become_rgb(kind: str) -> None:
    image = decode(picture(kind))
    assert (image.mode, image.size) == ("RGB", (20, 30))
    np.testing.assert_allclose(np.asarray(image)[15, 10], [255, 0, 0], atol=3)


def test_modes_become_rgb_and_transparent_is_white() -> None:
    for mode in ("L", "P", "1", "CMYK", "I;16", "LA"):
        stream = io.BytesIO()
        Image.new(mode, (4, 4)).save(stream, "TIFF" if mode == "CMYK" else "PNG")
        if mode == "CMYK":
            stream = io.BytesIO()
            Image.new(mode, (4, 4)).save(stream, "JPEG")
        assert decode(stream.getvalue()).mode == "RGB"
    stream = io.BytesIO()
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(stream, "PNG")
    pixels = np.asarray(decode(stream.getvalue()))
    assert pixels[0, 0].tolist() == [0, 0, 255]
    assert pixels[2, 2].tolist() == [255, 255, 255]


def test_a_large_jpeg_is_decoded_smaller_but_not_too_small() -> None:
    image = decode(picture(size=(9000, 4500)))
    assert min(image.size) >= image_files.DRAFT
    assert max(image.size) < 9000


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not one of JPEG"),
        (b"<html>not found</html>", "not one of JPEG"),
        (picture()[:400], "truncated|Truncated"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
            "not one of JPEG",
        ),  # would start a program
        (png_that_claims(8000, 8000), "8000 x 8000 pixels, the limit"),
        (png_that_claims(100_000, 100_000), "[Bb]omb"),
        (png_that_claims(50, 50), "Error"),
    ],
)
def test_invalid_images_are_broken(data: bytes, message: str) -> None:
    with pytest.raises(BrokenInputError, match=message):
        decode(data)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    root = tmp_path / "shop"
    (root / "b").mkdir(parents=True)
    (root / "1.jpg").write_bytes(picture())
    (root / "b/2.PNG").write_bytes(picture("PNG"))
    (root / "b/Ünï 3.webp").write_bytes(picture("WEBP"))
    (root / "notes.txt").write_text("4.jpg")
    (tmp_path / "secret.jpg").write_bytes(picture())
    return root


def packed(root: Path) -> Path:
    path = root.parent / "shop.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(root, ".")
    return path


@pytest.mark.parametrize("as_tar", [False, True])
def test_items_are_matched_by_file_name(as_tar: bool, shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = find_images(packed(shop) if as_tar else shop, ["2", "4", "Ünï 3", "1"], None)
    assert [one.name if one else None for one in found] == ["b/2.PNG", None, "b/Ünï 3.webp", "1.jpg"]
    assert found[0] is not None
    assert found[0].read() == picture("PNG")
    assert "1 of 4 items have none" in capsys.readouterr().out


@pytest.mark.parametrize("as_tar", [False, True])
def test_paths_stay_inside_the_folder(as_tar: bool, shop: Path) -> None:
    secret = str(shop.parent / "secret.jpg")
    paths = [
        "b/2.PNG",
        "./1.jpg",
        "../secret.jpg",
        secret,
        None,
        "https://x.org/a/1.jpg?size=9",
        "b/none.jpg",
    ]
    found = find_images(packed(shop) if as_tar else shop, list("abcdefg"), paths)
    names = [one.name if one else None for one in found]
    assert names == ["b/2.PNG", "1.jpg", None, None, None, "1.jpg", None]


def test_only_regular_files_of_a_tar_are_used(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").write_bytes(picture())
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(tmp_path / "1.jpg", "1.jpg")
        for name, kind in (
            ("2.jpg", tarfile.SYMTYPE),
            ("3.jpg", tarfile.LNKTYPE),
            ("4.jpg", tarfile.FIFOTYPE),
        ):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "1.jpg"
            tar.addfile(entry)
    found = find_images(tmp_path / "x.tar", ["1", "2", "3", "4"], None)
    assert [one is not None for one in found] == [True, False, False, False]


def test_a_huge_file_is_not_read(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_files, "MAX_BYTES", 100)
    found = find_images(shop, ["1"], None)[0]
    assert found is not None
    with pytest.raises(BrokenInputError, match="the limit is 100"):
        found.read()


def test_truncated_and_deleted_files_are_broken(shop: Path) -> None:
    one, two = find_images(shop, ["1", "2"], None)
    assert one is not None
    assert two is not None
    one.path.write_bytes(b"short")
    two.path.unlink()
    with pytest.raises(BrokenInputError, match="too early"):
        one.read()
    with pytest.raises(BrokenInputError, match="No such file"):
        two.read()


def test_duplicate_names_are_reported(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "b/1.png").write_bytes(picture("PNG"))
    found = find_images(shop, ["1"], None)[0]
    assert found is not None
    assert found.name == "1.jpg"
    assert "b/1.png" in capsys.readouterr().out


def test_folders_without_images_are_reported(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match="no images at"):
        find_images(tmp_path / "nowhere", ["1"], None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FindRecError, match="has no image files"):
        find_images(tmp_path / "empty", ["1"], None)
    with pytest.raises(FindRecError, match=r"none of the 3 images .* raw ids \(x, y\)"):
        find_images(shop, ["x", "y"], None)
    with tarfile.open(tmp_path / "shop.tar.gz", "w:gz") as tar:
        tar.add(shop, ".")
    with pytest.raises(FindRecError, match="uncompressed tar"):
        find_images(tmp_path / "shop.tar.gz", ["1"], None)


@pytest.mark.parametrize("left", [0.4, 0.7, 1.0])
def test_a_truncated_tar_is_reported(left: float, shop: Path) -> None:
    path = packed(shop)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(FindRecError, match="cannot be read as a tar"):
        find_images(path, ["1", "2", "Ünï 3"], None)
