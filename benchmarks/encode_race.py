"""Contenders of benchmarks.encode, each in a process of its own, in turns over the same texts.

Shapes: N texts, D dimensions.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.encode_ceiling import (
    Shape,
    ceiling_precision,
    large_rates,
    model_rates,
    model_work,
    named,
    product_rate,
)
from benchmarks.report import REPOSITORY
from operators.encoding.encode_config import EncodeConfig, configured_model, resolve_precision
from operators.encoding.tokenizer import load_tokenizer

REFERENCE = "st_fp32"
# Below this, vectors are of something else, and the times would say nothing.
LEAST_COSINE = 0.9
# A GPU is hardly busy with the default of 32 texts; so the peers also run with as many as suit it.
LARGE_BATCH = 512
# Tokens at once for the rates of the model's own products.
PRODUCT_TOKENS = {"cpu": 4096, "cuda": 65_536}


@dataclasses.dataclass
class Result:
    """What was measured; dicts by contender. tokens: of each part, the first of which is the check's."""

    precision: str
    ceiling_precision: str
    tokens: list[int]
    lengths: list[int]
    ways: dict[str, dict[str, Any]]
    seconds: dict[str, list[float]]
    cosines: dict[str, tuple[float, float]]
    padding: dict[str, float | None]
    memory: dict[str, dict[str, float]]
    details: dict[str, dict[str, Any]]
    absent: dict[str, str]
    flops_per_token: float
    large_rates: dict[Shape, float]
    model_rates: dict[str, float]
    profile: dict[str, Any]

    @property
    def named_large_rates(self) -> dict[str, float]:
        return named(self.large_rates)


class Contender:
    """A process of benchmarks.encode_contenders; `absent` says why it cannot take part, "" if it does."""

    def __init__(self, name: str, python: str, settings: dict[str, Any], folder: Path) -> None:
        self.name = name
        self._errors = (folder / f"{name}.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.encode_contenders"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.details = self.ask(settings)
        self.absent = str(self.details.get("absent", ""))

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        """The answer to one command. RuntimeError with the end of what it printed when the process fails."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the process of {self.name} failed:\n{self._errors.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()


class Race:
    """One model in one precision against its peers. parts: the check's texts, then those of each round."""

    def __init__(
        self, folder: Path, model: str, precision: str, parts: list[list[str]], given: argparse.Namespace
    ) -> None:
        self._given, self._folder, self._parts = given, folder, parts
        config = EncodeConfig(model=model, precision=precision, device=given.device)
        self._precision = resolve_precision(config)
        spec = configured_model(config)
        self._work = model_work(spec.transformer_path)
        tokenizer = load_tokenizer(spec)
        tokenizer.enable_truncation(spec.max_seq_length)
        self._lengths = [[len(found.ids) for found in tokenizer.encode_batch(part)] for part in parts]
        self._texts_file = folder / "texts.json"
        self._texts_file.write_text(json.dumps(parts), encoding="utf-8")
        self._settings = {
            "model": str(spec.path),
            "device": given.device,
            "threads": given.threads,
            "batch_tokens": given.batch_tokens,
            "batch_size": given.peer_batch,
            "max_seq_length": spec.max_seq_length,
            "vocab_size": self._work.vocab_size,
            "texts": str(self._texts_file),
        }

    def run(self) -> Result:
        given = self._given
        torch.set_num_threads(given.threads)
        ways = self._ways()
        contenders: dict[str, Contender] = {}
        absent: dict[str, str] = {}
        try:
            for name, way in ways.items():
                python = given.onnx_python or sys.executable if way["way"] == "onnx_int8" else sys.executable
                contender = Contender(name, python, {**self._settings, **way}, self._folder)
                if contender.absent:
                    absent[name] = contender.absent
                    contender.close()
                else:
                    contenders[name] = contender
            return self._race(contenders, {n: way for n, way in ways.items() if n in contenders}, absent)
        finally:
            for contender in contenders.values():
                contender.close()

    def _ways(self) -> dict[str, dict[str, Any]]:
        """Settings of each contender by the name that ratios carry."""
        there = importlib.util.find_spec("sentence_transformers") is not None
        peer = "sentence_transformers" if there and self._given.peer != "transformers" else "padded_loop"
        ways: dict[str, dict[str, Any]] = {
            "ours": {"way": "ours", "precision": self._precision},
            REFERENCE: {"way": peer, "precision": "float32"},
            "st_bf16": {"way": peer, "precision": "bfloat16"},
        }
        if self._given.device == "cuda":
            ways["st_fp16"] = {"way": peer, "precision": "float16"}
            for name in ("st_bf16", "st_fp16"):
                ways[f"{name}_batch_{LARGE_BATCH}"] = {**ways[name], "batch_size": LARGE_BATCH}
        elif peer == "sentence_transformers":
            ways["st_onnx_int8"] = {"way": "onnx_int8", "precision": "int8"}
        return ways

    def _race(
        self, contenders: dict[str, Contender], ways: dict[str, dict[str, Any]], absent: dict[str, str]
    ) -> Result:
        tokens = [sum(lengths) for lengths in self._lengths]
        every = [length for lengths in self._lengths for length in lengths]
        flops_per_token = self._work.per_token(every)
        padding: dict[str, float | None] = {}
        for name, contender in contenders.items():
            computed = contender.ask({"do": "check", "part": 0, "save": str(self._file(name, 0))})["computed_tokens"]
            padding[name] = round(1 - tokens[0] / computed, 4) if computed else None
        for name in contenders:
            self._check(name)
        device, products = self._given.device, ceiling_precision(self._precision)
        rates = large_rates(products, device)
        best_shape = max(rates, key=lambda shape: rates[shape])
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        names = list(contenders)
        for part in range(1, len(self._parts)):
            for name in names[part % len(names) :] + names[: part % len(names)]:
                command = {"do": "encode", "part": part, "save": str(self._file(name, part))}
                seconds[name].append(contenders[name].ask(command)["seconds"])
            rates[best_shape] = max(rates[best_shape], product_rate(best_shape, products, device))
        return Result(
            precision=self._precision,
            ceiling_precision=products,
            tokens=tokens,
            lengths=every,
            ways=ways,
            seconds=seconds,
            cosines={name: self._cosines(name) for name in contenders},
            padding=padding,
            memory={name: contender.ask({"do": "memory"}) for name, contender in contenders.items()},
            details={name: contender.details for name, contender in contenders.items()},
            absent=absent,
            flops_per_token=flops_per_token,
            large_rates=rates,
            model_rates=named(model_rates(self._work, products, device, PRODUCT_TOKENS[device])),
            profile=self._profile(contenders["ours"], flops_per_token) if self._given.profile else {},
        )

    def _profile(self, ours: Contender, flops_per_token: float) -> dict[str, Any]:
        return ours.ask({"do": "profile", "part": 1, "flops_per_token": flops_per_token})

    def _file(self, name: str, part: int) -> Path:
        return self._folder / f"{name}-{part}.npy"

    def _check(self, name: str) -> None:
        """Ends the benchmark where the vectors are not the model's."""
        found_ND, expected_ND = np.load(self._file(name, 0)), np.load(self._file(REFERENCE, 0))
        if found_ND.shape != expected_ND.shape or not np.isfinite(found_ND).all():
            raise SystemExit(f"{name}: vectors must be finite, shape {expected_ND.shape}, got {found_ND.shape}")
        least = float(cosines(found_ND, expected_ND).min())
        if least < LEAST_COSINE:
            raise SystemExit(f"{name}: vectors must be those of {REFERENCE}, but a cosine is {least:.4f}")

    def _cosines(self, name: str) -> tuple[float, float]:
        """Mean and least over all parts."""
        parts = range(len(self._parts))
        found_N = np.concatenate(
            [cosines(np.load(self._file(name, part)), np.load(self._file(REFERENCE, part))) for part in parts]
        )
        return float(found_N.mean()), float(found_N.min())


def cosines(a_ND: npt.NDArray[Any], b_ND: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Cosine of each row of one to the same row of the other, in float64."""
    a, b = a_ND.astype(np.float64), b_ND.astype(np.float64)
    found: npt.NDArray[np.float64] = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return found
