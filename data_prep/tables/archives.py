"""Image files by name in a folder, a zip or a tar, never outside it.

Nothing is ever unpacked to disk, and a name from the data is only looked up in a listing, so it reaches no other file.
"""

import os
import re
import stat
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

from data_prep.tables.rejections import Rejected
from silkie_jax.errors import UserError
from silkie_jax.image_limits import MAX_BYTES, SUFFIXES


def open_images(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> "Images":
    """The image files of a folder, a zip or a tar.

    Raises:
        UserError: there is no such folder or archive, or it cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        return FolderImages(path, max_bytes)
    if not path.exists():
        raise UserError(f"there is no image folder or zip at {path}")
    if tarfile.is_tarfile(path):
        return TarImages(path, max_bytes)
    return ZipImages(path, max_bytes)


def images_of_rows(rows: Path, images: str | os.PathLike[str] | None = None, *, max_bytes: int = MAX_BYTES) -> "Images":
    """The images that rows (a file or a folder of them) name: those of `images`, or else those beside the rows.

    Raises:
        UserError: see `open_images`.
    """
    if images is not None:
        return open_images(images, max_bytes=max_bytes)
    return ImagesBeside(rows if rows.is_dir() else rows.parent, max_bytes)


class Images:
    """A listing of image files by name, with look-up by path, file name or stem. Safe to use from several threads.

    Attributes:
        refused: name -> why, for files that point outside or cannot be opened safely.
    """

    where = "among the images"  # in errors

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.refused: dict[str, str] = {}
        self._stamps: dict[str, str] = {}
        self._by_key: dict[str, list[str]] = {}

    def _add(self, name: str, stamp: str) -> None:
        path = PurePosixPath(name)
        self._stamps[name] = stamp
        # Data sets name an image by its path, its file name or, like VLFeedback, by the row's id.
        for key in {path.name, f"{path.with_suffix('')}.*", f"{path.stem}.*"}:
            self._by_key.setdefault(key, []).append(name)

    def find(self, path: str, id: str = "") -> str:
        """The name of a row's image: `path`, else its file name in any folder, else `id` with any suffix.

        Raises:
            Rejected: it is not there, points outside, was refused, or could be more than one file.
        """
        if path:
            if _points_outside(path):
                raise Rejected("image path points outside", path)
            name = str(PurePosixPath(path.replace("\\", "/")))
            if name in self._stamps:
                return name
            if name in self.refused:
                raise Rejected("image refused", f"{name}: {self.refused[name]}")
            found = self._by_key.get(PurePosixPath(name).name)
            if found:
                return _only(found, path)
        found = self._by_key.get(f"{id}.*") if id else None
        if found:
            return _only(found, f"{id}.*")
        raise Rejected("image not found", f"{path or id} {self.where}")

    @property
    def names(self) -> list[str]:
        """All image files, in order."""
        return sorted(self._stamps)

    def has(self, id: str) -> bool:
        """Whether an image is named after this id."""
        return bool(id) and f"{id}.*" in self._by_key

    def stamp(self, name: str) -> str:
        """Changes when the file does: its size with its checksum (zip) or time of change (folder)."""
        return self._stamps[name]

    def read(self, name: str) -> bytes:
        """The bytes of a file of the listing.

        Raises:
            Rejected: it is larger than `max_bytes` or cannot be read.
        """
        try:
            data = self._read(name)
        except Exception as error:  # OSError, BadZipFile, zlib.error, NotImplementedError (compression), ...
            raise Rejected("unreadable image", f"{name}: {error}") from error
        if len(data) > self.max_bytes:
            raise Rejected("image too large", f"{name} has more than {self.max_bytes} bytes")
        return data

    def _read(self, name: str) -> bytes:
        raise KeyError(name)

    def close(self) -> None:
        """Frees the zip, where there is one."""


class FolderImages(Images):
    """All files below a folder. Links that leave the folder, and what cannot be looked at, are refused."""

    def __init__(self, root: Path, max_bytes: int):
        super().__init__(max_bytes)
        self._root = root.resolve()
        try:
            self._list(self._root)
        except OSError as error:
            raise UserError(f"{root}: the image folder cannot be read ({error.strerror})") from None

    def _list(self, folder: Path) -> None:
        """Everything below a folder that is not a folder, in the order of names; linked folders are not entered."""
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        for entry in found:
            name = Path(entry.path).relative_to(self._root).as_posix()
            try:
                if entry.is_dir(follow_symlinks=False):
                    self._list(Path(entry.path))
                elif entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(self._root):
                    self.refused[name] = _LEAVES
                elif entry.is_file():
                    self._add(name, _stamp(entry.stat()))
            except OSError as error:
                self.refused[name] = f"cannot be looked at ({error.strerror})"

    def _read(self, name: str) -> bytes:
        with open(self._root / name, "rb") as file:
            return file.read(self.max_bytes + 1)


class ImagesBeside(FolderImages):
    """The images beside rows: those in the rows' own folder, and below it those whose paths the rows give.

    Nothing else below the folder is looked at, since it may hold anything, and any amount of it.
    """

    where = "beside the rows: say where the images are (--images)"

    def _list(self, folder: Path) -> None:
        for name in sorted(os.listdir(folder)):
            if name.lower().endswith(SUFFIXES) and (stamp := self._look_at(name)):
                self._add(name, stamp)
        self.refused.clear()  # of what no row has named yet

    def find(self, path: str, id: str = "") -> str:
        name = str(PurePosixPath(path.replace("\\", "/")))
        if path and not _points_outside(path) and name not in self._stamps and (stamp := self._look_at(name)):
            self._stamps[name] = stamp
        return super().find(path, id)

    def _look_at(self, name: str) -> str:
        """The stamp of a file that lies in the folder, else ""."""
        file = self._root / name
        try:
            status = file.stat()
            if not file.resolve().is_relative_to(self._root):
                self.refused[name] = _LEAVES
            elif stat.S_ISREG(status.st_mode):
                return _stamp(status)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.refused[name] = f"cannot be looked at ({error.strerror})"
        return ""


class ZipImages(Images):
    """All entries of a zip, read in place. Entries that point outside, links and encrypted ones are refused."""

    def __init__(self, path: Path, max_bytes: int):
        super().__init__(max_bytes)
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise UserError(f"{path} is neither a folder nor a readable zip ({error})") from error
        self._infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            name = str(PurePosixPath(info.filename))
            if info.is_dir():
                continue
            if _points_outside(info.filename):
                self.refused[name] = "points outside"
            elif stat.S_ISLNK(info.external_attr >> 16):
                self.refused[name] = "a link"
            elif info.flag_bits & 1:
                self.refused[name] = "encrypted"
            elif name in self._infos:
                self.refused[name] = "a second entry of the same name (the first is used)"
            else:
                self._add(name, f"{info.file_size}-{info.CRC:08x}")
                self._infos[name] = info

    def _read(self, name: str) -> bytes:
        with self._zip.open(self._infos[name]) as file:
            return file.read(self.max_bytes + 1)  # never more, whatever size the entry claims

    def close(self) -> None:
        self._zip.close()


class TarImages(Images):
    """All files of a tar that is not compressed, read in place. What points outside, and links, are refused."""

    def __init__(self, path: Path, max_bytes: int):
        super().__init__(max_bytes)
        self._places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._list(member)
        except tarfile.TarError as error:
            raise UserError(
                f"{path} is not a tar that can be read in place ({error}): if it is compressed, unpack it first"
            ) from error
        self._file = open(path, "rb")  # noqa: SIM115 (open as long as this is)

    def _list(self, member: tarfile.TarInfo) -> None:
        name = str(PurePosixPath(member.name))
        if member.isdir():
            return
        if _points_outside(member.name):
            self.refused[name] = "points outside"
        elif not member.isreg() or member.issparse():
            self.refused[name] = "a link or a special file"
        elif name in self._places:
            self.refused[name] = "a second entry of the same name (the first is used)"
        else:
            self._add(name, f"{member.size}-{member.chksum:x}-{member.mtime}")
            self._places[name] = (member.offset_data, member.size)

    def _read(self, name: str) -> bytes:
        start, size = self._places[name]
        return os.pread(self._file.fileno(), min(size, self.max_bytes + 1), start)  # no shared position: thread-safe

    def close(self) -> None:
        self._file.close()


def _points_outside(name: str) -> bool:
    """Whether a path is absolute or climbs, by the rules of any operating system."""
    name = name.replace("\\", "/")
    return name.startswith("/") or bool(re.match(r"[A-Za-z]:", name)) or ".." in name.split("/") or "\0" in name


def _only(names: list[str], wanted: str) -> str:
    if len(names) > 1:
        raise Rejected("image name is ambiguous", f"{wanted} could be {', '.join(sorted(names)[:3])}")
    return names[0]


_LEAVES = "a link that leaves the folder"


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"
