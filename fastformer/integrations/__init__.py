"""Which modules of which library are swapped for what: one file for each, read once its library is in use."""

from __future__ import annotations

import importlib
import re
import sys

SUPPORTED = (
    "BERT and GPT-2 of transformers and of fastformer.models, the latter's Transformer, and torch.nn's"
    " TransformerEncoder, TransformerEncoderLayer, TransformerDecoderLayer, MultiheadAttention and LayerNorm"
)

_OLDEST_TRANSFORMERS = (5, 20)
_INTEGRATIONS = {  # the module that defines the stock classes: no model of theirs exists before it is imported
    "torch.nn": "torch_nn",
    "fastformer.models": "models",
    "transformers.models.bert.modeling_bert": "huggingface_bert",
    "transformers.models.gpt2.modeling_gpt2": "huggingface_gpt2",
}


def load() -> None:
    """Fills the tables of `integrations.fused` for the libraries in use.

    Raises NotImplementedError: a version of transformers whose modules are too different.
    """
    for library, integration in _INTEGRATIONS.items():
        if library in sys.modules:
            if library.startswith("transformers."):
                _check_transformers()
            importlib.import_module(f"fastformer.integrations.{integration}")


def _check_transformers() -> None:
    version = sys.modules["transformers"].__version__
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise NotImplementedError(f"transformers {version}: fastformer takes models of transformers >= {oldest}")
