"""What went through the streaming job, how fast, which encoder did it, and how long pieces waited for one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cluster.telemetry import Span, now
from operators.storage.traffic import Traffic
from pipelines.telemetry.time_bins import TimeBins

if TYPE_CHECKING:  # importing these loads torch, which most commands that show progress do without
    from cluster.parcels import PieceResult
    from operators.sources.pieces import Piece

WINDOW_S = 30.0  # of the rates that are shown while it runs
WINDOW_PIECES = 8  # are in the window at least, however long they take
MAX_RECENT = 4096
SERIES = ("rows", "tokens", "busy_s", "queued_s")
COUNTS = ("rows_read", "documents", "chunks", "tokens")
MAX_WORKERS = 512  # that are listed one by one


@dataclass
class Work:
    """Sums over pieces or tasks of one kind."""

    count: int = 0
    seconds: float = 0.0
    traffic: Traffic = field(default_factory=Traffic)

    def add(self, span: Span) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += span.seconds
        self.traffic += span.traffic

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"count": self.count, "seconds": round(self.seconds, 3), **self.traffic.to_json()}


@dataclass
class Encoder:
    """One worker of the encoder pool."""

    pieces: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    last_end: float = 0.0
    gpu_share_s: float = 0.0  # utilisation x seconds
    gpu_memory_bytes: float = 0.0


@dataclass(frozen=True)
class Finished:
    """What the live rates need of a piece."""

    end: float
    rows: int
    tokens: int
    source_bytes: float
    wait_s: float  # before the encoder
    encode: Span


def source_bytes(pieces: Iterable[Piece]) -> dict[str, float]:
    """Stored bytes of each piece by its id: exact for byte ranges and staged rows, else equal shares of the listed sizes."""
    pieces = list(pieces)
    shared_by = Counter(obj.uri for piece in pieces for obj in piece.objects)
    found = {}
    for piece in pieces:
        if piece.staged is not None:
            stored = (piece.staged.rows, piece.staged.rejects)
            size = float(sum(entry.size_bytes for entry in stored if entry is not None))
        elif piece.kind == "byte_range":
            size = float(piece.end - piece.start)
        else:
            size = sum(obj.size_bytes / shared_by[obj.uri] for obj in piece.objects)
        found[piece.piece_id] = size
    return found


class PieceFlow:
    """The pieces of the streaming job: what went through, which encoder did it, how long they waited for one."""

    def __init__(self, begin: float) -> None:
        self.num_encoders = 0
        self.in_process = False
        self.total = self.resumed = self.encoded = self.failed = 0
        self.bytes_total = self.bytes_resumed = self.bytes_done = 0.0
        self.counts: Counter[str] = Counter()  # of this attempt: rows_read, documents, chunks, tokens
        self.rejected: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.stages: dict[str, Work] = {}
        self.encoders: dict[str, Encoder] = {}
        self.token_lengths: Counter[int] = Counter()  # of all pieces, also of earlier attempts
        self.bins = TimeBins(SERIES, begin)
        self.first_encode = float("inf")
        self._sizes: dict[str, float] = {}
        self._recent: deque[Finished] = deque(maxlen=MAX_RECENT)

    def expect(self, pieces: Iterable[Piece], missing: Iterable[Piece], num_encoders: int, in_process: bool) -> None:
        """A streaming job of all `pieces` begins; those that are not missing were committed before. May be called again."""
        sizes = source_bytes(pieces)
        self._sizes = {piece.piece_id: sizes[piece.piece_id] for piece in missing}
        self.num_encoders, self.in_process = num_encoders, in_process
        self.total += len(sizes)
        self.resumed += len(sizes) - len(self._sizes)
        self.bytes_total += sum(sizes.values())
        self.bytes_resumed += sum(sizes.values()) - sum(self._sizes.values())

    def add(self, result: PieceResult) -> None:
        """A piece has ended."""
        spans = {span.stage: span for span in result.spans}
        for span in result.spans:
            self.stages.setdefault(span.stage, Work()).add(span)
        if result.error is not None:
            self.failed += 1
            return
        facts = result.facts
        rows, tokens = facts["num_rows_read"], facts["num_tokens"]
        size = self._sizes.get(result.piece.piece_id, 0.0)
        self.encoded += 1
        self.bytes_done += size
        self.counts.update(rows_read=rows, documents=facts["num_docs"], chunks=facts["num_chunks"], tokens=tokens)
        self.rejected.update(facts["rejected"])
        self.dropped.update(facts["dropped"])
        encode, chunk = spans.get("encode"), spans.get("chunk")
        if encode is None or chunk is None:
            return
        self._encoded_by(encode, tokens)
        waited_from = min(chunk.end, encode.begin)  # clocks of two machines may disagree
        latest = now()
        self.bins.spread(
            min(encode.begin, latest), min(encode.end, latest), rows=rows, tokens=tokens, busy_s=encode.seconds
        )
        self.bins.spread(min(waited_from, latest), min(encode.begin, latest), queued_s=encode.begin - waited_from)
        self.first_encode = min(self.first_encode, encode.begin)
        self._recent.append(Finished(latest, rows, tokens, size, encode.begin - waited_from, encode))

    def _encoded_by(self, span: Span, tokens: int) -> None:
        encoder = self.encoders.setdefault(span.worker, Encoder())
        encoder.pieces += 1
        encoder.tokens += tokens
        encoder.busy_s += span.seconds
        encoder.last_end = max(encoder.last_end, span.end)
        if span.gpu is not None:
            encoder.gpu_share_s += span.gpu[0] * span.seconds
            encoder.gpu_memory_bytes = max(encoder.gpu_memory_bytes, span.gpu[1])

    def so_far(self) -> dict[str, Any]:
        """What this attempt has done, in sums."""
        used = sum((work.traffic for work in self.stages.values()), Traffic())
        return {
            **{name: self.counts[name] for name in COUNTS},
            "source_bytes": round(self.bytes_done),
            "source_bytes_total": round(self.bytes_total - self.bytes_resumed),
            **used.to_json(),
            "rejected": self.rejected.total(),
            "dropped": self.dropped.total(),
            "left_out": {outcome: dict(found) for outcome, found in self._left_out() if found},
            "failed_pieces": self.failed,
        }

    def _left_out(self) -> list[tuple[str, Counter[str]]]:
        return [("rejected", self.rejected), ("dropped", self.dropped)]

    def totals(self) -> dict[str, Any]:
        """`so_far`, with the rates of the whole attempt, from the first piece at an encoder on; {} if there was none."""
        if not self.encoders:
            return {}
        seconds = max(max(encoder.last_end for encoder in self.encoders.values()) - self.first_encode, 1e-3)
        busy = sum(encoder.busy_s for encoder in self.encoders.values())
        return {
            **self.so_far(),
            "rows_per_s": self.counts["rows_read"] / seconds,
            "tokens_per_s": self.counts["tokens"] / seconds,
            "source_bytes_per_s": self.bytes_done / seconds,
            "busy_share": min(1.0, busy / (max(self.num_encoders, len(self.encoders)) * seconds)),
            "queue": sum(self.bins.columns["queued_s"]) / seconds,
        }

    def live(self) -> dict[str, Any]:
        """Rates over the last half minute (of the last pieces, if they take longer); {} before the first piece."""
        if not self._recent:
            return {}
        at = now()
        begin = min(at - WINDOW_S, self._recent[-min(WINDOW_PIECES, len(self._recent))].encode.begin)
        begin = max(begin, self.first_encode)
        window = [piece for piece in self._recent if piece.end >= begin]
        seconds = max(at - begin, 1e-3)
        left = self.bytes_total - self.bytes_resumed - self.bytes_done
        # Over the whole attempt: pieces differ, and what is left is more like all of it than like the last few.
        rate = self.bytes_done / max(at - self.first_encode, 1e-3)
        finished = max(len(window), 1)
        return {
            **self.so_far(),
            "rows_per_s": sum(piece.rows for piece in window) / seconds,
            "tokens_per_s": sum(piece.tokens for piece in window) / seconds,
            "source_bytes_per_s": rate,
            "busy_share": self._busy_share(window, begin, at),
            # Little's law: pieces that waited, times how long, over the time.
            "queue": len(window) / seconds * sum(piece.wait_s for piece in window) / finished,
            "eta_s": left / rate if rate > 0 and self.encoded > 1 else None,
        }

    def _busy_share(self, window: list[Finished], begin: float, at: float) -> float:
        """Share of the time that encoders with a finished piece worked.

        What they do now is not known yet, so each one's time ends with its last piece, unless that is longer ago than any
        piece takes: then it waits.
        """
        longest = max((piece.encode.seconds for piece in window), default=0.0)
        spans_of: dict[str, list[Span]] = {}
        for piece in window:
            spans_of.setdefault(piece.encode.worker, []).append(piece.encode)
        busy, held = 0.0, 0.0
        for name, spans in spans_of.items():
            last = self.encoders[name].last_end
            end = last if at - last <= 2 * longest + 1 else at
            began_here = self.encoders[name].pieces == len(spans)
            first = max(begin, min(span.begin for span in spans)) if began_here else begin
            busy += sum(max(0.0, min(span.end, end) - max(span.begin, first)) for span in spans)
            held += max(end - first, 1e-6)
        return min(1.0, busy / held) if held else 0.0

    def to_json(self, run_begin: float) -> dict[str, Any]:
        """Totals of this attempt; `resumed` is what earlier ones had committed."""
        last = max((encoder.last_end for encoder in self.encoders.values()), default=0.0)
        seconds = last - self.first_encode if self.encoders else 0.0
        busy = sum(encoder.busy_s for encoder in self.encoders.values())
        pool = max(self.num_encoders, len(self.encoders))
        ranked = sorted(self.encoders.items(), key=lambda item: -item[1].busy_s)[:MAX_WORKERS]
        return {
            "total": self.total,
            "resumed": self.resumed,
            "encoded": self.encoded,
            "failed": self.failed,
            "source_bytes": {
                "total": round(self.bytes_total),
                "resumed": round(self.bytes_resumed),
                "encoded": round(self.bytes_done),
            },
            **{name: self.counts[name] for name in COUNTS},
            **{outcome: dict(sorted(found.items())) for outcome, found in self._left_out()},
            "stages": {name: work.to_json() for name, work in self.stages.items()},
            "encoders": pool,
            "where": "process" if self.in_process else "ray",
            "encode_begin_s": round(self.first_encode - run_begin, 3) if self.encoders else None,
            "encode_seconds": round(seconds, 3),
            "busy_share": round(busy / (pool * seconds), 4) if seconds > 0 else None,
            "workers": [_worker_json(name, encoder, seconds) for name, encoder in ranked],
        }

    def series(self, run_begin: float) -> dict[str, Any]:
        """Throughput over the run, in equal steps from the first that has any: at most MAX_BINS of them.

        Rates of the first and the last step are of the time in which there were encoders at work.
        """
        width, begin = self.bins.width_s, self.bins.begin
        steps = list(zip(*(self.bins.columns[name] for name in SERIES), strict=True))
        idle = next((number for number, amounts in enumerate(steps) if any(amounts)), 0)
        last = max((encoder.last_end for encoder in self.encoders.values()), default=0.0)
        pool = max(self.num_encoders, len(self.encoders), 1)
        found: dict[str, list[float]] = {name: [] for name in ("rows_per_s", "tokens_per_s", "busy_share", "queue")}
        for number, (rows, tokens, busy_s, queued_s) in enumerate(steps[idle:], idle):
            low = begin + number * width
            seconds = min(low + width, last) - max(low, self.first_encode)
            seconds = width if seconds <= 0 else max(seconds, width / 100)
            found["rows_per_s"].append(round(rows / seconds, 3))
            found["tokens_per_s"].append(round(tokens / seconds, 1))
            found["busy_share"].append(round(min(1.0, busy_s / (seconds * pool)), 4))
            found["queue"].append(round(queued_s / width, 2))
        return {"begin_s": round(begin + idle * width - run_begin, 3), "step_s": width, **found}


def _worker_json(name: str, encoder: Encoder, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {
        "worker": name,
        "pieces": encoder.pieces,
        "tokens": encoder.tokens,
        "busy_s": round(encoder.busy_s, 3),
        "busy_share": round(min(1.0, encoder.busy_s / seconds), 4) if seconds > 0 else None,
    }
    if encoder.gpu_memory_bytes:
        found["gpu_utilisation"] = round(encoder.gpu_share_s / max(encoder.busy_s, 1e-9), 4)
        found["gpu_memory_bytes"] = round(encoder.gpu_memory_bytes)
    return found
