"""Epochs: one living writer per index root. A run that lost its epoch cannot publish, and says who took it."""

from __future__ import annotations

import getpass
import os
import socket
import time
from dataclasses import asdict, dataclass

from operators.errors import FencedError
from operators.storage.commits import seal, unseal
from operators.storage.store import Store

EPOCH_KEY = "EPOCH"
JOB_VARIABLE = "VECTORMILL_JOB"  # id of the cluster job that this process is part of; submit sets it


@dataclass(frozen=True)
class Epoch:
    """A run's right to publish at a root, until a later run takes the next epoch."""

    number: int
    run_id: str
    holder: str  # user@host pid, and the job where it is one; for messages
    taken_at: str

    def check(self, store: Store) -> None:
        """Raise FencedError when another run has taken the root since."""
        found = read_epoch(store)
        if found is None or found[0] != self:
            winner = f"run {found[0].run_id} ({found[0].holder}, since {found[0].taken_at})" if found else "nobody"
            raise FencedError(
                f"this run ({self.run_id}, epoch {self.number}) no longer owns {store.url}: {winner} took it over;"
                " nothing was published by this run; let the other finish, or stop it and run again"
            )


def read_epoch(store: Store) -> tuple[Epoch, str] | None:
    """The epoch in force and its tag, None at a new root."""
    found = store.read_tagged(EPOCH_KEY)
    if found is None:
        return None
    return Epoch(**unseal(found[0], f"{store.url}/{EPOCH_KEY}")), found[1]


def take_epoch(store: Store, run_id: str) -> Epoch:
    """Take the next epoch of the root: from now on every earlier run is fenced off.

    Of several runs that try at once one takes each number; a later one fences the earlier off.
    """
    job = os.environ.get(JOB_VARIABLE)
    holder = f"{getpass.getuser()}@{socket.gethostname()} pid {os.getpid()}" + (f", job {job}" if job else "")
    while True:
        found = read_epoch(store)
        epoch = Epoch(
            number=(found[0].number if found else _highest_version(store)) + 1,
            run_id=run_id,
            holder=holder,
            taken_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        )
        data = seal(asdict(epoch))
        if store.replace_if(EPOCH_KEY, data, found[1] if found else None):
            return epoch
        again = read_epoch(store)
        if again is not None and again[0] == epoch:  # the put succeeded, its answer was lost
            return epoch


def _highest_version(store: Store) -> int:
    """Number of the newest version that is there, 0 at a new root: an EPOCH that was lost must not bring a name again."""
    names = {key.split("/")[1] for key in store.list_keys("versions")}
    return max((int(name[1:]) for name in names if name[:1] == "v" and name[1:].isdecimal()), default=0)
