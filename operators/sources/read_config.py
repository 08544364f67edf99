"""Settings of reading: which columns are taken, which rows are refused, how a corpus is cut into pieces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from operators.errors import ConfigError
from operators.settings import operational, semantic

ID_CANDIDATES = ("_id", "id", "doc_id")
TEXT_CANDIDATES = ("text", "contents", "content", "body")
# Ids travel with every chunk and stand in 32-bit string arrays; nothing that names a document is longer.
MAX_ID_BYTES = 4096
# A line of JSONL or CSV longer than this is never held in memory.
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class ReadConfig:
    """Section `read` of the configuration."""

    id_column: str = semantic(
        "", "column with the document id; '' takes _id, id or doc_id, else makes ids from source and row"
    )
    text_columns: tuple[str, ...] = semantic(
        (), "columns that are joined by a space; () takes title and text, else text, contents, content or body"
    )
    max_text_bytes: int = semantic(1_000_000, "rows with more UTF-8 bytes of text are rejected")
    max_reject_fraction: float = operational(0.05, "the run ends when more than this fraction of the rows is rejected")
    piece_rows: int = semantic(1024, "rows of a piece of Parquet or of a staged object")
    piece_bytes: int = semantic(4 << 20, "uncompressed source bytes of a piece")

    def __post_init__(self) -> None:
        for name in ("max_text_bytes", "piece_rows", "piece_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"read.{name} must be a whole number of at least 1, got {value!r}")
        if self.max_text_bytes > MAX_LINE_BYTES:
            raise ConfigError(f"read.max_text_bytes must be in 1..{MAX_LINE_BYTES}, got {self.max_text_bytes}")
        if not 0 <= self.max_reject_fraction <= 1:
            raise ConfigError(f"read.max_reject_fraction must be in 0..1, got {self.max_reject_fraction!r}")
        columns: Any = self.text_columns
        if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) and name for name in columns):
            raise ConfigError(f"read.text_columns must be a list of column names, got {self.text_columns!r}")
        if len(set(self.text_columns)) != len(self.text_columns):
            raise ConfigError(f"read.text_columns must name each column once, got {list(self.text_columns)}")
        object.__setattr__(self, "text_columns", tuple(self.text_columns))
