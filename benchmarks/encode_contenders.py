"""One way of encoding texts in a process of its own, told what to do line by line: what benchmarks.encode lets compete.

The first line of the standard input is the settings (JSON), each further line a command; each is answered by one line
of JSON. Ends with the input. Several such processes hold their models at the same time and work one after another, so
that rounds go in turns and no one's threads, allocator or compiled products meet another's.

Imports only what its way needs: the ONNX one may run in another environment than ours (`--onnx-python`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.report import installed

Encode = Callable[[list[str]], npt.NDArray[Any]]

PACKAGES = ("torch", "transformers", "tokenizers", "sentence-transformers", "optimum", "optimum-onnx", "onnxruntime")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def ours(settings: dict[str, Any]) -> tuple[Encode, dict[str, Any]]:
    encoder = make_encoder(settings)
    encoder.setup()
    found = {name: getattr(encoder, name, None) for name in ("attention", "attention_reason")}
    return encoder.encode_documents, found


def make_encoder(settings: dict[str, Any]) -> Any:
    """The TextEncoder of these settings, its model not loaded yet."""
    from operators.encoding.encode_config import EncodeConfig, configured_model
    from operators.encoding.text_encoder import TextEncoder

    more = {"batch_tokens": settings["batch_tokens"]} if settings["batch_tokens"] else {}
    config = EncodeConfig(
        model=settings["model"],
        precision=settings["precision"],
        device=settings["device"],
        threads_per_worker=settings["threads"],
        **more,
    )
    return TextEncoder(config, configured_model(config))


def sentence_transformers(settings: dict[str, Any]) -> tuple[Encode, dict[str, Any]]:
    """As its documentation says: a batch of 32 by default, texts sorted by length, its own pooling and normalisation."""
    from sentence_transformers import SentenceTransformer

    dtype = DTYPES[settings["precision"]]
    model = SentenceTransformer(settings["model"], device=settings["device"], model_kwargs={"dtype": dtype})
    return _encode_by(model, settings), {}


def onnx_int8(settings: dict[str, Any]) -> tuple[Encode, dict[str, Any]]:
    """sentence-transformers' ONNX backend with the dynamically quantised model that it exports for AVX512-VNNI."""
    options = importlib.import_module("onnxruntime").SessionOptions()
    # optimum may be there without what it needs; sentence-transformers hides the reason.
    importlib.import_module("optimum.onnxruntime").ORTModelForFeatureExtraction  # noqa: B018
    from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model

    options.intra_op_num_threads = settings["threads"]
    arguments = {"provider": "CPUExecutionProvider", "session_options": options}
    with tempfile.TemporaryDirectory() as folder:
        exported = SentenceTransformer(settings["model"], device="cpu", backend="onnx", model_kwargs={**arguments})
        exported.save_pretrained(folder)
        export_dynamic_quantized_onnx_model(exported, "avx512_vnni", folder)
        arguments["file_name"] = "onnx/model_qint8_avx512_vnni.onnx"
        model = SentenceTransformer(folder, device="cpu", backend="onnx", model_kwargs=arguments)
    return _encode_by(model, settings), {}


def _encode_by(model: Any, settings: dict[str, Any]) -> Encode:
    def encode(texts: list[str]) -> npt.NDArray[Any]:
        return np.asarray(
            model.encode_document(
                texts, batch_size=settings["batch_size"], show_progress_bar=False, convert_to_numpy=True
            ),
            dtype=np.float32,
        )

    return encode


def padded_loop(settings: dict[str, Any]) -> tuple[Encode, dict[str, Any]]:
    """What sentence-transformers does, written with transformers alone, for machines without it: mean pooling, unit length.

    Texts sorted by their characters, batches padded to their longest text, vectors brought back batch by batch.
    """
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(settings["model"])
    model = transformers.AutoModel.from_pretrained(settings["model"], dtype=DTYPES[settings["precision"]])
    model = model.to(settings["device"]).eval()

    @torch.inference_mode()
    def encode(texts: list[str]) -> npt.NDArray[Any]:
        order = sorted(range(len(texts)), key=lambda number: -len(texts[number]))
        vectors = []
        for begin in range(0, len(order), settings["batch_size"]):
            batch = [texts[number] for number in order[begin : begin + settings["batch_size"]]]
            fields = tokenizer(
                batch, padding=True, truncation=True, max_length=settings["max_seq_length"], return_tensors="pt"
            ).to(settings["device"])
            states_BTD = model(**fields).last_hidden_state
            mask_BT1 = fields["attention_mask"][:, :, None].to(states_BTD.dtype)
            means_BD = (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)
            vectors.append(torch.nn.functional.normalize(means_BD, dim=1).float().cpu().numpy())
        found_ND = np.concatenate(vectors)
        in_order_ND = np.empty_like(found_ND)
        in_order_ND[order] = found_ND
        return in_order_ND

    return encode, {}


WAYS: dict[str, Callable[[dict[str, Any]], tuple[Encode, dict[str, Any]]]] = {
    "ours": ours,
    "sentence_transformers": sentence_transformers,
    "onnx_int8": onnx_int8,
    "padded_loop": padded_loop,
}


@contextlib.contextmanager
def counted_ids(vocab_size: int) -> Iterator[list[int]]:
    """Appends the token ids, padding included, that each pass looks up in an embedding of `vocab_size` rows.

    Of a model that is not made of torch modules: those that sentence-transformers hands to it.
    """
    counts: list[int] = []
    handed: list[int] = []

    def count(module: torch.nn.Module, arguments: Any) -> None:
        if isinstance(module, torch.nn.Embedding) and module.num_embeddings == vocab_size and arguments:
            counts.append(arguments[0].numel())
        elif type(module).__name__ == "Transformer" and arguments and "input_ids" in arguments[0]:
            handed.append(arguments[0]["input_ids"].numel())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield counts
    finally:
        handle.remove()
        counts.extend([] if counts else handed)


def encode_part(encode: Encode, texts: list[str], save: str) -> dict[str, Any]:
    """Seconds from texts to vectors on the host; the vectors go into the file `save`."""
    began = time.perf_counter()
    vectors_ND = encode(texts)
    seconds = time.perf_counter() - began
    np.save(save, vectors_ND)
    return {"seconds": seconds}


def memory(settings: dict[str, Any]) -> dict[str, float]:
    """The process's peak, in MB."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        found["peak_rss_mb"] = next(round(int(x.split()[1]) / 1024, 1) for x in lines if x.startswith("VmHWM"))
    if settings["device"] == "cuda":
        found["peak_cuda_mb"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
    return found


def serve(commands: TextIO, answers: TextIO) -> None:
    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    settings = json.loads(commands.readline())
    torch.set_num_threads(settings["threads"])
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        encode, details = WAYS[settings["way"]](settings)
    except Exception as error:
        # Exporting a model is beyond what is measured here; the race goes on without it.
        if not isinstance(error, ImportError) and settings["way"] != "onnx_int8":
            raise
        answer({"absent": (str(error).strip().splitlines() or [type(error).__name__])[0]})
        return
    parts = json.loads(Path(settings["texts"]).read_text(encoding="utf-8"))
    answer({"versions": installed(PACKAGES), **details})
    for line in commands:
        command = json.loads(line)
        match command["do"]:
            case "check":
                with counted_ids(settings["vocab_size"]) as counts:
                    found = encode_part(encode, parts[command["part"]], command["save"])
                answer({**found, "computed_tokens": sum(counts)})
            case "encode":
                answer(encode_part(encode, parts[command["part"]], command["save"]))
            case "memory":
                answer(memory(settings))
            case "profile":
                from benchmarks.encode_profile import profile

                encoder = make_encoder({**settings, "threads": 1})
                answer(profile(encoder, parts[command["part"]], command["flops_per_token"]))


if __name__ == "__main__":
    # Libraries print to the standard output; the answers have it for themselves.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
