"""Shows how many tokens a second the encoder turns into vectors, beside sentence-transformers and what the machine could do.

    python -m benchmarks.encode [--texts FILE.parquet --text-column C] [--model M] [--precision P] --json
    python -m benchmarks.encode --device cuda --json

Ours against sentence-transformers in float32, in bfloat16 and with its ONNX int8 backend (where that is installed:
--onnx-python), from texts in memory to float32 vectors in memory, tokenizing included. Each is a process with its own
model and the same number of threads; they work in turns, in another order each round, and every round has other texts.
Without --texts, texts are passages of docstrings of --tokens tokens (made words for --model made:SIZE).
Before any time is taken all encode a part of the texts, which also warms them up, and the vectors are compared.

Keys: tokens_per_s (ours, median of the rounds; special tokens count, padding and what is truncated do not),
ratio_vs_st_fp32, ratio_vs_st_bf16 (medians of the rounds' ratios), cosine_mean and cosine_min to sentence-transformers
float32 over all texts, ceiling_share (tokens_per_s * flops_per_token / the machine's best measured rate of large matrix
products in that precision; the rate is the best of all rounds and shapes), padding_share (of the computed tokens), and by
contender: tokens_per_s, padding_share, tokens_per_s_with_padding, peak memory. The ratios depend on the texts: what peers
pad, they pad because they sort by characters, and code has other characters a token than prose. --profile adds where our time goes, in us per token.

On CUDA: BERT-base-sized and MiniLM-sized models of random weights in bfloat16 and float16, texts of 128 tokens; where
sentence-transformers is missing its place is taken by the same padded loop written with transformers.
Needs torch and transformers only.

Floor: bfloat16 on 2 cores with AVX512-BF16, MiniLM, 10 to 256 tokens: ratio_vs_st_fp32 2.5, ratio_vs_st_bf16 1.4, cosine_min
0.999, ceiling_share 0.6. float32: ratio_vs_st_fp32 1.3, cosine_min 0.99999. CUDA: 2.0 against the same precision,
ceiling_share 0.5 for the base size, cosine_min 0.999.

Exit codes: 0 all floors met, 1 one missed, 2 it could not run (no CUDA device, bad input).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import made_models
from benchmarks.encode_race import Race, Result
from benchmarks.report import environment, spread, write_report
from operators.errors import ConfigError, SourceError

SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
KEYS = ("tokens_per_s", "ratio_vs_st_fp32", "ratio_vs_st_bf16", "cosine_mean", "cosine_min", "ceiling_share")


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.encode --device cuda needs a CUDA device that torch can use: there is none", file=sys.stderr)
        return 2
    try:
        runs = [run for model in given.model for run in measure_model(model, given)]
    except (ConfigError, SourceError) as error:
        print(f"benchmarks.encode: {error}", file=sys.stderr)
        return 2
    report = {
        "benchmark": "encode",
        **{name: value for name, value in runs[0].items() if name in KEYS},
        "targets": {f"{run['model']} {run['precision']}": targets(run, given.device) for run in runs},
        "runs": runs,
        "settings": {
            **{name: value for name, value in vars(given).items() if name not in ("json", "out", "onnx_python")},
            "model": [Path(model).name for model in given.model],
            "texts": given.texts and Path(given.texts).name,
        },
        "environment": environment(),
    }
    if given.device == "cuda":
        report["environment"]["hardware"]["gpu"] = torch.cuda.get_device_name()
    write_report(report, given.out)
    print(json.dumps(report) if given.json else readable(report))
    return 0 if all(one["met"] for each in report["targets"].values() for one in each.values()) else 1


def measure_model(model: str, given: argparse.Namespace) -> list[dict[str, Any]]:
    """A result for each precision asked for."""
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp)
        if model.startswith(made_models.PREFIX):
            made_models.make_model(model.removeprefix(made_models.PREFIX), folder / "model")
        texts, about_texts = texts_for(model, given)
        size = min(given.texts_per_round, len(texts) // (given.rounds + 1))
        if size == 0:
            raise SourceError(
                f"{given.texts} must hold a text for each of {given.rounds} rounds and a check: {len(texts)}"
            )
        parts = [texts[number * size : (number + 1) * size] for number in range(given.rounds + 1)]
        path = str(folder / "model") if model.startswith(made_models.PREFIX) else model
        results = []
        for precision in given.precision:
            race = Race(folder, path, precision, parts, given)
            results.append({"model": Path(model).name, **summary(race.run(), given), "texts": about_texts})
    return results


def summary(result: Result, given: argparse.Namespace) -> dict[str, Any]:
    """The numbers of one model in one precision, ready for the report."""
    rates = {
        name: [n / s for n, s in zip(result.tokens[1:], times, strict=True)] for name, times in result.seconds.items()
    }
    ratios = {
        f"ratio_vs_{name}": [ours / theirs for ours, theirs in zip(rates["ours"], values, strict=True)]
        for name, values in rates.items()
        if name != "ours"
    }
    ours, ceiling = spread(rates["ours"], 1), max(result.large_rates.values())
    return {
        "precision": result.precision,
        "tokens_per_s": ours["median"],
        **{name: spread(values, 3)["median"] for name, values in ratios.items()},
        "cosine_mean": round(result.cosines["ours"][0], 7),
        "cosine_min": round(result.cosines["ours"][1], 7),
        "ceiling_share": round(ours["median"] * result.flops_per_token / ceiling, 4),
        "padding_share": result.padding["ours"],
        "attention": result.details["ours"].get("attention"),
        "attention_reason": result.details["ours"].get("attention_reason"),
        "rounds": {
            "tokens_per_s": {name: [round(value, 1) for value in values] for name, values in rates.items()},
            **{name: [round(value, 3) for value in values] for name, values in ratios.items()},
        },
        "spread": {
            "tokens_per_s": {name: spread(values, 1) for name, values in rates.items()},
            **{name: spread(values, 3) for name, values in ratios.items()},
        },
        "contenders": {
            name: {
                **result.ways[name],
                "tokens_per_s": spread(rates[name], 1)["median"],
                "padding_share": result.padding[name],
                "tokens_per_s_with_padding": round(
                    spread(rates[name], 1)["median"] / (1 - (result.padding[name] or 0)), 1
                ),
                "cosine_mean": round(result.cosines[name][0], 7),
                "cosine_min": round(result.cosines[name][1], 7),
                **result.memory[name],
                "versions": result.details[name]["versions"],
            }
            for name in rates
        },
        "absent": result.absent,
        "ceiling": {
            "gflops": round(ceiling / 1e9, 1),
            "is": f"best large product in {result.ceiling_precision}, {given.threads} threads, over all rounds",
            "flops_per_token": round(result.flops_per_token),
            "flops_formula": "2 * weights of linear layers + 4 * heads * head_dim * layers * sum(L^2) / sum(L)",
            "tokens_per_s_at_ceiling": round(ceiling / result.flops_per_token, 1),
            "large_products_gflops": result.named_large_rates,
            "model_products_gflops": result.model_rates,
        },
        **({"profile": result.profile} if result.profile else {}),
        "tokens": {
            "texts_a_round": len(result.lengths) // len(result.tokens),
            "mean": round(float(np.mean(result.lengths)), 1),
            "percentiles_5_50_95": np.percentile(result.lengths, [5, 50, 95]).round(1).tolist(),
            "longest": max(result.lengths),
        },
    }


def targets(run: dict[str, Any], device: str) -> dict[str, Any]:
    """Every floor that this run is held to, with its value and whether it is met."""
    precision = run["precision"]
    least: dict[str, float] = {
        "cosine_min": 0.99999 if precision == "float32" else 0.95 if precision == "int8" else 0.999
    }
    if device == "cuda":
        least[f"ratio_vs_st_{SHORT_NAMES[precision]}"] = 2.0
        if run["model"].endswith("bert-base"):
            least["ceiling_share"] = 0.5
    elif precision == "float32":
        least["ratio_vs_st_fp32"] = 1.3
    else:
        least |= {"ratio_vs_st_fp32": 2.5, "ratio_vs_st_bf16": 1.4, "ceiling_share": 0.6}
    return {
        name: {"value": run[name], "at_least": floor, "met": run[name] >= floor}
        for name, floor in least.items()
        if name in run
    }


def texts_for(model: str, given: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """Distinct texts in random order, and what they are."""
    wanted = given.texts_per_round * (given.rounds + 1)
    shortest, longest = given.tokens
    if given.texts is not None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            column = pq.read_table(given.texts, columns=[given.text_column]).column(given.text_column)
        except (OSError, KeyError, IndexError, pa.ArrowInvalid) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise SourceError(
                f"the texts must be a column of a Parquet file, got {given.text_column!r} of {given.texts} "
                f"(--texts, --text-column): {reason}"
            ) from None
        # An equal text would be computed once by ours and each time by the others.
        distinct = list(dict.fromkeys(text for text in column.to_pylist() if isinstance(text, str) and text.strip()))
        about = {"from": Path(given.texts).name, "distinct": len(distinct)}
        if given.cut:
            from benchmarks.texts import texts_of_lengths

            return texts_of_lengths(wanted, model, shortest, longest, distinct), {
                **about,
                "cut_to_tokens": given.tokens,
            }
        order = np.random.default_rng(0).permutation(len(distinct))[:wanted]
        return [distinct[n] for n in order.tolist()], about
    if model.startswith(made_models.PREFIX):
        return made_models.made_texts(wanted, shortest, longest), {"from": "made words", "tokens": [shortest, longest]}
    from benchmarks.texts import texts_of_lengths

    return texts_of_lengths(wanted, model, shortest, longest), {"from": "docstrings", "tokens": [shortest, longest]}


def readable(report: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for run in report["runs"]:
        lines.append(f"{run['model']} in {run['precision']}, {run['tokens']['mean']} tokens a text:")
        for name, one in run["contenders"].items():
            lines.append(
                f"  {name:<22} {one['tokens_per_s']:12.1f} tokens/s  padding {_percent(one['padding_share'])}  cosine mean"
                f" {one['cosine_mean']:.6f} min {one['cosine_min']:.6f}  {one.get('peak_rss_mb', 0):.0f} MB"
            )
        lines += [f"  {name:<22} absent: {reason}" for name, reason in run["absent"].items()]
        lines += [f"  {name:<22} {value}" for name, value in run.items() if name.startswith("ratio_")]
        ceiling = run["ceiling"]
        lines.append(
            f"  ceiling_share          {run['ceiling_share']} of {ceiling['gflops']} GFLOP/s ({ceiling['is']})"
        )
        if "profile" in run:
            found = run["profile"]
            lines.append(f"  us per token, {found['threads']} thread, profiled {found['profiler_overhead']:+.1%}:")
            lines += [f"    {name:<28} {us:8.3f}" for name, us in found["us_per_token"].items()]
            lines += [f"    {name:<28} {us:8.3f}  (by the clock)" for name, us in found["clock_us_per_token"].items()]
    for name, each in report["targets"].items():
        for key, one in each.items():
            lines.append(f"{name} {key} {one['value']}, floor {one['at_least']}: {'met' if one['met'] else 'MISSED'}")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "     ?" if share is None else f"{share:6.1%}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with the defaults of its device filled in."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.encode", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--texts", help="Parquet file of texts (default: docstrings)")
    parser.add_argument("--text-column", default="text", help="its column (default text)")
    parser.add_argument("--cut", action="store_true", help="cut the texts of the file into passages of --tokens tokens")
    parser.add_argument("--model", nargs="+", help="folders, names, or made:bert-base, made:minilm, made:tiny")
    parser.add_argument(
        "--precision", nargs="+", choices=("auto", "float32", "bfloat16", "float16", "int8"), help="ours (default auto)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of every contender (default: cores)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of all contenders (default 3)")
    parser.add_argument("--texts-per-round", type=int, default=0, help="default 1000, on CUDA 16384")
    parser.add_argument("--tokens", type=int, nargs=2, metavar=("MIN", "MAX"), help="default 10 256, on CUDA 128 128")
    parser.add_argument("--batch-tokens", type=int, default=0, help="ours; default: the setting's, on CUDA 65536")
    parser.add_argument("--peer-batch", type=int, default=32, help="texts of a peer's batch (default 32, as it has)")
    parser.add_argument("--peer", choices=("auto", "sentence-transformers", "transformers"), default="auto")
    parser.add_argument(
        "--onnx-python", help="Python of an environment with sentence-transformers[onnx] (default: ours)"
    )
    parser.add_argument("--profile", action="store_true", help="also show where our time goes")
    parser.add_argument("--json", action="store_true", help="one line of JSON and nothing else")
    parser.add_argument("--out", help="also write the report to this file")
    given = parser.parse_args(arguments)
    cuda = given.device == "cuda"
    given.model = given.model or (["made:bert-base", "made:minilm"] if cuda else ["all-MiniLM-L6-v2"])
    given.precision = given.precision or (["bfloat16", "float16"] if cuda else ["auto"])
    given.texts_per_round = given.texts_per_round or (16_384 if cuda else 1000)
    given.tokens = given.tokens or ([128, 128] if cuda else [10, 256])
    given.batch_tokens = given.batch_tokens or (65_536 if cuda else 0)
    for name in ("rounds", "threads", "texts_per_round", "peer_batch"):
        if getattr(given, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(given, name)}")
    if not 3 <= given.tokens[0] <= given.tokens[1]:
        parser.error(f"--tokens must be two ascending numbers from 3, got {given.tokens}")
    sizes = [m for m in given.model if m.startswith(made_models.PREFIX) and m[5:] not in made_models.SIZES]
    if sizes:
        parser.error(f"--model made:SIZE must be one of {', '.join(made_models.SIZES)}, got {sizes[0]}")
    return given


if __name__ == "__main__":
    sys.exit(main())
