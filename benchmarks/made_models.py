"""Encoders of known sizes with random weights, and texts for them: for machines that hold no weights and no texts.

Speed depends on the sizes, not on what the weights have learnt. The tokenizer is a WordPiece one with a made vocabulary,
so that a text of n words has n tokens and the two special ones.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

# Layers, hidden dimension, heads, intermediate dimension.
SIZES = {"tiny": (2, 64, 4, 128), "minilm": (6, 384, 12, 1536), "bert-base": (12, 768, 12, 3072)}
PREFIX = "made:"
VOCAB_SIZE = 30_522
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_TOKENS = 512
SEED = 4_000


def make_model(size: str, folder: Path) -> Path:
    """A BERT of that size with mean pooling and unit length in sentence-transformers layout in `folder`."""
    import tokenizers
    import torch
    import transformers

    num_layers, hidden, heads, intermediate = SIZES[size]
    words = {word: number for number, word in enumerate([*SPECIAL, *vocabulary()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", words["[CLS]"]), ("[SEP]", words["[SEP]"])]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(str(folder))
    torch.manual_seed(SEED)
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=MAX_TOKENS,
    )
    transformers.BertModel(config).save_pretrained(str(folder))
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    _write(
        folder / "modules.json",
        [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for number, (kind, path) in enumerate(modules)
        ],
    )
    _write(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": hidden, "pooling_mode_mean_tokens": True})
    (folder / "2_Normalize").mkdir()
    return folder


def vocabulary() -> list[str]:
    """Distinct made words of 3 to 9 letters, as many as fit beside the special tokens; the same on every machine."""
    rng = np.random.default_rng(SEED)
    found: dict[str, None] = {}
    while len(found) < VOCAB_SIZE - len(SPECIAL):
        letters = rng.integers(97, 123, int(rng.integers(3, 10))).astype(np.uint8)
        found[letters.tobytes().decode("ascii")] = None
    return list(found)


def made_texts(count: int, min_tokens: int, max_tokens: int) -> list[str]:
    """`count` texts of words of the vocabulary, uniform in length between these numbers of tokens, special ones included."""
    rng = np.random.default_rng(SEED + 1)
    words = vocabulary()
    lengths = rng.integers(min_tokens, max_tokens + 1, count) - 2
    return [" ".join(words[number] for number in rng.integers(0, len(words), length).tolist()) for length in lengths]


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
