"""Trains an encoder-decoder Transformer to translate English into Spanish, on the aligned verses of two Bibles.

The texts are Debian's packages sword-text-kjv (1611) and sword-text-sparv (1909). The result is judged by chrF on other
verses, beside that of the source itself: names and common letters alone give it some.
"""

from __future__ import annotations

import importlib.util
import re
import struct
import zlib
from pathlib import Path

import common
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fastformer.models import TransformerConfig, TransformerForConditionalGeneration

PACKAGES = {"sword-text-kjv": "engKJV2006eb", "sword-text-sparv": "spaRV1909eb"}
PAD, BOS, EOS = range(3)


def verses(folder: Path) -> list[str]:
    """The entries of a SWORD zText module, "" where it has none: those of all modules with its numbering are in line.

    Of each testament .bzz holds compressed blocks, .bzs their offset and size (and that of what is in them), and .bzv
    for each verse the number of its block, and its offset and size there.
    """
    found = []
    for testament in ("ot", "nt"):
        blocks, index, data = ((folder / f"{testament}.{kind}").read_bytes() for kind in ("bzs", "bzv", "bzz"))
        texts = [zlib.decompress(data[begin : begin + size]) for begin, size, _ in struct.iter_unpack("<III", blocks)]
        found += [texts[block][begin : begin + size] for block, begin, size in struct.iter_unpack("<IIH", index)]
    return [plain(verse.decode()) for verse in found]


def plain(osis: str) -> str:
    """Without titles, notes and markup."""
    osis = re.sub(r"<(title|note)\b[^>]*(?<!/)>.*?</\1>", "", osis, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]*>", "", osis).replace("¶", "").split())


def pairs(folder: Path) -> list[tuple[str, str]]:
    """English and Spanish of every verse that both have, in an order that tells nothing."""
    modules = {package: folder / "modules/texts/ztext" / name for package, name in PACKAGES.items()}
    if missing := [package for package, module in modules.items() if not module.exists()]:
        raise SystemExit(
            f"{folder} has no {' and '.join(missing)}: apt-get install {' '.join(missing)}, or give the folder by"
            " --sword DIR"
        )
    english, spanish = map(verses, modules.values())
    both = [pair for pair in zip(english, spanish, strict=True) if all(pair)]
    return [both[i] for i in torch.randperm(len(both), generator=torch.Generator().manual_seed(0)).tolist()]


def byte_pairs(texts: list[str], size: int) -> Tokenizer:
    """One vocabulary for both languages, and the end behind each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]  # PAD, BOS, EOS
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def padded(rows: list[list[int]], value: int) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def main(argv: list[str] | None = None) -> list[float]:
    parser = common.options(__doc__.split("\n")[0], steps=2000, batch=48, lr=1e-3)
    parser.set_defaults(dropout=0.1, save_every=200)
    parser.add_argument("--sword", type=Path, default=Path("/usr/share/sword"), metavar="DIR")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=3, help="of the encoder, and of the decoder")
    parser.add_argument("--length", type=int, default=100, help="tokens of a verse; longer ones are left out")
    parser.add_argument("--held-out", type=int, default=200, help="verses to test on")
    parser.add_argument("--beams", type=int, default=4)
    args = parser.parse_args(argv)
    if args.held_out and importlib.util.find_spec("sacrebleu") is None:
        raise SystemExit("chrF wants sacrebleu: pip install sacrebleu, or --held-out 0")

    examples = pairs(args.sword)
    held_out, examples = examples[: args.held_out], examples[args.held_out :]
    tokenizer = byte_pairs([text for pair in examples for text in pair], args.vocabulary)

    def encode(texts: list[str]) -> list[list[int]]:
        return [[*encoding.ids, EOS] for encoding in tokenizer.encode_batch(texts)]

    encoded = zip(*(encode(list(side)) for side in zip(*examples, strict=True)), strict=True)
    encoded = sorted((pair for pair in encoded if max(map(len, pair)) <= args.length), key=lambda pair: len(pair[1]))

    def batch(generator: torch.Generator) -> dict[str, Tensor]:
        """Verses of about the same length."""
        size = min(16 * args.batch, len(encoded))
        begin = int(torch.randint(len(encoded) - size + 1, (), generator=generator))
        chosen = torch.randperm(size, generator=generator)[: args.batch].tolist()
        sources, targets = zip(*(encoded[begin + i] for i in chosen), strict=True)
        input_ids = padded(sources, PAD)
        return {"input_ids": input_ids, "attention_mask": input_ids != PAD, "labels": padded(targets, -100)}

    torch.manual_seed(args.seed)
    model = TransformerForConditionalGeneration(
        TransformerConfig(
            vocab_size=tokenizer.get_vocab_size(), d_model=args.width, nhead=args.width // 32,
            num_encoder_layers=args.layers, num_decoder_layers=args.layers, dim_feedforward=4 * args.width,
            dropout=args.dropout, norm_first=True, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        )
    )  # fmt: skip
    losses = common.train(model, batch, lambda model, given: model(**given).loss, args)
    if args.save and len(losses) == args.steps:
        tokenizer.save(str(args.save / "tokenizer.json"))

    model.eval()
    translated = []
    for first in range(0, len(held_out), 20):
        input_ids = padded(encode([source for source, _ in held_out[first : first + 20]]), PAD)
        output = model.generate(
            input_ids, input_ids != PAD, max_new_tokens=input_ids.size(1) + 30, num_beams=args.beams
        )
        translated += [text.strip() for text in tokenizer.decode_batch(output.tolist())]
    if held_out:
        report(translated, held_out)
    return losses


def report(translated: list[str], held_out: list[tuple[str, str]]) -> None:
    from sacrebleu import corpus_chrf

    sources, references = map(list, zip(*held_out, strict=True))
    for source, text in zip(sources[:3], translated, strict=False):
        print(f"{source}\n -> {text}")
    score, copied = (corpus_chrf(texts, [references]).score for texts in (translated, sources))
    print(f"chrF on {len(held_out)} other verses: {score:.1f}; of the source as it is: {copied:.1f}")


if __name__ == "__main__":
    main()
