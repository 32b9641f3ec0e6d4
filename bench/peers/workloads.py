"""What bench/peers/run.py runs: models in checkpoint folders, and batches of token ids."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SENTENCES = 64
SHORT = 16  # tokens
MIXED = (128, 16, 22, 31, 40, 18, 64, 27, 96, 12, 35, 51, 20, 77, 25, 44)  # tokens of each sequence


@dataclass(frozen=True)
class Model:
    name: str
    label: str
    heads: int
    hidden: int
    is_sentence_encoder: bool  # a sentence is the mean of its tokens' hidden states


BERT_BASE = Model("bert-base", "BERT-base", 12, 768, False)
MINILM = Model("minilm", "MiniLM-L6", 12, 384, True)
MODELS = (BERT_BASE, MINILM)


@dataclass(frozen=True)
class Workload:
    model: Model
    what: str
    ids: np.ndarray  # (B, S) int64
    lengths: np.ndarray  # (B,) int64: what lies behind them is padding

    @property
    def name(self) -> str:
        return f"{self.model.label}, {self.what}"

    @property
    def mask(self) -> np.ndarray:
        """(B, S) int64, 1 for tokens, 0 for padding."""
        return (np.arange(self.ids.shape[1]) < self.lengths[:, None]).astype(np.int64)


def save_models(folder: Path) -> None:
    """BERT-base with random weights and MiniLM-L6 with its own, each in a folder of its name."""
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


def workloads(models: Path) -> list[Workload]:
    return [
        random_ids("1 x 128", [128]),
        random_ids("1 x 32", [32]),
        random_ids("8 x 128", [128] * 8),
        random_ids("2 x 512", [512] * 2),
        random_ids("16 x 128, mixed lengths", MIXED),
        sentences(models, f"one sentence of {SHORT} tokens", one=True),
        sentences(models, f"{SENTENCES} sentences", one=False),
    ]


def random_ids(what: str, lengths: list[int] | tuple[int, ...]) -> Workload:
    ids = np.random.default_rng(0).integers(1000, 30000, (len(lengths), max(lengths)))
    workload = Workload(BERT_BASE, what, ids, np.array(lengths))
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
