"""Seconds of each stage of a build, and what binds it. Each formula follows the code that it names.

Costs of the processor are those of one core; what runs in parallel is spread over the cores of the fleet. Requests to
storage add their latency, and bytes their transfer, where both are known (`storage_*`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cluster.capacity.objects import encoded_bytes, num_parts, num_scans, object_bytes
from cluster.capacity.storage_requests import scan_reads, search_reads, stage_requests
from cluster.capacity.workload import Workload
from operators.piece_store import READ_AHEAD

# kernels/kmeans.py and kernels/pq.py; tests/cluster/test_capacity.py compares with them.
MIN_ROWS_PER_CENTROID = 12
ROWS_PER_CODEWORD = (16, 64, 256)
MAX_EXACT_LISTS = 1024
GROUP_ITERATIONS = 6
PQ_TRAIN_POINTS = (10_240, 65_536)  # operators/trainer.py
REENCODED_ENTRIES = 2_048  # of each part (operators/artifact/verifier.py)
QUERIES_PER_PIECE, QUERY_TOKENS = 32, 14  # operators/query_sample.py: 450 tokens a piece
RECORD_READERS = (
    16  # threads of the driver that read footers and records; of an index that opens parts and gathers vectors
)
LENGTHS = (16, 32, 64, 128, 256)  # tokens of a chunk at which encoding is measured
MAKESPAN_PIECES = 20_000  # beyond, the last piece hardly counts


@dataclass(frozen=True)
class StageTime:
    """Seconds of a stage; `parts`: what it would take if it were alone, by what limits it. The largest binds.

    single_task_s: how long one task of it runs while no other does, whatever the number of nodes.
    """

    name: str
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    single_task_s: float = 0.0

    @property
    def binds(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name]) if self.parts else "start-up"


def encode_s_per_token(c: Mapping[str, float], tokens: float) -> float:
    """Seconds a token of an encoder on a CPU core, between the measured lengths in a straight line."""
    points = [(length, c[f"encode_s_per_token_{length}"]) for length in LENGTHS]
    if tokens <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in itertools.pairwise(points):
        if tokens <= b:
            return low + (high - low) * (tokens - a) / (b - a)
    return points[-1][1]


def stage_times(work: Workload, c: Mapping[str, float]) -> list[StageTime]:
    """The stages of a build in order, as its progress names them, with the start of the process before and the end after."""
    stages = [
        StageTime("start of the process", c["process_start_s"]),
        _listing(work, c),
        StageTime("start Ray", c["ray_start_s"] if work.fleet.is_local else c["ray_join_s"]),
        _check_encoder(work, c),
        _encode(work, c),
        _number_rows(work, c),
        _tasks(work, c, "draw samples", work.num_shards, _pieces(work, c, "sample")),
        _train(work, c),
        _tasks(work, c, "build shards", work.num_shards, _pieces(work, c, "shard") + _codes_s(work, c)),
        *_merges(work, c),
        _ledger(work, c),
        _verify(work, c),
        _recall(work, c),
        _serial(work, c, "publish", 0.0),
    ]
    return stages


def kmeans_rows(num_rows: int, num_lists: int, iterations: int) -> int:
    """Rows that all iterations of the coarse k-means assign together (kernels/kmeans.py _row_step)."""
    total = 0
    for iteration in range(1, iterations + 1):
        wanted = 4 if 4 * (iteration - 1) < iterations else 2 if 2 * (iteration - 1) < iterations else 1
        step = 1 if iterations < 4 else max(1, min(wanted, num_rows // (MIN_ROWS_PER_CENTROID * num_lists)))
        total += math.ceil(num_rows / step)
    return total


def pq_rows(num_rows: int, nbits: int, iterations: int) -> int:
    """Rows that all iterations of a sub-quantizer's training assign together (kernels/pq.py _part_sizes)."""
    last = -(-iterations // 3)
    middle = (iterations - last) * 2 // 5
    counts = (iterations - last - middle, middle, last)
    return sum(n * min(num_rows, rows << nbits) for n, rows in zip(counts, ROWS_PER_CODEWORD, strict=True))


def assign_s(work: Workload, c: Mapping[str, float], *, two_level: bool) -> float:
    """Seconds to find the list of one vector, on one core."""
    d, nlist = work.model.d, work.sizes.nlist
    if two_level:
        return d * (c["two_level_s_per_row_dim"] + c["two_level_s_per_row_dim_root"] * math.sqrt(nlist))
    return d * nlist * c["assign_s_per_row_dim_list"]


def _latency_s(work: Workload, c: Mapping[str, float], stage: str, parallel: float) -> float:
    """Seconds that a stage waits for answers, with so many requests under way at once."""
    if not work.on_s3:
        return 0.0
    gets, puts = stage_requests(work, c)[stage]
    return (gets * c["storage_get_s"] + puts * c["storage_put_s"]) / parallel


def _fixed(c: Mapping[str, float], stage: str) -> float:
    """What the stage takes beside its work: tasks that start, objects that are small, measured on a tiny build."""
    name = "merge parts" if stage.startswith("merge wave") else stage
    return c[f"fixed_s_{name.replace(' ', '_')}"]


def _serial(work: Workload, c: Mapping[str, float], stage: str, seconds: float, readers: float = 1.0) -> StageTime:
    waits = _latency_s(work, c, stage, readers)
    return StageTime(stage, _fixed(c, stage) + seconds + waits, {"one task": seconds, "storage requests": waits})


def _tasks(work: Workload, c: Mapping[str, float], stage: str, num_tasks: int, cpu_s: float) -> StageTime:
    """`cpu_s` of work in equal tasks, one a slot: no faster than the rounds that they take, nor than the cores."""
    compute = _spread_s(work, num_tasks, cpu_s)
    waits = _latency_s(work, c, stage, min(num_tasks, work.fleet.num_slots))
    return StageTime(stage, _fixed(c, stage) + compute + waits, {"CPU cores": compute, "storage requests": waits})


def _spread_s(work: Workload, num_tasks: int, cpu_s: float) -> float:
    """Seconds of so much work in equal tasks."""
    slots = work.fleet.num_slots
    at_once = min(num_tasks, slots)
    each = cpu_s / num_tasks
    rounds = math.ceil(num_tasks / slots) if num_tasks < 8 * slots else num_tasks / slots
    return max(each * rounds * at_once / min(at_once, work.fleet.num_cores), cpu_s / work.fleet.num_cores)


def _pieces(work: Workload, c: Mapping[str, float], name: str) -> float:
    """CPU seconds of something that is done to every piece."""
    corpus = work.corpus
    return (
        work.num_pieces * c[f"{name}_s_per_piece"]
        + corpus.num_vectors * c[f"{name}_s_per_row"]
        + corpus.num_docs * corpus.bytes_per_doc * c[f"{name}_s_per_text_byte"]
    )


def _listing(work: Workload, c: Mapping[str, float]) -> StageTime:
    seconds = work.num_pieces * c["plan_s_per_piece"]
    return _serial(work, c, "list sources", seconds, RECORD_READERS)


def _check_encoder(work: Workload, c: Mapping[str, float]) -> StageTime:
    """A worker starts, loads the model twice, and compares 32 texts (pipelines/parity_check.py)."""
    compared = 32 * work.corpus.tokens_per_chunk * c["plain_s_per_token"]
    return StageTime("check encoder", _fixed(c, "check encoder") + compared, {"one task": compared})


def _encode(work: Workload, c: Mapping[str, float]) -> StageTime:
    corpus, pieces, fleet = work.corpus, work.num_pieces, work.fleet
    tokens = corpus.num_tokens + pieces * QUERIES_PER_PIECE * min(QUERY_TOKENS, corpus.tokens_per_chunk)
    if work.uses_gpu:
        encode = tokens / c["gpu_tokens_per_s"]
        on_cores = 0.0
    else:
        encode = tokens * encode_s_per_token(c, corpus.tokens_per_chunk) / work.threads_per_worker
        on_cores = encode * work.threads_per_worker
    beside = _pieces(work, c, "read") + _pieces(work, c, "commit") + pieces * c["stream_s_per_piece"]
    beside += corpus.num_tokens * c["chunk_s_per_token"] + corpus.num_vectors * c["chunk_s_per_row"]
    waits = _latency_s(work, c, "encode pieces", work.pieces_in_flight)
    moved = (corpus.object_bytes or corpus.num_docs * corpus.bytes_per_doc) + encoded_bytes(work, c)
    parts = {
        "encoders": _makespan(work, encode, work.num_encoders),
        "CPU cores": _makespan(work, on_cores + beside, fleet.num_cores),
        "driver": pieces * c["driver_s_per_piece"],
        "storage requests": waits,
        "network": moved / (fleet.num_nodes * c["storage_bytes_per_s"]) if work.on_s3 else 0.0,
    }
    start = c["stream_start_s"]
    return StageTime("encode pieces", start + max(parts.values()), parts)


def _makespan(work: Workload, total_s: float, servers: int) -> float:
    """Seconds in which so many servers do the work of all pieces, each taking the next one when it is free.

    Each object's last piece is the smaller one.
    """
    if work.num_pieces > MAKESPAN_PIECES:
        return total_s / servers
    per_object = work.num_pieces // work.corpus.num_objects
    of_object = work.corpus.num_docs / work.corpus.num_objects
    sizes = [work.docs_per_piece] * (per_object - 1) + [of_object - (per_object - 1) * work.docs_per_piece]
    busy = [0.0] * min(servers, work.num_pieces)
    for size in sizes * work.corpus.num_objects:
        heapq.heapreplace(busy, busy[0] + total_s * size / work.corpus.num_docs)
    return max(busy)


def _number_rows(work: Workload, c: Mapping[str, float]) -> StageTime:
    """One task, or a round of tasks that read the pieces and one of passes (pipelines/numbering.py)."""
    read = _pieces(work, c, "number")
    if work.num_passes == 1:
        one = _serial(work, c, "number rows", read, READ_AHEAD)
        return replace(one, single_task_s=one.seconds)
    passes = _spread_s(work, work.num_passes, work.corpus.num_docs * c["pass_s_per_hash"])
    compute = _spread_s(work, work.num_hash_runs, read) + passes
    waits = _latency_s(work, c, "number rows", min(work.num_passes, work.fleet.num_slots))
    parts = {"CPU cores": compute, "storage requests": waits}
    return StageTime("number rows", _fixed(c, "number rows") + compute + waits, parts)


def _train(work: Workload, c: Mapping[str, float]) -> StageTime:
    """One task on all CPU slots of a node (index.train_threads)."""
    sizes, d, index = work.sizes, work.model.d, work.index
    rows = kmeans_rows(sizes.train_points, sizes.nlist, index.coarse_iterations)
    coarse = rows * (d * c["kmeans_s_per_row_dim"] + assign_s(work, c, two_level=sizes.nlist > MAX_EXACT_LISTS))
    if sizes.nlist > MAX_EXACT_LISTS:  # the centroids are put in groups in every iteration
        grouping = GROUP_ITERATIONS * sizes.nlist * math.sqrt(sizes.nlist) * d * c["assign_s_per_row_dim_list"]
        coarse += index.coarse_iterations * grouping
    least, most = PQ_TRAIN_POINTS
    points = min(max(least, sizes.train_points // 4), most, sizes.train_points)
    codebooks = pq_rows(points, sizes.nbits, index.pq_iterations) * d * c["pq_train_s_per_row_dim"]
    threads = min(index.train_threads or work.fleet.cpus_per_node, work.fleet.cpus_per_node)
    compute = (coarse + codebooks) / threads
    waits = _latency_s(work, c, "train quantizer", READ_AHEAD)
    parts = {"one node's cores": compute, "storage requests": waits}
    seconds = _fixed(c, "train quantizer") + compute + waits
    return StageTime("train quantizer", seconds, parts, seconds)


def _codes_s(work: Workload, c: Mapping[str, float]) -> float:
    """Core seconds to find the lists of all vectors and to encode them."""
    assign = assign_s(work, c, two_level=work.index.assign_share < 1)
    return work.corpus.num_vectors * (assign + work.model.d * c["encode_codes_s_per_row_dim"])


def _merges(work: Workload, c: Mapping[str, float]) -> list[StageTime]:
    """Every wave reads and writes everything once (pipelines/index_build.py merge_parts)."""
    corpus = work.corpus
    rows = corpus.num_vectors * c["merge_s_per_row"]
    rows += corpus.num_docs * corpus.bytes_per_doc * c["merge_s_per_text_byte"]
    stages = []
    before = work.num_shards
    for number, runs in enumerate(work.runs_of_waves, 1):
        opened = before * c["open_run_s"]
        stages.append(_tasks(work, c, f"merge wave {number}", runs, rows + opened))
        before = runs
    opened = before * num_parts(work, c) * c["open_run_s"]
    return [*stages, _tasks(work, c, "merge parts", num_parts(work, c), rows + opened)]


def _ledger(work: Workload, c: Mapping[str, float]) -> StageTime:
    return _tasks(work, c, "write ledger", work.num_tables, _pieces(work, c, "ledger"))


def _verify(work: Workload, c: Mapping[str, float]) -> StageTime:
    """All parts in parallel, then one task that finds the ledger's winners again."""
    corpus = work.corpus
    parts = num_parts(work, c)
    rows = corpus.num_vectors * c["verify_s_per_row"]
    rows += corpus.num_docs * corpus.bytes_per_doc * c["verify_s_per_text_byte"]
    sampled = min(corpus.num_vectors, parts * REENCODED_ENTRIES)
    rows += sampled * assign_s(work, c, two_level=work.index.assign_share < 1)
    found = _tasks(work, c, "verify", parts, rows)
    check = corpus.num_docs * c["check_s_per_doc"]
    return StageTime("verify", found.seconds + check, {**found.parts, "one task": check}, check)


def _recall(work: Workload, c: Mapping[str, float]) -> StageTime:
    """Every query is compared with every vector, in tasks over parts; one task searches until recall is met (pipelines/recall.py).

    How often the searches scan the whole index was measured at up to 1,024 lists (benchmarks/searched_lists.py).
    """
    corpus, queries = work.corpus, min(work.index.query_sample, work.corpus.num_vectors)
    scan = corpus.num_vectors * work.model.d * queries * c["exact_search_s_per_row_dim_query"]
    searches = queries * corpus.num_vectors * c["searched_share"] * work.sizes.code_size * c["search_s_per_code_byte"]
    scans = num_scans(work, c)
    cores = work.fleet.cpus_per_node
    searches /= min(work.index.train_threads or cores, cores, queries) if scans else work.threads_per_worker
    scan = _spread_s(work, scans, scan) if scans else scan / work.threads_per_worker
    scan_waits = waits = moved = copied = 0.0
    if work.on_s3:
        sizes = object_bytes(work, c)
        scan_waits = scan_reads(work, c) * c["storage_get_s"] / max(1, min(scans, work.fleet.num_slots))
        moved = sizes["vectors for refinement"] / work.fleet.num_nodes / c["storage_bytes_per_s"]
        waits = search_reads(work, c) * c["storage_get_s"] / RECORD_READERS + c["storage_put_s"]
        copied = sizes["inverted lists"] / c["storage_bytes_per_s"]
    alone = searches + waits + copied + (0.0 if scans else scan + moved)
    parts = {
        "exact search on all cores" if scans else "exact search, one task": scan,
        "searches on one node's cores" if scans else "searches, one task": searches,
        "storage requests": scan_waits,
        "storage requests, one task": waits,
        "network": moved + copied,
    }
    return StageTime("measure recall", _fixed(c, "measure recall") + sum(parts.values()), parts, alone)
