"""Find images of items by name in a folder or a tar file, and decode them safely.

Images are untrusted input. Only plain raster formats are decoded (not EPS, whose decoder starts a program),
sizes are checked in the header before decoding, and no file outside the given folder or tar is opened.
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

from findrec.datasets.encoders.encoder import BrokenInputError, first_few
from findrec.datasets.folder.tar_headers import BoundedTarInfo
from findrec.errors import FindRecError
from findrec.progress import warn

MAX_BYTES = 64 << 20  # of a file
MAX_PIXELS = 50_000_000  # of an image: 150 MB when decoded
DRAFT = 1024  # larger JPEGs are decoded at a half, quarter or eighth of their size, but not below this
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # Pillow's; ours is lower
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True)
class ImageFile:
    """Location of an encoded image: a full file, or `length` bytes of a tar from `begin`."""

    path: Path
    name: str  # path inside the folder or tar
    begin: int
    length: int
    stamp: int  # modification time, ns

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
    """Decode an RGB image: the first frame of an animation, with white for transparent pixels.

    Raises:
        BrokenInputError: If the image is damaged, too large, or of another format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenInputError(f"{width} x {height} pixels, the limit is {MAX_PIXELS:,} in all")
            image.draft("RGB", (DRAFT, DRAFT))
            if not image.has_transparency_data:
                return image.convert("RGB")
            transparent = image.convert("RGBA")
        background = Image.new("RGB", transparent.size, "white")
        background.paste(transparent, mask=transparent.getchannel("A"))
        return background
    except BrokenInputError:
        raise
    except UnidentifiedImageError:
        raise BrokenInputError(f"not one of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on damaged files
        raise BrokenInputError(f"{type(error).__name__}: {error}") from None


def _folder_files(root: Path) -> Iterator[ImageFile]:
    for folder, _, names in os.walk(root):  # links to folders are not followed
        for name in names:
            path = Path(folder) / name
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                stat = path.stat()
                inside = path.relative_to(root).as_posix()
                yield ImageFile(path, inside, 0, stat.st_size, stat.st_mtime_ns)


def _tar_files(path: Path) -> Iterator[ImageFile]:
    stamp = path.stat().st_mtime_ns
    try:
        with tarfile.open(path, "r:", tarinfo=BoundedTarInfo) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if member.isreg() and not member.issparse() and name.suffix.lower() in _SUFFIXES:
                    yield ImageFile(path, name.as_posix(), member.offset_data, member.size, stamp)
            end = tar.offset
        with path.open("rb") as stream:  # tarfile accepts a file that is truncated between two members
            stream.seek(end)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it has no end-of-archive marker: it is truncated")
    except tarfile.TarError as error:
        raise FindRecError(
            f"{path} cannot be read as a tar of images: {error}. Use a folder or an uncompressed tar (images "
            "are already compressed)"
        ) from None


class ImageFiles:
    """The images of a folder (with subfolders) or of an uncompressed tar, by name."""

    def __init__(self, root: Path) -> None:
        """Index the images; `FindRecError` if `root` is neither a folder nor a tar, or has no images."""
        if not root.exists():
            raise FindRecError(f"no images at {root}: use a folder or a tar of image files")
        files = _folder_files(root) if root.is_dir() else _tar_files(root)
        self._by_name = {file.name: file for file in files}
        self._by_stem: dict[str, ImageFile] = {}
        repeated = []
        for name in sorted(self._by_name):
            stem = PurePosixPath(name).stem
            if self._by_stem.setdefault(stem, self._by_name[name]).name != name:
                repeated.append(name)
        if repeated:
            warn(
                f"images: {len(repeated):,} files share a name ({first_few(repeated)}); the first in "
                "alphabetical order is used"
            )
        if not self._by_name:
            raise FindRecError(f"{root} has no image files ({', '.join(sorted(_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._by_name)

    def all(self) -> list[ImageFile]:
        """Every image."""
        return list(self._by_name.values())

    def named(self, stem: str) -> ImageFile | None:
        """The file named `stem` without its suffix, in any subfolder."""
        return self._by_stem.get(stem)

    def at(self, path: str) -> ImageFile | None:
        """The file at a relative path; for a URL (`https://...`), the file named like its last component."""
        if "://" in path:
            return self.named(PurePosixPath(urlparse(path).path).stem)
        return self._by_name.get(PurePosixPath(path).as_posix())


def find_images(root: Path, ids: Sequence[str], paths: Sequence[str | None] | None) -> list[ImageFile | None]:
    """Each item's image in the folder or tar `root`, by its raw id or, if given, its path.

    Raises:
        FindRecError: If no item has an image.
    """
    files = ImageFiles(root)
    if paths is None:
        matches = [files.named(name) for name in ids]
    else:
        matches = [files.at(path) if path else None for path in paths]
    missing = [name for name, file in zip(ids, matches, strict=True) if file is None]
    if len(missing) == len(ids):
        names = "the items' raw ids" if paths is None else "the items' paths"
        examples = first_few(list(ids if paths is None else [path for path in paths if path]))
        raise FindRecError(
            f"none of the {len(files):,} images in {root} belongs to an item: files must be named by "
            f"{names} ({examples or 'all are empty'}), with a suffix such as .jpg"
        )
    if missing:
        warn(
            f"images: {len(missing):,} of {len(ids):,} items have none in {root.name} "
            f"({first_few(missing)}); they are marked as missing"
        )
    return matches
