"""Operating points: for a recall, the search settings that reach it fastest, measured on the version's own query sample.

They lie beside the manifest and are no part of the version: measuring again replaces them, and the digest does not cover
them. A version that follows with the same quantizer inherits them. Q queries, d dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from operators.artifact.exact_neighbours import exact_neighbours, read_exact
from operators.artifact.index import Index
from operators.artifact.manifest import Manifest
from operators.errors import ConfigError, IntegrityError
from operators.piece_store import read_table
from operators.storage.checked import ObjectEntry
from operators.storage.commits import seal, unseal
from operators.storage.store import Store, open_store
from pipelines.recall import PROBE_RECALL_K, STUCK_GAIN, intersection_recall
from pipelines.telemetry.progress import RunProgress
from pipelines.versions import open_version

RECALLS = (0.90, 0.95, 0.99)
# Candidates a hit that are scored again with the stored vectors; 1 would only sort the same hits anew.
REFINE_FACTORS = (0, 2, 4, 8, 16)
ROUNDS = 3  # of the latency of each point, in turns
ROUND_S = 1.0  # after which a round of one point ends, though not all queries had their turn
ALMOST = 1.1  # of two points so near in latency the one that reads fewer vectors is taken


def operating_points_key(version: str) -> str:
    """Key of the version's operating points."""
    return f"versions/{version}/operating_points.json"


def read_operating_points(store: Store, version: str) -> dict[str, Any] | None:
    """What `measure_operating_points` stored for the version, or for one before it with the same quantizer; None: nothing.

    Raises IntegrityError when the object is damaged.
    """
    key = operating_points_key(version)
    try:
        return unseal(store.read(key), f"{store.url}/{key}")
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        raise IntegrityError(f"{error}; or measure again: vectormill eval {store.url} --version {version}") from None


def point_for(store: Store, manifest: Manifest, recall: float) -> tuple[int, int]:
    """nprobe and refine factor that reach recall@10 of at least `recall` on the version's query sample.

    The stored operating point with the lowest recall that suffices; else the point that the manifest itself carries.
    Raises ConfigError, saying what there is and how to measure more, when neither reaches it.
    """
    return choose_point(read_operating_points(store, manifest.version), manifest, recall, store.url)


def choose_point(stored: dict[str, Any] | None, manifest: Manifest, recall: float, url: str) -> tuple[int, int]:
    """As `point_for`, given what `read_operating_points` found; url: of the root, for the message."""
    if not 0 < recall < 1:
        raise ConfigError(f"recall must be between 0 and 1, got {recall:g} (--recall)")
    points = [] if stored is None else stored["points"]
    enough = [point for point in points if point["recall"] >= recall]
    if enough:
        best = min(enough, key=lambda point: float(point["recall"]))
        return int(best["nprobe"]), int(best["refine_factor"])
    quality = manifest.quality
    if quality["recall@10"] >= recall:
        return int(quality["nprobe"]), int(quality["refine_factor"])
    known = sorted({*(f"{point['recall']:g}" for point in points), f"{quality['recall@10']:.4f}"})
    raise ConfigError(
        f"no operating point of {manifest.version} at {url} reaches recall {recall:g}, known are {', '.join(known)} (--recall);"
        f" measure it with `vectormill eval {url} --recall {recall:g}`, or give --nprobe and --refine-factor"
    )


def carry_operating_points(store: Store, manifest: Manifest) -> None:
    """Give the version the operating points of its parent, if they were measured with the same quantizer.

    Raises IntegrityError when the parent's are damaged.
    """
    found = None if manifest.parent is None else read_operating_points(store, manifest.parent)
    if found is not None and found["quantizer"] == manifest.quantizer_entry.sha256:
        store.put(operating_points_key(manifest.version), seal(found))


def measure_operating_points(
    root: str,
    recalls: Sequence[float] = RECALLS,
    version: str | None = None,
    progress: RunProgress | None = None,
) -> dict[str, Any]:
    """Find and store the fastest settings for each recall@10 against exact search, on the query sample of the version.

    Of every refine factor the smallest nprobe that reaches the recall is tried; the one with the lowest median latency of
    single queries is taken, with all threads of faiss and without encoding. `unreached` are recalls that no setting reached.
    nprobe and recalls are deterministic, latencies are of this machine, now. Raises ConfigError, IndexNotFoundError,
    IntegrityError.
    """
    for recall in recalls:
        if not 0 < recall < 1:
            raise ConfigError(f"recall must be between 0 and 1, got {recall:g} (--recall)")
    started = time.monotonic()
    with progress or RunProgress(quiet=True) as shown:
        store = open_store(root)
        manifest = open_version(store, version)
        if not manifest.ntotal:
            raise ConfigError(f"a version must hold rows to be measured, every row of {manifest.version} is deleted")
        shown.stage("open the index")
        sample = _Sample(Index(store, manifest))
        shown.stage("find nprobe", total=len(REFINE_FACTORS))
        least: list[list[tuple[int, int]]] = [[] for _ in recalls]  # of each recall: (nprobe, refine factor)
        for refine in REFINE_FACTORS:
            for place, recall in enumerate(recalls):
                nprobe = sample.least_nprobe(recall, refine)
                if nprobe is not None:
                    least[place].append((nprobe, refine))
            shown.advance()
        tried = sorted({setting for settings in least for setting in settings})
        shown.stage("measure latency", total=ROUNDS * len(tried))
        latencies: dict[tuple[int, int], list[float]] = {setting: [] for setting in tried}
        for _ in range(ROUNDS):
            for setting in tried:
                latencies[setting] += sample.latencies_ms(*setting)
                shown.advance()
        points = [
            _point(recall, sample, min(settings, key=lambda setting: _cost(latencies, settings, setting)), latencies)
            for recall, settings in zip(recalls, least, strict=True)
            if settings
        ]
        measured = {
            "version": manifest.version,
            "quantizer": manifest.quantizer_entry.sha256,
            "measured_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "k": sample.k,
            "queries": len(sample.queries_Qd),
            "threads": faiss.omp_get_max_threads(),
            "points": sorted(points, key=lambda point: float(point["recall"])),
            "unreached": [
                {"recall": recall, "best_recall@10": max(sample.recalls.values())}
                for recall, settings in zip(recalls, least, strict=True)
                if not settings
            ],
            "curve": [
                {"nprobe": nprobe, "refine_factor": refine, "recall@10": recall}
                for (nprobe, refine), recall in sorted(sample.recalls.items(), key=lambda item: item[0][::-1])
            ],
        }
        store.put(operating_points_key(manifest.version), seal(measured))
    return {**measured, "root": root, "seconds": time.monotonic() - started}


class _Sample:
    """The query sample of an open index: recall of settings, each measured once, and latencies."""

    def __init__(self, index: Index) -> None:
        manifest = index.manifest
        table = read_table(index.store, ObjectEntry.from_json(manifest.queries), ["vector"])
        self.queries_Qd = np.array(table.column("vector").to_pylist(), np.float32).reshape(table.num_rows, manifest.d)
        if not len(self.queries_Qd):
            raise ConfigError(
                f"{manifest.version} holds no query sample to measure with; build with index.query_sample"
            )
        self.index = index
        self.k = min(PROBE_RECALL_K, manifest.ntotal)
        stored = None if manifest.exact is None else read_exact(index.store, ObjectEntry.from_json(manifest.exact))
        self.exact = (stored or exact_neighbours(index, self.queries_Qd)).first(self.k)
        self.recalls: dict[tuple[int, int], float] = {}

    def recall(self, nprobe: int, refine: int) -> float:
        if (nprobe, refine) not in self.recalls:
            found = self.index.search(self.queries_Qd, self.k, nprobe=nprobe, refine_factor=refine).row_ids_Qk
            self.recalls[nprobe, refine] = intersection_recall(found, self.exact)
        return self.recalls[nprobe, refine]

    def least_nprobe(self, recall: float, refine: int) -> int | None:
        """The smallest nprobe that reaches the recall with this refine factor; None when none does.

        nprobe doubles until it does, or until a doubling no longer helps: the codes are the limit then.
        """
        nlist = self.index.manifest.nlist
        too_few, nprobe, best = 0, 1, 0.0
        while (reached := self.recall(nprobe, refine)) < recall:
            if nprobe == nlist or (reached - best < STUCK_GAIN and nprobe >= 8):
                return None
            best = max(best, reached)
            too_few, nprobe = nprobe, min(2 * nprobe, nlist)
        while nprobe - too_few > max(1, nprobe // 16):
            middle = (too_few + nprobe) // 2
            if self.recall(middle, refine) >= recall:
                nprobe = middle
            else:
                too_few = middle
        return nprobe

    def latencies_ms(self, nprobe: int, refine: int) -> list[float]:
        """Of single queries, for at most ROUND_S; the first one warms up and is not counted."""
        out: list[float] = []
        began = time.monotonic()
        for number in range(-1, len(self.queries_Qd)):
            query = self.queries_Qd[max(number, 0) : max(number, 0) + 1]
            start = time.perf_counter()
            self.index.search(query, self.k, nprobe=nprobe, refine_factor=refine)
            if number >= 0:
                out.append(1000 * (time.perf_counter() - start))
            if out and time.monotonic() - began > ROUND_S:
                break
        return out


def _cost(
    latencies: dict[tuple[int, int], list[float]], settings: list[tuple[int, int]], setting: tuple[int, int]
) -> tuple[int, float]:
    """Sorts settings: those that are almost the fastest by what they read, before all others by latency."""
    median = float(np.median(latencies[setting]))
    fastest = min(float(np.median(latencies[other])) for other in settings)
    return (setting[1], median) if median <= ALMOST * fastest else (max(REFINE_FACTORS) + 1, median)


def _point(
    recall: float, sample: _Sample, setting: tuple[int, int], latencies: dict[tuple[int, int], list[float]]
) -> dict[str, Any]:
    p50_ms, p99_ms = np.percentile(latencies[setting], [50, 99]).tolist()
    return {
        "recall": recall,
        "nprobe": setting[0],
        "refine_factor": setting[1],
        "recall@10": sample.recalls[setting],
        "p50_ms": p50_ms,
        "p99_ms": p99_ms,
    }
