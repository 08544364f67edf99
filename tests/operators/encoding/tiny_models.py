"""Tiny models of every family with random weights, saved as sentence-transformers saves them. Made offline, seeded.

The weights are drawn wide, not as for training: attention is then sharp and positions count, so that a wrong mask, a
wrong position or a neighbour that is seen moves a vector far beyond rounding.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

MAX_TOKENS = 48

TEXTS = [
    "a",
    "The cat sat on the mat.",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "Быстрая коричневая лиса прыгает через ленивую собаку",
    "السلام عليكم ورحمة الله وبركاته",
    "한국어 문장입니다",
    "नमस्ते दुनिया, यह एक वाक्य है।",
    "🙂👩‍👩‍👧‍👦 emoji 🎉",
    "naïve café Ünïcödé ﬁne ½",
    "ΑΒΓ αβγ Ωμέγα",
    "ภาษาไทยไม่มีช่องว่าง",
    "שלום עולם",
    "x",
    "mixed 日本語 and English и русский in one",
    "one two three four five " * 3,
    "A sentence of middle length that says nothing of any use to anybody.",
    "far beyond what the model takes, with a tail that is cut " * 12,
    "2026-01-02 03:04:05 +0100 ERROR [main] 0x7f",
    "tab\tand\nnewline   and   spaces",
    "The longest one, 漢字 and кириллица, goes on and on without an end in sight. " * 9,
]

SPECIAL = {"pad": "<pad>", "unk": "<unk>", "bos": "<s>", "eos": "</s>", "mask": "<mask>"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without progress bars and reports of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tokenizer_of(kind: str, template: str, *, lower_case: bool = True) -> Tokenizer:
    """A tokenizer of TEXTS: "wordpiece", "unigram" or "bpe" (of bytes). template: such as "<s> $A </s>".

    "wordpiece" and "bpe" are the same in every process; the trainer of "unigram" adds up in the order of a hash table.

    Ids 0..4 are those of SPECIAL in its order, except that RoBERTa's order (<s>, <pad>, </s>) is had by "bpe" and
    "unigram", for pad_token_id 1.
    """
    order = ["pad", "unk", "bos", "eos", "mask"] if kind == "wordpiece" else ["bos", "pad", "eos", "unk", "mask"]
    special = [SPECIAL[name] for name in order]
    trainer: Any
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower_case)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.model = models.WordPiece(_pieces(tokenizer, special), unk_token=SPECIAL["unk"])
        tokenizer.add_special_tokens(special)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=400, special_tokens=special, unk_token=SPECIAL["unk"], show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
    used = [(token, tokenizer.token_to_id(token)) for token in template.split() if token.startswith("<")]
    if used:
        pair = f"{template} {template.replace('$A', '$B')}"
        tokenizer.post_processor = processors.TemplateProcessing(single=template, pair=pair, special_tokens=used)
    return tokenizer


def _pieces(tokenizer: Tokenizer, special: list[str]) -> dict[str, int]:
    """Vocabulary of a WordPiece model: all characters, as the first of a word and within one, then whole words, frequent first.

    Not by tokenizers' trainer, whose merges follow a hash table where counts are equal: another vocabulary in each process.
    """
    counts: Counter[str] = Counter()
    for text in TEXTS:
        normal = tokenizer.normalizer.normalize_str(text)
        counts.update(word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal))
    letters = sorted({letter for word in counts for letter in word})
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), *words]
    return {piece: number for number, piece in enumerate(pieces[:500])}


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.named_parameters()):
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                value.copy_(0.2 * noise + (1.0 if name.endswith("weight") else 0.0))
            else:
                # What every token gets (its type) would drown what it is.
                scale = 0.1 if "token_type" in name else 1.0
                value.copy_(noise * (scale if "embed" in name else 1.5 / value.shape[-1] ** 0.5))


def save_transformer(folder: Path, config: Any, tokenizer: Tokenizer, **settings: Any) -> Path:
    """A transformers folder with random weights of the configuration's family."""
    import transformers

    kind = transformers.T5EncoderModel if config.model_type == "t5" else transformers.AutoModel.from_config
    model: Any = kind(config)
    randomize(model)
    wrapper = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=MAX_TOKENS,
        **{f"{name}_token": token for name, token in SPECIAL.items()},
        **settings,
    )
    with quiet():
        model.save_pretrained(folder)
        wrapper.save_pretrained(folder)
    return folder


def save_model(folder: Path, transformer: Path, *modules: Any, **settings: Any) -> Path:
    """The transformer of a folder with further sentence-transformers modules behind it, in its own layout."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    with quiet():
        model = SentenceTransformer(modules=[Transformer(str(transformer)), *modules], device="cpu", **settings)
        model.save(str(folder), create_model_card=False)
    return folder


def _encoder(name: str, **settings: Any) -> Any:
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 80,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return getattr(transformers, name)(**(sizes | settings))


def _decoder(name: str, **settings: Any) -> Any:
    return _encoder(name, num_key_value_heads=2, head_dim=8, **settings)


def _t5() -> Any:
    import transformers

    # Relative positions: the configuration says nothing of a longest text.
    return transformers.T5Config(vocab_size=512, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, pad_token_id=1)


_BOTH, _END, _BARE = "<s> $A </s>", "$A </s>", "$A"

# Name to (configuration, kind of tokenizer, its template, its settings, pooling).
FAMILIES: dict[str, tuple[Callable[[], Any], str, str, dict[str, Any], str]] = {
    "bert": (lambda: _encoder("BertConfig", pad_token_id=0), "wordpiece", _BOTH, {}, "mean"),
    "roberta": (lambda: _encoder("RobertaConfig"), "bpe", _BOTH, {}, "cls"),
    "xlm-roberta": (lambda: _encoder("XLMRobertaConfig"), "unigram", _BOTH, {}, "cls"),
    "distilbert": (
        lambda: _encoder("DistilBertConfig", dim=32, n_layers=3, n_heads=4, hidden_dim=48, pad_token_id=0),
        "wordpiece",
        _BOTH,
        {},
        "mean",
    ),
    "mpnet": (lambda: _encoder("MPNetConfig"), "bpe", _BOTH, {}, "mean"),
    "modernbert": (
        lambda: _encoder(
            "ModernBertConfig",
            num_hidden_layers=4,
            global_attn_every_n_layers=3,
            local_attention=8,
            cls_token_id=0,
            sep_token_id=2,
        ),
        "bpe",
        _BOTH,
        {},
        "mean",
    ),
    "albert": (lambda: _encoder("AlbertConfig", embedding_size=16, pad_token_id=0), "wordpiece", _BOTH, {}, "mean"),
    "electra": (lambda: _encoder("ElectraConfig", embedding_size=16, pad_token_id=0), "wordpiece", _BOTH, {}, "cls"),
    "deberta": (
        lambda: _encoder(
            "DebertaV2Config", relative_attention=True, position_biased_input=False, pos_att_type=["p2c", "c2p"]
        ),
        "bpe",
        _BOTH,
        {},
        "mean",
    ),
    "nomic": (lambda: _encoder("NomicBertConfig"), "bpe", _BOTH, {}, "mean"),
    "t5": (_t5, "unigram", _END, {}, "mean"),
    "qwen3": (lambda: _decoder("Qwen3Config"), "bpe", _END, {"padding_side": "left"}, "lasttoken"),
    "llama": (lambda: _decoder("LlamaConfig"), "bpe", _BOTH, {}, "lasttoken"),
    "mistral": (lambda: _decoder("MistralConfig", sliding_window=9), "bpe", _BARE, {}, "lasttoken"),
    "gemma3-bidirectional": (
        lambda: _decoder(
            "Gemma3TextConfig", use_bidirectional_attention=True, sliding_window=9, query_pre_attn_scalar=8
        ),
        "bpe",
        _BOTH,
        {},
        "mean",
    ),
    "llama-bidirectional": (lambda: _decoder("LlamaConfig", is_causal=False), "bpe", _BOTH, {}, "lasttoken"),
}


def save_family(name: str, root: Path) -> Path:
    """The tiny model of one of FAMILIES, with Normalize at its end."""
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

    config, kind, template, settings, pooling = FAMILIES[name]
    transformer = save_transformer(root / "transformer", config(), tokenizer_of(kind, template), **settings)
    return save_model(root / "model", transformer, Pooling(32, pooling_mode=pooling), Normalize())
