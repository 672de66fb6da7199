"""Parquet files of the hub, read in place: the texts of all rows at once, an image when it is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from silkie_jax.errors import UserError


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet files need pyarrow: pip install 'silkie-jax[data]'") from None
    return pyarrow.parquet


def parquet_rows(data: Path, columns: Sequence[str], hint: str) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """(file, row, columns that it has) of a file, or of all files of a folder (or its data/) in order of their names.

    Raises:
        UserError: there is no such file, or one is not readable.
    """
    files = [data] if data.is_file() else sorted(data.glob("*.parquet")) or sorted((data / "data").glob("*.parquet"))
    if not files:
        raise UserError(f"{data}: no parquet files here; there must be {hint}")
    for file in files:
        table = _read(file, columns)
        for row, record in enumerate(table.to_pylist()):
            yield file, row, record


def _read(file: Path, columns: Sequence[str]) -> Any:
    parquet = _pyarrow()
    try:
        source = parquet.ParquetFile(file)
        return source.read(columns=[name for name in columns if name in source.schema_arrow.names])
    except Exception as error:  # Arrow's own kinds, and those of the system
        raise UserError(f"{file}: not a parquet file that can be read ({str(error).splitlines()[0]})") from None


@lru_cache(maxsize=2)
def _group(file: Path, group: int, column: str) -> Any:
    return _pyarrow().ParquetFile(file).read_row_group(group, columns=[column]).column(0)


@dataclass(frozen=True)
class ParquetPicture:
    """An image in a column of images ({bytes, path}), or number `index` of a column of lists of them."""

    name: str
    file: Path
    column: str
    row: int
    index: int | None = None

    def read(self) -> bytes:
        """The encoded file.

        Raises:
            UserError: there is none.
        """
        where = f"{self.file}: row {self.row}: {self.column}"
        try:
            source = _pyarrow().ParquetFile(self.file)
            group, row = 0, self.row
            while row >= source.metadata.row_group(group).num_rows:
                row -= source.metadata.row_group(group).num_rows
                group += 1
            value = _group(self.file, group, self.column)[row].as_py()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{where}: cannot be read ({(str(error) or type(error).__name__).splitlines()[0]})"
            ) from None
        if self.index is not None:
            if not isinstance(value, list) or self.index >= len(value):
                raise UserError(f"{where}: image {self.index} expected, {len(value or [])} are there")
            value = value[self.index]
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise UserError(f"{where}: holds no image")
        return data
