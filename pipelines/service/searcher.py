"""The version that is served, and its successor: opened beside it, warmed, and put in its place between two requests.

Q queries, d dimensions, k hits.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from operators.artifact.index import EXACT_AMONG, Index
from operators.artifact.manifest import Manifest
from operators.cleaner import CleanConfig, clean_text
from operators.encoding.text_encoder import TextEncoder
from operators.errors import ConfigError, VectormillError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.store import open_store
from pipelines.operating_points import choose_point, read_operating_points
from pipelines.search import check_search_settings, corpus_encoder
from pipelines.service.metrics import Metrics
from pipelines.service.refusals import invalid
from pipelines.service.search_request import SearchRequest
from pipelines.service.settings import ServiceSettings

WARM_QUERIES = 64
WARM_TOKENS, WARM_ENCODER_S = 512, 3.0  # batches of queries up to so many tokens, within so many seconds
POINTS_EVERY_S = 15.0  # operating points may be measured after the version was opened
RETRY_S = 30.0  # a version that could not be opened is tried again

# Columns of the row store that hits carry. Those that are asked for without text are read with it all the same: what is
# decoded then serves both.
HIT_COLUMNS = ("doc_id", "chunk_no", "source", "text")

log = logging.getLogger("vectormill.service")


@dataclass(frozen=True)
class Point:
    """Search settings that a request resolves to."""

    nprobe: int
    refine_factor: int


class OpenVersion:
    """One version with its encoder. Searched by one thread at a time; its facts may be read by all."""

    def __init__(self, index: Index, encoder: TextEncoder, settings: ServiceSettings) -> None:
        self.index = index
        self.manifest: Manifest = index.manifest
        self.encoder = encoder
        self.name = self.manifest.version
        self.d, self.nlist = self.manifest.d, self.manifest.nlist
        self.created_s = datetime.fromisoformat(self.manifest.created_at.replace("Z", "+00:00")).timestamp()
        self.opened_s = time.time()
        self._settings = settings
        stored_clean = self.manifest.config.get("clean", {})
        self._clean = CleanConfig(**{**stored_clean, "keep": tuple(stored_clean.get("keep", ()))})
        self._cleans = (
            self._clean.unicode != "none"
            or self._clean.control_characters != "keep"
            or self._clean.invisible_characters != "keep"
        )
        self.read_points()

    def read_points(self) -> None:
        """Read the operating points of the version anew. Raises ConfigError where --recall has none."""
        self.points = read_operating_points(self.index.store, self.name)
        quality, settings = self.manifest.quality, self._settings
        if settings.recall is not None:
            self.default = Point(*choose_point(self.points, self.manifest, settings.recall, self.index.store.url))
        else:
            check_search_settings(self.manifest, 1, settings.nprobe, settings.refine_factor)
            nprobe = quality["nprobe"] if settings.nprobe is None else settings.nprobe
            refine = quality["refine_factor"] if settings.refine_factor is None else settings.refine_factor
            self.default = Point(int(nprobe), int(refine))

    def point(self, request: SearchRequest) -> Point:
        """nprobe and refine factor of a request. Raises Refusal where its recall has no operating point."""
        if request.recall is not None:
            try:
                nprobe, refine = choose_point(self.points, self.manifest, request.recall, self.index.store.url)
            except ConfigError:
                known = [point["recall"] for point in self.points["points"]] if self.points else []
                raise invalid(
                    f"no operating point of {self.name} reaches this recall (known: {known or 'none'}); give nprobe and"
                    " refine_factor, or let `vectormill eval --recall` measure it",
                    "recall",
                    request.recall,
                ) from None
        else:
            default = self.default
            nprobe = default.nprobe if request.nprobe is None else request.nprobe
            refine = default.refine_factor if request.refine_factor is None else request.refine_factor
        most = max(1, self._settings.max_candidates // request.k)
        return Point(nprobe, min(refine, most) if request.refine_factor is None else refine)

    def cleaned(self, texts: list[str]) -> list[str]:
        """The queries as the corpus was cleaned. Raises Refusal for one of which nothing is left."""
        if not self._cleans:
            return texts
        out = [clean_text(self._clean, text) for text in texts]
        for place, (text, left) in enumerate(zip(texts, out, strict=True)):
            if not left.strip():
                raise invalid("of a query something must be left after cleaning (clean.*)", f"queries[{place}]", text)
        return out

    def terms(self, k: int, point: Point, prefix: str | None) -> int:
        """About how many candidates a query with these settings is given at most, before the best are chosen."""
        wanted = k * max(1, point.refine_factor)
        if prefix is not None:  # the fewer have the prefix, the more candidates it takes to find them
            among = len(self.index.prefixes.entries(prefix))
            wanted = max(wanted, among) if among <= EXACT_AMONG else wanted * self.manifest.ntotal // among
        return min(wanted, max(1, self.manifest.ntotal))

    def search(
        self, vectors_Qd: npt.NDArray[np.float32], k: int, point: Point, prefix: str | None
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Scores float32 and entries int64 (-1: none) [Q, at most k]. By the search thread."""
        return self.index.search_entries(
            vectors_Qd, k, nprobe=point.nprobe, refine_factor=point.refine_factor, prefix=prefix
        )

    def hits(
        self, scores_Qk: npt.NDArray[np.float32], entries_Qk: npt.NDArray[np.int64], with_text: bool
    ) -> list[dict[str, Any]]:
        """For each query `{"hits": [...]}`, best first. By the search thread."""
        there = entries_Qk >= 0
        rows = iter(self.index.rows_of(entries_Qk[there], HIT_COLUMNS))
        out = []
        for count, scores in zip(there.sum(axis=1).tolist(), scores_Qk.tolist(), strict=True):
            hits = []
            for place in range(count):
                row = next(rows)
                row["rank"], row["score"] = place + 1, scores[place]
                if not with_text:
                    del row["text"]
                hits.append(row)
            out.append({"hits": hits})
        return out

    def warm(self) -> None:
        """Read the index and search a few of the stored queries, so that the first request finds all in memory."""
        self.index.warm(self._settings.warm_bytes)
        self.index.row_groups.warm(HIT_COLUMNS)
        table = read_table(self.index.store, ObjectEntry.from_json(self.manifest.queries), ["vector"])
        vectors = np.array(table.column("vector").to_pylist()[:WARM_QUERIES], np.float32).reshape(-1, self.d)
        if len(vectors) and self.manifest.ntotal:
            self.hits(*self.search(vectors, 10, self.default, None), with_text=True)

    def facts(self) -> dict[str, Any]:
        """What `GET /v1/index` says."""
        manifest, quality = self.manifest, self.manifest.quality
        points = [] if self.points is None else self.points["points"]
        return {
            "version": self.name,
            "content_digest": manifest.content_digest,
            "created_at": manifest.created_at,
            "opened_at": datetime.fromtimestamp(self.opened_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "num_docs": manifest.num_docs,
            "ntotal": manifest.ntotal,
            "num_segments": len(manifest.segments),
            "d": self.d,
            "metric": manifest.metric,
            "nlist": self.nlist,
            "M": manifest.M,
            "nbits": manifest.nbits,
            "model": {name: manifest.model.get(name) for name in ("name", "fingerprint", "precision")},
            "default": {"nprobe": self.default.nprobe, "refine_factor": self.default.refine_factor},
            "stored": {
                "nprobe": quality["nprobe"],
                "refine_factor": quality["refine_factor"],
                "recall@10": quality["recall@10"],
            },
            "operating_points": [
                {
                    name: point.get(name)
                    for name in ("recall", "nprobe", "refine_factor", "recall@10", "p50_ms", "p99_ms")
                }
                for point in points
            ],
        }


class Searcher:
    """Holds `current`, and replaces it when CURRENT names another version."""

    current: OpenVersion

    def __init__(self, settings: ServiceSettings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.store = open_store(settings.root)
        self._encoder: tuple[str, TextEncoder] | None = None
        self._copies_before: frozenset[Path] = frozenset()  # of the version before the current one
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        """Open the published version and its model, and warm both. Raises as `search` does."""
        self._take(self._opened())

    def follow(self) -> None:
        """Begin to look at CURRENT every `poll_s`, in a thread."""
        self._thread = threading.Thread(target=self._follow, name="follow-current", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _opened(self) -> OpenVersion:
        index = Index.open(self.store, row_cache_bytes=self.settings.row_cache_bytes, copies=True)
        before = getattr(self, "current", None)
        if before is not None and before.index.prefixes.is_loaded:
            index.prefixes.load()
        version = OpenVersion(index, self._encoder_of(index.manifest), self.settings)
        version.warm()
        return version

    def _encoder_of(self, manifest: Manifest) -> TextEncoder:
        """The encoder of the version; the one at hand while model and settings are the same."""
        name = repr((manifest.model["fingerprint"], sorted(manifest.config["encode"].items(), key=str)))
        if self._encoder is None or self._encoder[0] != name:
            encoder = corpus_encoder(manifest, self.settings.model, threads=self.settings.threads)
            encoder.warm(WARM_TOKENS, WARM_ENCODER_S)
            self._encoder = name, encoder
        return self._encoder[1]

    def _take(self, version: OpenVersion) -> None:
        before = getattr(self, "current", None)
        self.current = version
        metrics = self.metrics
        metrics.index_info.clear()
        metrics.index_info.labels(version.name).set(1)
        metrics.index_vectors.set(version.manifest.ntotal)
        metrics.opened.set(version.opened_s)
        metrics.index_age.set_function(lambda: time.time() - self.current.created_s)
        if before is not None:
            metrics.swaps.inc()
            log.info("serving %s in place of %s", version.name, before.name)
            # Those of the version before stay, for a rollback.
            old, self._copies_before = self._copies_before, before.index.copies
            for path in old - before.index.copies - version.index.copies:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:  # another user's file, say: it only takes room
                    log.warning("cannot delete a copy that is no longer needed: %s", error)
        else:
            log.info("serving %s of %s", version.name, self.store.url)

    def _follow(self) -> None:
        points_at, quiet_until, reported = time.monotonic() + POINTS_EVERY_S, 0.0, ""
        while not self._stop.wait(self.settings.poll_s):
            try:
                if time.monotonic() < quiet_until:
                    continue
                if not self.current.index.is_current():
                    started = time.monotonic()
                    self._take(self._opened())
                    gc.collect()  # what is left of the version before; quick, for what was there at the start is frozen
                    self.metrics.swap_s.observe(time.monotonic() - started)
                elif time.monotonic() >= points_at:
                    points_at = time.monotonic() + POINTS_EVERY_S
                    self.current.read_points()
                reported = ""
            except Exception as error:
                self.metrics.swap_failures.inc()
                quiet_until = time.monotonic() + min(RETRY_S, 10 * self.settings.poll_s)
                said = f"{type(error).__name__}: {error}"
                if said != reported:
                    known = isinstance(error, VectormillError | OSError)
                    log.error(
                        "goes on serving %s; the published version could not be taken: %s",
                        self.current.name,
                        said,
                        exc_info=not known,
                    )
                    reported = said
