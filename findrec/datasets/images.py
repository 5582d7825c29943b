"""Pictures of items: found by name in a folder or a tar, and decoded with care.

They come from outside. Only plain raster formats are decoded (no EPS, whose decoder starts a program), sizes
are read from the header before a pixel is made, and nothing outside the given folder or tar is opened.
"""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from PIL import Image, UnidentifiedImageError

from findrec.datasets.encode_rows import BrokenInputError, first_few
from findrec.errors import FindRecError
from findrec.progress import say

MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 50_000_000  # of a picture, decoded: 150 MB
DRAFT = 1024  # a JPEG that is larger is decoded at a half, quarter or eighth of its size, not below this
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's; ours is lower
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True)
class Picture:
    """Bytes that ought to be an image: a whole file, or `length` bytes of a tar from `begin`."""

    path: Path
    name: str  # inside the place it was found in
    begin: int
    length: int
    stamp: int  # when it was last altered, ns

    def read(self) -> bytes:
        """The bytes; raises `BrokenInputError`."""
        if self.length > MAX_BYTES:
            raise BrokenInputError(f"{self.length:,} bytes, the limit is {MAX_BYTES:,}")
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.begin)
                data = stream.read(self.length)
        except OSError as error:
            raise BrokenInputError(error.strerror or str(error)) from None
        if len(data) < self.length:
            raise BrokenInputError("the file ends too early")
        return data


def decode(data: bytes) -> Image.Image:
    """An RGB image of the bytes (the first frame of an animation, on white where transparent); raises
    `BrokenInputError`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenInputError(f"{width} x {height} pixels, the limit is {MAX_PIXELS:,} in all")
            image.draft("RGB", (DRAFT, DRAFT))
            if not image.has_transparency_data:
                return image.convert("RGB")
            seen = image.convert("RGBA")
        ground = Image.new("RGB", seen.size, "white")
        ground.paste(seen, mask=seen.getchannel("A"))
        return ground
    except BrokenInputError:
        raise
    except UnidentifiedImageError:
        raise BrokenInputError(f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on damaged files
        raise BrokenInputError(f"{type(error).__name__}: {error}") from None


def _folder_files(root: Path) -> Iterator[Picture]:
    for folder, _, names in os.walk(root):  # links to folders are not followed
        for name in names:
            path = Path(folder) / name
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                about = path.stat()
                inside = path.relative_to(root).as_posix()
                yield Picture(path, inside, 0, about.st_size, about.st_mtime_ns)


def _tar_files(path: Path) -> Iterator[Picture]:
    stamp = path.stat().st_mtime_ns
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isreg() and not member.issparse() and name.suffix.lower() in _SUFFIXES:
                    yield Picture(path, name.as_posix(), member.offset_data, member.size, stamp)
            end = tar.offset
        with path.open("rb") as stream:  # tarfile takes a file that stops between two members for whole
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end: it was cut short")
    except tarfile.TarError as error:
        raise FindRecError(
            f"{path} cannot be read as a tar of images: {error}. Give a folder, or a plain tar (images are "
            "compressed already)"
        ) from None


class Pictures:
    """The images of a folder (with those below it) or of a plain tar, by name."""

    def __init__(self, place: Path) -> None:
        """Raises `FindRecError` where the place is neither, or holds no image."""
        if not place.exists():
            raise FindRecError(f"no images at {place}: give a folder or a tar of image files")
        files = _folder_files(place) if place.is_dir() else _tar_files(place)
        self.place = place
        self._by_name = {picture.name: picture for picture in files}
        self._by_stem: dict[str, Picture] = {}
        twice = []
        for name in sorted(self._by_name):
            stem = PurePosixPath(name).stem
            if self._by_stem.setdefault(stem, self._by_name[name]).name != name:
                twice.append(name)
        if twice:
            say(
                f"images: {len(twice):,} files have the name of another ({first_few(twice)}); the first in "
                "alphabetical order is used"
            )
        if not self._by_name:
            raise FindRecError(f"{place} holds no image files ({', '.join(sorted(_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._by_name)

    def all(self) -> list[Picture]:
        """Every image."""
        return list(self._by_name.values())

    def named(self, stem: str) -> Picture | None:
        """The file called `stem` but for its suffix, in whatever subfolder."""
        return self._by_stem.get(stem)

    def at(self, path: str) -> Picture | None:
        """The file at a path inside the place. Of an address (`https://...`), the file of its last part."""
        if "://" in path:
            return self.named(PurePosixPath(urlparse(path).path).stem)
        return self._by_name.get(PurePosixPath(path).as_posix())


def find_pictures(
    place: Path, ids: Sequence[str], paths: Sequence[str | None] | None
) -> list[Picture | None]:
    """Each item's image in `place`: named by its raw id, or at its path; `FindRecError` where none is."""
    pictures = Pictures(place)
    if paths is None:
        found = [pictures.named(name) for name in ids]
    else:
        found = [pictures.at(path) if path else None for path in paths]
    missing = [name for name, picture in zip(ids, found, strict=True) if picture is None]
    if len(missing) == len(ids):
        wanted = "the items' raw ids" if paths is None else "the items' paths"
        given = first_few(list(ids if paths is None else [path for path in paths if path]))
        raise FindRecError(
            f"none of the {len(pictures):,} images in {place} belongs to an item: files must be called by "
            f"{wanted} ({given or 'all are empty'}), with a suffix such as .jpg"
        )
    if missing:
        say(
            f"images: {len(missing):,} of {len(ids):,} items have none in {place.name} "
            f"({first_few(missing)}); they are marked as missing"
        )
    return found
