"""What bench/peers/run.py runs: models in checkpoint folders, and batches of token ids."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SENTENCES = 64
SHORT = 16  # tokens
NEW = 64  # tokens generated
MIXED = (128, 16, 22, 31, 40, 18, 64, 27, 96, 12, 35, 51, 20, 77, 25, 44)  # tokens of each sequence


@dataclass(frozen=True)
class Model:
    name: str
    label: str
    heads: int
    hidden: int
    precisions: tuple[str, ...] = ("float32", "int8")
    is_sentence_encoder: bool = False  # a sentence is the mean of its tokens' hidden states
    weights_read: int = 0  # elements of the matrices, all of which a new token reads; 0 for encoders


BERT_BASE = Model("bert-base", "BERT-base", 12, 768)
MINILM = Model("minilm", "MiniLM-L6", 12, 384, is_sentence_encoder=True)
GPT2 = Model(
    "gpt2", "GPT-2 small", 12, 768, ("float32", "bfloat16", "int8"), weights_read=12 * 12 * 768**2 + 50257 * 768
)


@dataclass(frozen=True)
class Workload:
    model: Model
    what: str
    ids: np.ndarray  # (B, S) int64
    lengths: np.ndarray  # (B,) int64: what lies behind them is padding
    # What is asked for: "encode", the hidden states (B, S, E); "generate", the likeliest NEW tokens behind each prompt
    # (B, NEW); "prefill", the logits of the last token (B, V), all others' keys and values being made; "token", the
    # same, but the others' lie in a cache already.
    task: str = "encode"

    @property
    def name(self) -> str:
        return f"{self.model.label}, {self.what}"

    @property
    def mask(self) -> np.ndarray:
        """(B, S) int64, 1 for tokens, 0 for padding."""
        return (np.arange(self.ids.shape[1]) < self.lengths[:, None]).astype(np.int64)


def save_models(folder: Path) -> None:
    """BERT-base and GPT-2 small with random weights, MiniLM-L6 with its own, each in a folder of its name."""
    import torch
    import transformers

    from fastformer.cli.workloads import minilm_folder

    if not (folder / MINILM.name).exists():
        shutil.copytree(minilm_folder(), folder / MINILM.name)
    if not (folder / BERT_BASE.name).exists():
        torch.manual_seed(0)
        # The defaults are BERT-base. CTranslate2 wants the kind of position embeddings, and a vocabulary, by which no
        # text is ever tokenized.
        model = transformers.BertModel(transformers.BertConfig(position_embedding_type="absolute"))
        model.save_pretrained(folder / BERT_BASE.name)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        words += [f"word{n}" for n in range(model.config.vocab_size - len(words))]
        (folder / BERT_BASE.name / "vocab.txt").write_text("\n".join(words) + "\n")
        transformers.BertTokenizer(str(folder / BERT_BASE.name / "vocab.txt")).save_pretrained(folder / BERT_BASE.name)
    if not (folder / GPT2.name).exists():
        torch.manual_seed(0)
        # No token ends a text. With weights larger than the default's, greedy tokens vary: 20 to 36 kinds among 64.
        config = transformers.GPT2Config(initializer_range=0.05, bos_token_id=None, eos_token_id=None)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder / GPT2.name)
        vocabulary = {word(n): n for n in range(config.vocab_size - 1)} | {"<|endoftext|>": config.vocab_size - 1}
        transformers.GPT2Tokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder / GPT2.name)


def word(token: int) -> str:
    """By which CTranslate2 knows a token of GPT2."""
    return f"word{token}"


def workloads(models: Path) -> list[Workload]:
    return [
        random_ids("1 x 128", [128]),
        random_ids("1 x 32", [32]),
        random_ids("8 x 128", [128] * 8),
        random_ids("2 x 512", [512] * 2),
        random_ids("16 x 128, mixed lengths", MIXED),
        sentences(models, f"one sentence of {SHORT} tokens", one=True),
        sentences(models, f"{SENTENCES} sentences", one=False),
        random_ids(f"generate 64 + {NEW}, greedy", [64], GPT2, "generate"),
        random_ids(f"generate 8 x 32 + {NEW}, greedy", [32] * 8, GPT2, "generate"),
        random_ids("one token after 128", [129], GPT2, "token"),
        random_ids("one token after 900", [901], GPT2, "token"),
        random_ids("prefill 512, last logits", [512], GPT2, "prefill"),
    ]


def random_ids(
    what: str, lengths: list[int] | tuple[int, ...], model: Model = BERT_BASE, task: str = "encode"
) -> Workload:
    ids = np.random.default_rng(0).integers(1000, 30000, (len(lengths), max(lengths)))
    workload = Workload(model, what, ids, np.array(lengths), task)
    ids[workload.mask == 0] = 0
    return workload


def sentences(models: Path, what: str, one: bool) -> Workload:
    """The sentences of `fastformer compare`: its first ones in one padded batch, or the first of SHORT tokens."""
    from fastformer.cli.workloads import SENTENCES as TEXT
    from fastformer.cli.workloads import import_transformers, load_tokenizer, read_lines

    tokenizer = load_tokenizer(import_transformers(), models / MINILM.name)
    lines = read_lines(TEXT)
    if one:
        lines = [line for line in lines if len(tokenizer(line)["input_ids"]) == SHORT][:1]
    batch = tokenizer(lines[:SENTENCES], padding=True, return_tensors="np")
    return Workload(MINILM, what, batch["input_ids"].astype(np.int64), batch["attention_mask"].sum(1))
