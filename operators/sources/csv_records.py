"""Records of a CSV stream: fields of any length with quoted newlines, bad bytes and bad records kept apart."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Iterable, Iterator

from operators.errors import SourceError
from operators.sources.listing import SourceObject
from operators.sources.read_config import MAX_LINE_BYTES
from operators.sources.streams import lines

BOM = b"\xef\xbb\xbf"


def csv_records(obj: SourceObject, data: Iterable[bytes]) -> Iterator[list[str] | csv.Error]:
    """The fields of each record, or the error of a malformed one; blank lines are not records.

    Bytes that are not UTF-8 come as lone surrogates (encoding such a field raises). Raises SourceError where a quoted
    field never ends or a field passes MAX_LINE_BYTES: what follows cannot be told from what it holds.
    """
    # Process-wide in the csv module; its default of 128 KiB would refuse long texts.
    csv.field_size_limit(MAX_LINE_BYTES)
    # strict: without it an unclosed quote swallows the rest of the file into one field, silently.
    reader = csv.reader(_text_lines(obj, data), delimiter=_delimiter(obj), strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field limit" in str(error):
                raise SourceError(
                    f"source object {obj.uri} has a quoted field that begins in the record of line {begin} and does not"
                    f" end ({error}); repair the quotes, or remove the object"
                ) from error
            yield error
        else:
            if fields:
                yield fields


def _delimiter(obj: SourceObject) -> str:
    stem, last = posixpath.splitext(obj.uri.lower())
    return "\t" if last == ".tsv" or stem.endswith(".tsv") else ","


def _text_lines(obj: SourceObject, data: Iterable[bytes]) -> Iterator[str]:
    for offset, line in lines(data):
        if line is None:
            raise SourceError(
                f"source object {obj.uri} has a line of more than {MAX_LINE_BYTES} bytes at byte {offset};"
                " repair or remove the object"
            )
        if offset == 0 and line.startswith(BOM):
            line = line[len(BOM) :]
        yield (line + b"\n").decode("utf-8", "surrogateescape")
