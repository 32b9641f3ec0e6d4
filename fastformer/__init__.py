"""Fused attention, GELU feed-forward and layer-norm for BERT and GPT models in PyTorch.

model = fastformer.accelerate(model)    # in place; training, generate and checkpoints go on working
print(fastformer.report(model))
fastformer.restore(model)
"""

from fastformer import nn, ops, reference
from fastformer.accelerate import accelerate, repack, report, restore
from fastformer.backends import backend
from fastformer.version import __version__

__all__ = ["__version__", "accelerate", "backend", "nn", "ops", "reference", "repack", "report", "restore"]
