"""The service that one writes in an hour: FastAPI, sentence-transformers and faiss in one process, a request at a time.

python -m benchmarks.naive_service ROOT TEXTS.json PORT NPROBE REFINE_FACTOR THREADS
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from benchmarks.served_index import MODEL, open_served, plain_faiss
from operators.encoding.model_folder import resolve_model


class Search(BaseModel):
    queries: list[str] | None = None
    vectors: list[list[float]] | None = None
    k: int = 10


def make_app(root: str, texts: list[str], nprobe: int, refine_factor: int, threads: int) -> FastAPI:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    model = SentenceTransformer(str(resolve_model(MODEL, "")), device="cpu")
    index = plain_faiss(open_served(Path(root)), nprobe, refine_factor)
    app = FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/search")
    def search(body: Search) -> dict[str, Any]:
        if body.queries is not None:
            vectors = model.encode(body.queries, show_progress_bar=False)
        else:
            vectors = np.array(body.vectors, np.float32)
        faiss.omp_set_num_threads(threads)  # of this thread of the pool
        scores, ids = index.search(vectors, body.k)
        return {
            "results": [
                {"hits": [{"doc_id": f"d{i:07d}", "score": s, "text": texts[i]} for s, i in zip(a, b, strict=True)]}
                for a, b in zip(scores.tolist(), ids.tolist(), strict=True)
            ]
        }

    return app


if __name__ == "__main__":
    root, texts_file, port, nprobe, refine_factor, threads = sys.argv[1:]
    texts = json.loads(Path(texts_file).read_text())
    app = make_app(root, texts, int(nprobe), int(refine_factor), int(threads))
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", access_log=False)
