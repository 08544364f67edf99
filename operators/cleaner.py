"""Rows in, cleaned rows with the hash of their text out; what is dropped has a reason.

    control and invisible characters -> Unicode normalisation -> empty, too short, too long -> plug-ins -> text hash

In this order cleaning is idempotent: no normal form brings back a character of the first step, while taking characters
away first lets those around them compose.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from operators import schemas
from operators.errors import ConfigError, FingerprintError
from operators.predicates import Predicate, load_predicates, reason_of
from operators.settings import semantic

# RE2 syntax. C0 and C1 controls without tab, line feed and carriage return.
_CONTROL = r"[\x00-\x08\x0B\x0C\x0E-\x1F\x7F\x{80}-\x{9F}]"
# Soft hyphen, zero-width space, word joiner, invisible operators, BOM, and everything that steers the direction of text.
# Not the joiner and non-joiner U+200C and U+200D: emoji, Persian and Indic scripts are spelt with them.
_INVISIBLE = (
    r"[\x{AD}\x{61C}\x{180E}\x{200B}\x{200E}\x{200F}\x{202A}-\x{202E}\x{2060}-\x{2064}\x{2066}-\x{206F}\x{FEFF}]"
)
_FORMS = ("none", "NFC", "NFD", "NFKC", "NFKD")
_CHOICES = ("keep", "remove", "space")
_OTHER_REASONS = ("empty_after_cleaning", "too_short", "too_long", "no_tokens", "duplicate_text")


@dataclasses.dataclass(frozen=True)
class CleanConfig:
    """Section `clean` of the configuration."""

    unicode: str = semantic("none", "Unicode normal form of the text: none, NFC, NFD, NFKC or NFKD")
    control_characters: str = semantic(
        "keep", "C0 and C1 controls but tab and newlines: keep, remove, or space for each"
    )
    invisible_characters: str = semantic("keep", "soft hyphens, zero-width, BOM, bidi controls: keep, remove or space")
    min_chars: int = semantic(0, "least characters of a cleaned text; 0: no bound")
    max_chars: int = semantic(0, "most characters of a cleaned text; 0: no bound")
    duplicates: str = semantic("keep", "equal texts across the corpus: keep all, or drop all but the first")
    keep: tuple[str, ...] = semantic((), "package.module:function of plug-ins; rows where one is not true are dropped")

    def __post_init__(self) -> None:
        choices = [
            ("unicode", _FORMS),
            ("control_characters", _CHOICES),
            ("invisible_characters", _CHOICES),
            ("duplicates", ("keep", "drop")),
        ]
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise ConfigError(f"clean.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("min_chars", "max_chars"):
            if getattr(self, name) < 0:
                raise ConfigError(f"clean.{name} must be at least 0, got {getattr(self, name)}")
        if self.max_chars and self.min_chars > self.max_chars:
            raise ConfigError(
                f"clean.min_chars must be at most clean.max_chars ({self.max_chars}), got {self.min_chars}"
            )
        reasons = [reason_of(name) for name in self.keep]
        for reason in reasons:
            if reasons.count(reason) > 1 or reason in _OTHER_REASONS:
                raise ConfigError(
                    f"clean.keep must name functions of different names, none of {', '.join(_OTHER_REASONS)}: dropped rows"
                    f" are counted by them; got {', '.join(self.keep)}"
                )


class Cleaner:
    """Operator from a table of ROWS to a table of CLEANED and one of REJECTS (the rows that were dropped).

    Deterministic, and what becomes of a row depends on nothing but the row (if this is so of the plug-ins).
    expected_plugins: `plugin_fingerprints` of the machine that began the run.
    """

    def __init__(self, config: CleanConfig, expected_plugins: Iterable[tuple[str, str]] = ()) -> None:
        self.config = config
        self.expected_plugins = dict(expected_plugins)
        self._predicates: list[Predicate] | None = None

    def setup(self) -> None:
        """Imports the plug-ins. Raises ConfigError when one cannot be had, FingerprintError when it is another one."""
        if self._predicates is None:
            predicates = load_predicates(self.config.keep)
            for predicate in predicates:
                expected = self.expected_plugins.get(_field_of(predicate.name), predicate.fingerprint)
                if predicate.fingerprint != expected:
                    raise FingerprintError(
                        f"the plug-in {predicate.name} on this worker has fingerprint {predicate.fingerprint[:12]}, the"
                        f" driver's has {expected[:12]}; give all nodes the same code (clean.keep)"
                    )
            self._predicates = predicates

    def __call__(self, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows that are kept with their cleaned texts and text_hash, and those that are dropped, both in order.

        Reasons: empty_after_cleaning, too_short, too_long, or the name of the first plug-in that was not true; plug-ins
        see cleaned texts, and only the rows that all before them kept.
        """
        self.setup()
        assert self._predicates is not None
        original = _one_chunk(rows.column("text"))
        texts = _normalized(self.config, original)
        cleaned = pa.table(
            [*(rows.column(n) if n != "text" else texts for n in schemas.ROWS.names)], schema=schemas.ROWS
        )
        kept, dropped = self._bounds(original, texts)
        for predicate in self._predicates:
            places = np.flatnonzero(kept)
            if not len(places):
                break
            lost = places[~predicate.keeps(cleaned.take(pa.array(places)).combine_chunks())]
            kept[lost] = False
            detail = f"{predicate.name} is not true for it (clean.keep)"
            dropped += [(place, predicate.reason, detail) for place in lost.tolist()]
        result = cleaned if kept.all() else cleaned.filter(pa.array(kept))
        hashes = text_hashes(_one_chunk(result.column("text")))
        return result.append_column(schemas.CLEANED.field("text_hash"), hashes), _dropped_rows(rows, dropped)

    def _bounds(self, original: pa.Array, texts: pa.Array) -> tuple[npt.NDArray[np.bool_], list[tuple[int, str, str]]]:
        """True for the texts within the bounds, and (place, reason, detail) of the others."""
        config = self.config
        num_chars = pc.utf8_length(texts).to_numpy(zero_copy_only=False)
        blank = pc.or_(pc.utf8_is_space(texts), pc.equal(pc.binary_length(texts), 0)).to_numpy(zero_copy_only=False)
        too_short = ~blank & (num_chars < config.min_chars)
        too_long = ~blank & (num_chars > config.max_chars) if config.max_chars else np.zeros(len(blank), dtype=bool)
        dropped = []
        for place in np.flatnonzero(blank).tolist():
            before = len(original[place].as_py())
            detail = f"{before} characters before cleaning, none but white space after it"
            dropped.append((place, "empty_after_cleaning", detail))
        for lost, reason, limit in (
            (too_short, "too_short", f"the least is {config.min_chars} (clean.min_chars)"),
            (too_long, "too_long", f"the most is {config.max_chars} (clean.max_chars)"),
        ):
            places = np.flatnonzero(lost).tolist()
            dropped += [(place, reason, f"{num_chars[place]} characters, {limit}") for place in places]
        return ~(blank | too_short | too_long), dropped


def clean_text(config: CleanConfig, text: str) -> str:
    """One text normalised as the documents are: for queries. Bounds and plug-ins do not apply."""
    cleaned: str = _normalized(config, pa.array([text], pa.large_string()))[0].as_py()
    return cleaned


def plugin_fingerprints(config: CleanConfig) -> dict[str, str]:
    """Fields for the fingerprint of a run: for each plug-in its name and the SHA-256 of its module's source.

    What a plug-in imports or loads from elsewhere is not covered. Raises ConfigError when one cannot be imported.
    """
    return {_field_of(predicate.name): predicate.fingerprint for predicate in load_predicates(config.keep)}


def _field_of(name: str) -> str:
    return f"clean.keep.{name}"


def text_hashes(texts: pa.Array) -> pa.Array:
    """BLAKE2b-128 of each text's UTF-8, binary(16) [N], from a LargeStringArray without nulls."""
    if not len(texts):
        return pa.array([], pa.binary(16))
    _, offset_bytes, data = texts.buffers()
    offsets = np.frombuffer(offset_bytes, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
    content, blake2b = memoryview(data if data is not None else b""), hashlib.blake2b
    digests = [blake2b(content[begin:end], digest_size=16).digest() for begin, end in itertools.pairwise(offsets)]
    return pa.Array.from_buffers(pa.binary(16), len(texts), [None, pa.py_buffer(b"".join(digests))])


def _normalized(config: CleanConfig, texts: pa.Array) -> pa.Array:
    for choice, pattern in ((config.control_characters, _CONTROL), (config.invisible_characters, _INVISIBLE)):
        if choice != "keep":
            replacement = " " if choice == "space" else ""
            texts = pc.replace_substring_regex(texts, pattern=pattern, replacement=replacement)
    return texts if config.unicode == "none" else pc.utf8_normalize(texts, config.unicode)


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def _dropped_rows(rows: pa.Table, dropped: list[tuple[int, str, str]]) -> pa.Table:
    dropped.sort()
    taken = rows.select(["source", "row", "doc_id"]).take(pa.array([place for place, _, _ in dropped], pa.int64()))
    columns = {
        "source": taken.column("source"),
        "row": taken.column("row"),
        "doc_id": taken.column("doc_id"),
        "outcome": pa.array(["dropped"] * len(dropped), pa.string()),
        "reason": pa.array([reason for _, reason, _ in dropped], pa.string()),
        "detail": pa.array([detail for _, _, detail in dropped], pa.string()),
    }
    return pa.table([columns[name] for name in schemas.REJECTS.names], schema=schemas.REJECTS)
