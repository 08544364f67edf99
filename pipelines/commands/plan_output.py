"""What `plan` prints for people, and how it reads amounts, sizes and times."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from operators.errors import ConfigError

_SIZES = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TIMES = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def amount(text: str, option: str) -> int:
    """A whole number, also as 1e9, 2.5e6 or 1_000_000. Raises ConfigError."""
    try:
        found = float(text.replace("_", ""))
        if found >= 1 and found == int(found):
            return int(found)
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{option} must be a whole number of at least 1, such as 45000 or 1e9, got {text!r}")


def size_of(text: str) -> float:
    """Bytes of 512GB, 96GiB. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text.lower())
    if found and found[2] in _SIZES and found[1].count(".") <= 1 and found[1] != ".":
        return float(found[1]) * _SIZES[found[2]]
    raise ConfigError(f"--memory-per-node must be a size such as 512GB or 96GiB, got {text!r}")


def seconds_of(text: str) -> float:
    """Seconds of 8h, 90m, 1d. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([smhd])\s*", text.lower())
    if found:
        return float(found[1]) * _TIMES[found[2]]
    raise ConfigError(f"--deadline must be a time such as 8h or 90m, got {text!r}")


def show_plan(facts: dict[str, Any]) -> None:
    """The plan as tables, the verdict first."""
    console = Console(highlight=False, width=130)
    index = facts["index"]
    console.print(
        Text(
            f"{facts['documents']:,} documents, {facts['vectors']:,} vectors, {facts['tokens']:,} tokens:"
            f" {duration(facts['seconds'])}, bound by {facts['binds']['by']} in '{facts['binds']['stage']}'",
            style="bold",
        )
    )
    for warning in facts["warnings"]:
        console.print(Text(warning, style="bold red"))
    rate = facts["encoder_rate"]
    pairs = Table.grid(padding=(0, 2))
    fleet = facts["fleet"]
    gpus = f", {fleet['gpus_per_node']} x {fleet['gpu']}" if fleet["gpus_per_node"] else ""
    pairs.add_row(
        "machines", f"{fleet['num_nodes']} x {fleet['cpus_per_node']} CPUs, {size(fleet['memory_per_node'])}{gpus}"
    )
    pairs.add_row("encoders", f"{facts['encoders']} at {rate['tokens_per_s']:,} tokens/s each ({rate['source']})")
    if rate["note"]:
        pairs.add_row("", rate["note"])
    if facts["gpu_hours"]:
        pairs.add_row("GPU-hours", f"{facts['gpu_hours']:,} held, {facts['gpu_busy_hours']:,} busy")
    pairs.add_row(
        "units",
        f"{facts['pieces']:,} pieces of {facts['docs_per_piece']:,.0f} documents, {facts['shards']:,} shards,"
        f" {facts['merge_waves']} merge waves before the last, {facts['parts']:,} parts",
    )
    pairs.add_row(
        "index", f"d {index['d']}, nlist {index['nlist']:,}, M {index['M']}, trained on {index['train_points']:,}"
    )
    console.print(pairs)
    _show_stages(console, facts)
    _show_memory(console, facts)
    _show_bytes(console, facts)
    _show_pods(console, facts)
    if facts["update"] is not None:
        _show_update(console, facts["update"])
    if "cost" in facts:
        parts = ", ".join(f"{name.replace('_', ' ')} {value:,.2f}" for name, value in facts["cost"].items())
        console.print(Text(f"\ncost: {parts}"))
    if facts["recommended"]:
        console.print(Text("\nrecommended settings", style="bold"))
        for name, value in facts["recommended"].items():
            console.print(Text(f"  --set {name}={value}"))
    if "coefficients" in facts:
        _show_coefficients(console, facts["coefficients"])


def _show_stages(console: Console, facts: dict[str, Any]) -> None:
    table = Table(title="time", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name, how in (("stage", "left"), ("time", "right"), ("share", "right"), ("bound by", "left")):
        table.add_column(name, justify=how)  # type: ignore[arg-type]
    table.add_column("storage reads", justify="right")
    table.add_column("writes", justify="right")
    for stage in facts["stages"]:
        share = stage["seconds"] / facts["seconds"]
        counts = [f"{stage[name]:,}" if stage[name] else "" for name in ("reads", "writes")]
        table.add_row(stage["name"], duration(stage["seconds"]), f"{share:.1%}", stage["binds"], *counts)
    console.print(table)


def _show_memory(console: Console, facts: dict[str, Any]) -> None:
    table = Table(title="peak memory of a process", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("stage", "process", "bytes", ""):
        table.add_column(name, justify="right" if name == "bytes" else "left")
    for peak in facts["memory"]:
        often = "on every CPU slot" if peak["at_once"] and peak["process"] == "task" else ""
        often = "each" if peak["process"] == "encoder" else often or "one in the cluster"
        table.add_row(peak["stage"], peak["process"], size(peak["bytes"]), often)
    console.print(table)


def _show_bytes(console: Console, facts: dict[str, Any]) -> None:
    from cluster.capacity.objects import PUBLISHED

    table = Table(title="bytes", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("objects", "bytes", "a vector", ""):
        table.add_column(name, justify="right" if name in ("bytes", "a vector") else "left")
    for name, value in facts["bytes"].items():
        kept = "published" if name in PUBLISHED else "while it runs"
        table.add_row(name, size(value), f"{value / facts['vectors']:,.1f}", kept)
    table.add_row(
        "published", size(facts["published_bytes"]), f"{facts['published_bytes'] / facts['vectors']:,.1f}", ""
    )
    table.add_row("at most at once", size(facts["peak_storage_bytes"]), "", "")
    console.print(table)
    requests = facts["requests"]
    console.print(f"requests to storage: {requests['reads']:,} reads, {requests['writes']:,} writes")


def _show_pods(console: Console, facts: dict[str, Any]) -> None:
    table = Table(title="pods or machines to ask for", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("kind", "number", "CPUs", "GPUs", "memory", "of it object store"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, pod in facts["pods"].items():
        if pod is not None:
            numbers = [str(pod[name]) for name in ("num_pods", "cpus", "gpus")]
            table.add_row(
                kind.replace("_", " "), *numbers, *(size(pod[n]) for n in ("memory_bytes", "object_store_bytes"))
            )
    console.print(table)


def _show_update(console: Console, update: dict[str, float]) -> None:
    console.print(
        f"\nnightly update: {update['documents_changed']:,.0f} documents to encode in {duration(update['encode_s'])}, all objects"
        f" scanned in {duration(update['scan_s'])}, compared in {duration(update['compare_s'])} by a driver of"
        f" {size(update['driver_bytes'])}"
    )


def _show_coefficients(console: Console, coefficients: dict[str, Any]) -> None:
    table = Table(title="coefficients", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("name", "value", "unit", "source"):
        table.add_column(name, justify="right" if name == "value" else "left")
    for name, one in coefficients.items():
        table.add_row(name, f"{one['value']:.5g}", one["unit"], one["source"])
    console.print(table)


def show_calibration(report: dict[str, Any]) -> None:
    """The coefficients that were measured."""
    console = Console(highlight=False, width=130)
    table = Table.grid(padding=(0, 2))
    for name, value in report["coefficients"].items():
        table.add_row(name, f"{value:.5g}")
    console.print(table)


def duration(seconds: float) -> str:
    """12.3 s, 4 m 05 s, 3 h 20 m."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} m {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} m"


def size(value: float) -> str:
    """1.2 GB and so on, powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:,.1f} {unit}"
    return f"{value:,.0f} B"
