"""Parquet files: one column of strings, read by row groups, so that memory does not grow with the file."""

import contextlib
from collections.abc import Iterator

from maxsep.config import ConfigError
from maxsep.data import splits
from maxsep.data.files import Cuts
from maxsep.data.splits import Document

ROWS = 256  # decoded at once
BUFFER = 1 << 20  # bytes read ahead of a column


def cuts(path: str) -> Cuts:
    """Where the file may be cut: bytes of text, roughly, and row groups that come before.

    Raises:
        ConfigError: it is no parquet file.
    """
    found, size = [(0, 0)], 0
    with _opened(path) as file:
        for number in range(file.num_row_groups):
            size += file.metadata.row_group(number).total_byte_size
            found.append((size, number + 1))
    return tuple(found)


def check(path: str, column: str) -> None:
    """Reads the file's schema.

    Raises:
        ConfigError: it is no parquet file, or has no such column of strings.
    """
    with _opened(path) as file:
        _check(path, file, column)


def read(path: str, start: int, stop: int, column: str) -> Iterator[Document]:
    """The texts of the row groups number `start` to `stop`, without the latter.

    Raises:
        ConfigError: a column that is not there or has no strings, a row without one, or a damaged file.
    """
    with _opened(path) as file:
        _check(path, file, column)
        row = sum(file.metadata.row_group(number).num_rows for number in range(start))
        groups = list(range(start, stop))
        for batch in file.iter_batches(ROWS, row_groups=groups, columns=[column], use_threads=False):
            for text in batch.column(0).to_pylist():
                at = f"{path}, row {row + 1}"
                if text is None:
                    raise ConfigError(f"data.path: {at} has null in the column {column!r}; takes a string in each")
                yield Document(text, splits.place(text.encode()), at)
                row += 1


def _check(path: str, file, column: str) -> None:
    import pyarrow

    schema = file.schema_arrow
    if column not in schema.names:
        takes = f"a column of strings (data.text_column), of {', '.join(schema.names) or 'which it has none'}"
        raise ConfigError(f"data.path: {path} has no column {column!r}; takes {takes}")
    kind = schema.field(column).type
    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    types = pyarrow.types
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        strings = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        takes = f"one of strings (data.text_column){', as ' + ', '.join(strings) if strings else ''}"
        raise ConfigError(f"data.path: {path}: the column {column!r} is {kind}; takes {takes}")


@contextlib.contextmanager
def _opened(path: str) -> Iterator:
    """The file; what a damaged one raises becomes the user's one line."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Without pre_buffer, which would read whole row groups.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER, pre_buffer=False) as file:
            yield file
    except ConfigError:
        raise
    except UnicodeDecodeError:
        raise ConfigError(f"data.path: {path!r} has text that is not UTF-8") from None
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"data.path: {path!r} cannot be read as parquet: {reason}") from None
