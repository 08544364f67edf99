"""Texts of many scripts, tokenizers of three kinds and cached chunkers, for the tests of the chunker."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from operators import schemas
from operators.chunker import ChunkConfig, Chunker
from operators.encoding.model_folder import ModelSpec, load_spec, resolve_model
from operators.encoding.tokenizer import load_tokenizer

SENTENCES = "The cat sat on the mat. It was a sunny day! Why not? " * 40
JAPANESE = "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。" * 20
ODD = [
    SENTENCES,
    JAPANESE,
    "w" * 3000,
    "don't " * 300,
    "🙂👩‍👩‍👧‍👦 " * 150,
    "unbelievability" * 50,
    "a\nb\n" * 200,
    "한국어 텍스트 " * 80,
    "العربية لغة جميلة. ",
    "\u202bשלום עולם\u202c! " * 60,
    "e\u0301a\u0308o\u0302\u0323 ｆｕｌｌ ﬁligree ﷺ ㍿ Ⅻ ½ " * 40,
    "हिन्दी में लिखा हुआ। ภาษาไทยไม่มีช่องว่าง " * 30,
]
_FRAGMENTS = [
    *(word for text in ODD for word in text[:60].split(" ")),
    *" .\n!。",
    ". ",
    "\u200d",
    "\u0301",
    "  ",
    "[SEP]",
]
MIXED = st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=8), max_size=40).map("".join)
TOKENIZERS = ("wordpiece", "bytes", "unigram")


def rows(texts: Sequence[str]) -> pa.Table:
    count = len(texts)
    hashes = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    columns = [[f"d{n}" for n in range(count)], list(texts), ["file"] * count, list(range(count)), hashes]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schemas.CLEANED, strict=True)]
    return pa.table(arrays, schema=schemas.CLEANED)


@functools.cache
def spec(kind: str = "wordpiece", prompt: str = "", include_prompt: bool = True) -> ModelSpec:
    """all-MiniLM-L6-v2, with another tokenizer where `kind` says so."""
    found = load_spec(resolve_model("all-MiniLM-L6-v2"))
    path = found.path if kind == "wordpiece" else _tokenizer_folder(kind)
    return dataclasses.replace(found, path=path, document_prompt=prompt, include_prompt=include_prompt)


@functools.cache
def tokenizer(kind: str = "wordpiece") -> Any:
    return load_tokenizer(spec(kind))


@functools.cache
def _cached_chunker(model: ModelSpec, config: ChunkConfig) -> Chunker:
    return Chunker(config, model)


def chunker(mode: str = "window", max_tokens: int = 0, overlap: int = 32, context: int = 0, **model: Any) -> Chunker:
    config = ChunkConfig(mode=mode, max_tokens=max_tokens, overlap_tokens=overlap, context_tokens=context)
    return _cached_chunker(spec(**model), config)


@functools.cache
def _tokenizer_folder(kind: str) -> Path:
    """`bytes`: byte-level BPE whose tokens take the space before them, as GPT's; `unigram`: NFKC and ▁, as XLM-R's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "</s>", "<unk>"]
    if kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    made.train_from_iterator([text[:400] for text in ODD], trainer)
    ends = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    folder = Path(tempfile.mkdtemp(prefix="vectormill-tokenizer-"))
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
