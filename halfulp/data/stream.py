"""Bytes of a file, plain or compressed, with errors that name the file."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, cast

from halfulp.errors import DataError, require

BLOCK = 1 << 20
_SNIFF = 8192


@contextmanager
def open_stream(path: Path) -> Iterator[BinaryIO]:
    """The bytes of `path`, decompressed when the name ends in .gz or .zst.

    Raises DataError when the file cannot be read or its compressed stream is broken or cut
    off, and MissingExtraError when .zst needs zstandard.
    """
    name = path.name.lower()
    try:
        with _opened(path, name) as file:
            yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{path} is broken or cut off: {error}. Fetch or compress it again, or take it out."
        ) from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error


def blocks(file: BinaryIO) -> Iterator[bytes]:
    """The rest of `file`, about a megabyte at a time."""
    while block := file.read(BLOCK):
        yield block


def first_bytes(path: Path) -> bytes:
    """The first few kilobytes of `path`, decompressed."""
    with open_stream(path) as file:
        return file.read(_SNIFF)


def _opened(path: Path, name: str) -> BinaryIO:
    if name.endswith(".gz"):
        return cast(BinaryIO, gzip.open(path, "rb"))
    if name.endswith(".zst"):
        zstandard = require("zstandard", "data")
        return io.BufferedReader(_Zstd(open(path, "rb"), zstandard), BLOCK)
    return open(path, "rb")


class _Zstd(io.RawIOBase):
    """Zstandard frames one after the other; a frame that is broken or cut off is an EOFError.

    The library's own reader takes a cut-off frame for the end of the file.
    """

    def __init__(self, file: BinaryIO, zstandard: ModuleType) -> None:
        self._file = file
        self._error: type[Exception] = zstandard.ZstdError
        # Archives made with `zstd --long=31` need windows of 2 GiB.
        self._new: Callable[[], Any] = zstandard.ZstdDecompressor(
            max_window_size=2**31
        ).decompressobj
        self._frame = self._new()
        self._inside = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            block = self._next_block()
            if not block:
                return 0
            self._ready = memoryview(self._decompress(block))
        taken = min(len(buffer), len(self._ready))
        buffer[:taken] = self._ready[:taken]
        self._ready = self._ready[taken:]
        return taken

    def _next_block(self) -> bytes:
        left = b""
        if self._frame.eof:
            left = self._frame.unused_data
            self._frame, self._inside = self._new(), False
        block = left or self._file.read(BLOCK)
        if not block and self._inside:
            raise EOFError("the last Zstandard frame does not end")
        return block

    def _decompress(self, block: bytes) -> bytes:
        try:
            data = self._frame.decompress(block)
        except self._error as error:
            raise EOFError(str(error)) from error
        self._inside = not self._frame.eof
        return data
