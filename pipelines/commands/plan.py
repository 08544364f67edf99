"""The command `plan`. See pipelines/cli.py."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.options import AsJson, Assignments, ConfigFile


def plan_command(
    docs: Annotated[str | None, typer.Option(metavar="N", help="Documents: 1e9, 45000.")] = None,
    tokens_per_doc: Annotated[
        float, typer.Option(metavar="T", help="Mean tokens of a document's text (the model's own tokens).")
    ] = 120.0,
    bytes_per_doc: Annotated[
        float | None, typer.Option(metavar="B", help="Mean UTF-8 bytes of a text. Default: as measured a token.")
    ] = None,
    chunks_per_doc: Annotated[
        float | None, typer.Option(metavar="C", help="Default: of a document of the mean length.")
    ] = None,
    objects: Annotated[int, typer.Option(metavar="N", help="Source objects. 0: of 256 MB each.")] = 0,
    corpus_format: Annotated[str, typer.Option("--format", metavar="F", help="parquet or jsonl.")] = "parquet",
    model: Annotated[
        str | None, typer.Option(metavar="PATH", help="Folder or hub name. Default: all-MiniLM-L6-v2.")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="KIND", help="none, a100, h100, h200 or l4.")] = "none",
    nodes: Annotated[int, typer.Option(metavar="N", help="Machines, all alike.")] = 1,
    cpus_per_node: Annotated[int, typer.Option(metavar="N", help="0: this machine's.")] = 0,
    memory_per_node: Annotated[str, typer.Option(metavar="SIZE", help="512GB. Empty: this machine's.")] = "",
    gpus_per_node: Annotated[int, typer.Option(metavar="N", help="0: one where --gpu names a kind.")] = 0,
    tokens_per_s_per_gpu: Annotated[
        float | None, typer.Option(metavar="R", help="If you know it. Default: calibrated, else a public figure.")
    ] = None,
    storage: Annotated[str, typer.Option(metavar="WHERE", help="s3 or local.")] = "s3",
    storage_latency_ms: Annotated[
        float | None, typer.Option(metavar="MS", help="Of one request. Default: calibrated, else left out.")
    ] = None,
    network_gbit: Annotated[
        float | None, typer.Option(metavar="G", help="Of one node to storage. Default: calibrated, else no limit.")
    ] = None,
    deadline: Annotated[str, typer.Option(metavar="TIME", help="8h, 90m: say what it takes to keep it.")] = "",
    changed: Annotated[
        float | None, typer.Option(metavar="F", help="Also plan a nightly update with this share changed.")
    ] = None,
    price_per_node_hour: Annotated[float, typer.Option(metavar="P", help="Of a whole machine.")] = 0.0,
    price_per_gpu_hour: Annotated[float, typer.Option(metavar="P", help="On top of the machine's.")] = 0.0,
    price_per_gb_month: Annotated[float, typer.Option(metavar="P", help="Of storage.")] = 0.0,
    price_per_1000_writes: Annotated[float, typer.Option(metavar="P", help="PUT, POST.")] = 0.0,
    price_per_1000_reads: Annotated[float, typer.Option(metavar="P", help="GET, HEAD, LIST.")] = 0.0,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of --calibrate; in place of the committed measurements.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure on this machine or cluster: two to three minutes.")
    ] = False,
    root: Annotated[
        str | None, typer.Option(metavar="ROOT", help="With --calibrate: measure storage there, too.")
    ] = None,
    out: Annotated[str | None, typer.Option(metavar="FILE", help="With --calibrate: write it there.")] = None,
    config: ConfigFile = None,
    assignments: Assignments = None,
    as_given: Annotated[bool, typer.Option("--as-given", help="Recommend nothing: plan these very settings.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Name every coefficient and its measurement.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a build takes before it runs: time, memory, bytes, requests, cost, what binds, and settings that suit it.

    Every number follows from committed measurements, or from yours (--calibrate); for GPUs there are none of ours, so a
    public figure is used and named, or your own.

    \b
    Example:
      vectormill plan --docs 1e9 --tokens-per-doc 120 --gpu h100 --nodes 8 --gpus-per-node 8 --cpus-per-node 96
      vectormill plan --calibrate --out here.json
      vectormill plan --docs 2e6 --calibration here.json --storage local
    """
    from operators.errors import ConfigError
    from pipelines.commands.output import clean_stdout, print_json

    with clean_stdout():
        from pipelines.commands.plan_output import amount, seconds_of, show_calibration, show_plan, size_of
        from pipelines.config import load_config
        from pipelines.planning.calibration_file import read_calibration
        from pipelines.planning.plan import Storage, plan
        from pipelines.planning.plan_facts import Prices, plan_facts
        from pipelines.planning.plan_inputs import Asked, this_machine

        options = {"encode.model": (model, "--model")} if model is not None else {}
        if calibrate:
            from pipelines.planning.calibrate import calibrate_to_file
            from pipelines.telemetry.progress import RunProgress

            report = calibrate_to_file(load_config(config, assignments or [], options), root, out, RunProgress())
        elif docs is None:
            raise ConfigError("plan needs --docs, the number of documents (or --calibrate); for example --docs 1e9")
        else:
            cpus, memory = this_machine()
            asked = Asked(
                amount(docs, "--docs"),
                tokens_per_doc,
                bytes_per_doc,
                chunks_per_doc,
                objects,
                corpus_format,
                gpu,
                nodes,
                cpus_per_node or cpus,
                size_of(memory_per_node) if memory_per_node else memory,
                gpus_per_node,
                storage == "s3",
                is_local=nodes == 1 and gpu == "none",
            )
            planned = plan(
                asked,
                assignments or [],
                config_file=config,
                options=options,
                calibration=read_calibration(calibration) if calibration else None,
                calibration_file=calibration or "",
                tokens_per_s_per_gpu=tokens_per_s_per_gpu,
                storage=Storage(
                    storage_latency_ms / 1000 if storage_latency_ms is not None else None,
                    network_gbit * 1e9 / 8 if network_gbit is not None else None,
                ),
                changed=changed,
                deadline_s=seconds_of(deadline) if deadline else None,
                as_given=as_given,
            )
            prices = Prices(
                price_per_node_hour, price_per_gpu_hour, price_per_gb_month, price_per_1000_writes, price_per_1000_reads
            )
            facts = plan_facts(planned, prices, explain)
    if calibrate:
        (print_json if as_json else show_calibration)(report)
    else:
        (print_json if as_json else show_plan)(facts)
