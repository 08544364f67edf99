"""What the steps of a run share: its store, settings, session and progress; where it runs; and what its results depend on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cluster.in_process import tasks_in_turn
from cluster.session import ClusterConfig, Session, connect, is_in_process
from cluster.tasks import run_tasks
from cluster.telemetry import with_span
from operators.cleaner import plugin_fingerprints
from operators.encoding.model_folder import ModelSpec
from operators.fingerprint import index_fingerprint, piece_fingerprint
from operators.storage.checked import ObjectEntry
from operators.storage.fencing import Epoch
from operators.storage.store import Store
from pipelines.config import RunConfig
from pipelines.runs import Run
from pipelines.telemetry.progress import RunProgress

EPOCH_CHECK_EVERY_S = 5.0


@dataclass
class RunContext:
    """What the steps of a build, an update or a compaction share."""

    store: Store
    config: RunConfig
    run: Run
    epoch: Epoch
    session: Session
    progress: RunProgress
    check: Callable[[], None]  # raises FencedError once the run has lost its epoch; cheap
    model: ModelSpec | None = None  # None: a compaction encodes nothing
    fingerprint: dict[str, Any] = field(default_factory=dict)
    reference: ObjectEntry | None = None  # the query sample whose vectors the encoders must give again (an update)

    @property
    def spec(self) -> ModelSpec:
        """The model that the run encodes with."""
        assert self.model is not None
        return self.model

    @property
    def identity(self) -> dict[str, Any]:
        """Fields of the manifest that say which version this is, and who made it."""
        return {
            "version": f"v{self.epoch.number:06d}",
            "run_id": self.run.run_id,
            "epoch": self.epoch.number,
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    @property
    def uses_gpu(self) -> bool:
        """Whether encoders run on GPUs: wherever the session has one, unless the settings say otherwise."""
        encode = self.config.encode
        on_cpu = encode.device == "cpu" or (encode.device == "auto" and encode.precision == "int8")
        return not on_cpu and (encode.device == "cuda" or self.session.num_gpus > 0)

    @property
    def parity_key(self) -> str:
        """Where the outcome of the run's parity check is kept."""
        return f"{self.run.prefix}/parity.json"

    def tasks(
        self,
        function: Callable[..., Any],
        calls: Sequence[tuple[Any, ...]],
        *,
        shared: Sequence[Any] = (),
        **options: Any,
    ) -> list[Any]:
        """Results of function(*shared, *call): parallel tasks (without Ray: in turn) under this run's watch: epoch, stall timeout, progress."""
        timed = with_span(function, function.__name__)
        watch: dict[str, Any] = {
            "shared": shared,
            "check": self.watch,
            "on_done": lambda number, result: self.progress.task_done(result[1]),
        }
        if self.session.in_process:
            results = tasks_in_turn(timed, calls, **watch)
        else:
            cluster = self.config.cluster
            patience: dict[str, Any] = {
                "stall_timeout_s": cluster.stall_timeout_s,
                "wait_for_nodes_s": cluster.wait_for_nodes_s,
            }
            results = run_tasks(timed, calls, say=self.progress.say, **patience, **watch, **options)
        return [result for result, _ in results]

    def watch(self) -> None:
        """What is done about once a second while others work: `check`, and progress that stays alive."""
        self.check()
        self.progress.tick()


@contextmanager
def open_session(cluster: ClusterConfig, shown: RunProgress, *, is_small: bool = False) -> Iterator[Session]:
    """A session for the block. `cluster.where` auto: this process for what is small, unless a cluster is named, else Ray."""
    here = is_in_process(cluster, is_small)
    if not here:
        shown.stage("start Ray")
    with connect(dataclasses.replace(cluster, where="process" if here else "ray"), shown.say) as session:
        yield session


def fingerprints(config: RunConfig, spec: ModelSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    """What committed pieces depend on, and what a published version does."""
    settings = config.semantic("read", "clean", "chunk", "encode") | plugin_fingerprints(config.clean)
    # Equal texts are found when rows are numbered: pieces hold them all.
    numbering = {"clean.duplicates": settings.pop("clean.duplicates")}
    of_pieces = piece_fingerprint(settings, spec.fingerprint)
    return of_pieces, index_fingerprint(of_pieces, config.semantic("index") | numbering)


def epoch_watch(store: Store, epoch: Epoch) -> Callable[[], None]:
    """Function that looks, every few seconds, whether the run still owns the root. It raises FencedError when not."""
    last = time.monotonic()

    def check() -> None:
        nonlocal last
        if time.monotonic() - last > EPOCH_CHECK_EVERY_S:
            epoch.check(store)
            last = time.monotonic()

    return check
