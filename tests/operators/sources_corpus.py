"""A corpus read as a build does it: listed, planned, staged where it must be, read piece by piece."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa

from operators.sources.listing import list_sources
from operators.sources.pieces import Piece, plan_pieces
from operators.sources.readers import PieceReader, PieceRows, ReadConfig
from operators.sources.staging import stage_object
from operators.storage.store import Store, open_store


def pieces_of(sources: list[Any], config: ReadConfig, store: Store) -> list[Piece]:
    """All pieces, after a round trip through JSON and pickle."""
    plan = plan_pieces(list_sources([str(source) for source in sources]).objects, config)
    staged = {obj.uri: stage_object(obj, config, store, "runs/r/staged") for obj in plan.to_stage}
    pieces = plan.pieces(staged)
    copies = [Piece.from_json(json.loads(json.dumps(piece.to_json()))) for piece in pickle.loads(pickle.dumps(pieces))]
    assert copies == pieces
    assert len({piece.piece_id for piece in pieces}) == len(pieces)
    return copies


def read_corpus(sources: list[Any], root: Path | str, **settings: Any) -> PieceRows:
    """Rows and rejects of all pieces, in source order."""
    config, store = ReadConfig(**settings), open_store(str(root))
    found = [PieceReader(config, store).read(piece) for piece in pieces_of(sources, config, store)]
    assert found, "the corpus has no pieces"
    assert all(piece.num_rows_read == piece.rows.num_rows + piece.rejects.num_rows > 0 for piece in found)
    return PieceRows(pa.concat_tables([p.rows for p in found]), pa.concat_tables([p.rejects for p in found]))


def texts(found: PieceRows) -> dict[str, str]:
    """doc_id -> text; ids are unique."""
    rows = found.rows.select(["doc_id", "text"]).to_pylist()
    assert len({row["doc_id"] for row in rows}) == len(rows)
    return {row["doc_id"]: row["text"] for row in rows}


def reasons(found: PieceRows) -> list[tuple[int, str | None, str]]:
    """(row, doc_id, reason) of the rejects."""
    rejects = found.rejects.to_pylist()
    assert all(reject["outcome"] == "rejected" for reject in rejects)
    assert all(len(reject["detail"]) <= 200 and reject["detail"].isprintable() for reject in rejects)
    return [(reject["row"], reject["doc_id"], reject["reason"]) for reject in rejects]
