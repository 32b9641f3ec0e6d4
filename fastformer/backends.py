"""The implementations of each op, what each takes, and the choice between them.

Every backend has its own raw ops, ``torch.ops.fastformer_<backend>.<op>``; "torch" is plain PyTorch. A declaration
below says what a raw op takes; the choice, the error texts, ``fastformer info`` and the tests' parameters come from
these.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer import cuda_library, library, tuning

OPS = (
    "scaled_dot_product_attention",
    "varlen_attn",
    "layer_norm",
    "add_layer_norm",
    "embeddings",
    "linear",
    "feed_forward",
    "linear_cross_entropy",
    "crf_log_likelihood",
    "crf_decode",
)
BACKENDS = ("cpu", "triton", "cuda", "torch")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Triton's interpreter runs the kernels on CPU tensors, for tests; it changes what @triton.jit makes of them.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
TRITON_DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@dataclass(frozen=True)
class Implementation:
    """A raw op and the calls that it takes."""

    op: str
    backend: str
    device: str  # device type, or "any"
    dtypes: tuple[torch.dtype, ...]
    notes: str = ""  # for people: masks, head sizes, limits
    mask_gradient: bool = False  # does it give the gradient of a float attn_mask?
    capability: tuple[int, int] = (0, 0)  # the least of an NVIDIA GPU
    max_size: int | None = None  # of a head, or of the row that is normalized

    def reasons(self, tensors: tuple[Tensor | None, ...], mask: Tensor | None, size: int | None) -> list[str]:
        """Why it can't take this call; empty if it can."""
        reasons = []
        unavailable = why_unavailable(self.backend)
        if unavailable:
            reasons.append(unavailable)
        for tensor in tensors:
            if tensor is None:
                continue
            if self.device not in ("any", tensor.device.type):
                reasons.append(f"takes {self.device} tensors, got one on {tensor.device}")
            if tensor.dtype not in self.dtypes:
                reasons.append(f"takes {', '.join(_short(d) for d in self.dtypes)}, got {_short(tensor.dtype)}")
            if tensor.is_cuda and capability_of(tensor.device) < self.capability:
                needs, has = (".".join(map(str, c)) for c in (self.capability, capability_of(tensor.device)))
                reasons.append(f"needs compute capability {needs}, {tensor.device} has {has}")
            if type(tensor) not in _PLAIN and not _is_traced(tensor):
                reasons.append(f"takes plain tensors, got {type(tensor).__name__}")
        if mask is not None and mask.requires_grad and torch.is_grad_enabled() and not self.mask_gradient:
            reasons.append("gives no gradient for attn_mask")
        if size is not None and self.max_size is not None and size > self.max_size:
            what = "rows" if self.op in ("layer_norm", "add_layer_norm") else "head sizes"
            reasons.append(f"takes {what} up to {self.max_size}, got {size}")
        return list(dict.fromkeys(reasons))


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _is_traced(tensor: Tensor) -> bool:
    return isinstance(tensor, (torch._subclasses.FakeTensor, torch._subclasses.functional_tensor.FunctionalTensor))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def capability_of(device: torch.device) -> tuple[int, int]:
    """Of an NVIDIA GPU; without a limit where there is none to ask: AMD, or tensors that are only traced."""
    if torch.version.hip or not torch.cuda.is_available():
        return (99, 0)
    return torch.cuda.get_device_capability(device)


_CPU_NOTES = {
    "scaled_dot_product_attention": "any head size, bool and float masks, causal, window, grouped-query, dropout",
    "varlen_attn": "any head size, window, grouped-query, dropout",
    "layer_norm": "any width",
    "add_layer_norm": "any width, 16-bit input with a float32 residual, dropout",
    "embeddings": "words, positions, token types, any width, dense gradients, dropout",
    "linear": "gelu, gelu_tanh, relu, silu, dropout, residual",
    "feed_forward": "gelu, gelu_tanh, relu, silu, dropout, residual",
    "linear_cross_entropy": "class indices, class weights, label smoothing",
    "crf_log_likelihood": "any mask, any number of tags",
    "crf_decode": "any mask, any number of tags",
}

_TRITON_NOTES = {
    "scaled_dot_product_attention": "head sizes to 256, bool and float masks, causal, window, grouped-query, dropout",
    "varlen_attn": "head sizes to 256, window, grouped-query, dropout",
    "layer_norm": "widths to 65,536",
    "add_layer_norm": "widths to 65,536, 16-bit input with a float32 residual, dropout",
    "linear": "gelu, gelu_tanh, relu, silu, dropout, residual",
    "feed_forward": "gelu, gelu_tanh, relu, silu, dropout, residual",
    "linear_cross_entropy": "class indices, class weights, label smoothing",
}

_TRITON_SIZES = {
    "scaled_dot_product_attention": 256,
    "varlen_attn": 256,
    "layer_norm": 65536,
    "add_layer_norm": 65536,
}

_CUDA_NOTES = {
    "scaled_dot_product_attention": "head sizes to 256, bool and float masks, causal, window, grouped-query, dropout",
    "varlen_attn": "head sizes to 256, window, grouped-query, dropout",
    "layer_norm": "widths to 16,384",
    "add_layer_norm": "widths to 16,384, 16-bit input with a float32 residual, dropout",
    "linear": "gelu, gelu_tanh, relu, silu, dropout, residual",
    "feed_forward": "gelu, gelu_tanh, relu, silu, dropout, residual",
}

_CUDA_SIZES = {
    "scaled_dot_product_attention": 256,
    "varlen_attn": 256,
    "layer_norm": 16384,
    "add_layer_norm": 16384,
}

_TORCH_NOTES = dict.fromkeys(("crf_log_likelihood", "crf_decode"), "plain PyTorch, step by step; the only one on GPUs")
_TORCH_NOTES["embeddings"] = "plain PyTorch; the only one on GPUs"

_IMPLEMENTATIONS = [
    *(Implementation(op, "cpu", "cpu", (*_FLOATS, torch.float64), _CPU_NOTES[op]) for op in OPS),
    *(
        Implementation(op, "triton", TRITON_DEVICE, _FLOATS, notes, capability=(8, 0), max_size=_TRITON_SIZES.get(op))
        for op, notes in _TRITON_NOTES.items()
    ),
    *(
        Implementation(
            op, "cuda", cuda_library.device_type(), _FLOATS, notes, capability=(8, 0), max_size=_CUDA_SIZES.get(op)
        )
        for op, notes in _CUDA_NOTES.items()
    ),
    *(
        Implementation(
            op, "torch", "any", (*_FLOATS, torch.float64), _TORCH_NOTES.get(op, "plain PyTorch"), mask_gradient=True
        )
        for op in OPS
    ),
]
_BY_OP = {op: {i.backend: i for i in _IMPLEMENTATIONS if i.op == op} for op in OPS}


def implementations() -> list[Implementation]:
    return list(_IMPLEMENTATIONS)


def declared(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for it, and "torch"."""
    return tuple(_BY_OP[op])


def why_unavailable(backend: str) -> str | None:
    """Why no op of this backend can run here, or None."""
    if backend == "torch":
        return None
    if backend == "cpu":
        return library.why_unavailable()
    if backend == "triton":
        return None if _HAS_TRITON else "triton is not installed: pip install triton"
    return cuda_library.why_unavailable()


class _Request(threading.local):
    def __init__(self) -> None:  # in each thread; torch.compile watches what an instance has, not what its class has
        self.backend: str | None = None
        self.strict = False


_request = _Request()


@contextlib.contextmanager
def backend(name: str, strict: bool = False) -> Iterator[None]:
    """Asks for one backend inside the block, in this thread: "cpu", "triton", "cuda" or "torch".

    A call that it can't take runs on the "torch" backend, which is said once; with ``strict=True`` it raises
    NotImplementedError with every backend's reasons. The environment variable FASTFORMER_BACKEND asks for the whole
    process.

    Raises ValueError for an unknown name.
    """
    _check_name(name, "backend")
    previous = _request.backend, _request.strict
    _request.backend, _request.strict = name, strict
    try:
        yield
    finally:
        _request.backend, _request.strict = previous


def _check_name(name: str, where: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{where}: got {name!r}, expected one of {', '.join(BACKENDS)}")


def _requested() -> tuple[str | None, bool]:
    if _request.backend is not None:
        return _request.backend, _request.strict
    name = os.environ.get("FASTFORMER_BACKEND")
    if name:
        _check_name(name, "FASTFORMER_BACKEND")
    return name or None, False


# Where nothing is asked for: by the device of the tensors, best first.
_DEFAULT = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}


def choose(
    op: str,
    *tensors: Tensor | None,
    mask: Tensor | None = None,
    size: int | None = None,
    torch_is_faster: bool = False,
    options: tuple[Hashable, ...] = (),
) -> str:
    """The backend for a call of `op` on these floating tensors; `mask` is a float attn_mask, `size` that of a head or
    of the row that is normalized. Where nothing is asked for, what `fastformer tune` measured for such a call decides,
    with its `options` that matter to speed; then `torch_is_faster` for plain PyTorch.

    Raises NotImplementedError where a backend was asked for strictly and can't take the call.
    """
    name, strict = _requested()
    if name is None:
        tuned = _tuned(op, tensors, mask, size, options) if tuning.table is not None else None
        if tuned or torch_is_faster:
            return tuned or "torch"
    if name == "torch":
        return "torch"
    candidates = (name,) if name else _DEFAULT.get(tensors[0].device.type, ())
    for candidate in candidates:
        implementation = _BY_OP[op].get(candidate)
        if implementation and not implementation.reasons(tensors, mask, size):
            return candidate
    if strict or candidates:
        _explain(op, name, strict, tensors, mask, size)
    return "torch"


def _tuned(
    op: str, tensors: tuple[Tensor | None, ...], mask: Tensor | None, size: int | None, options: tuple[Hashable, ...]
) -> str | None:
    """What the tuned table says; None also where the sizes are not known (in torch.compile and other traces)."""
    if type(tensors[0]) not in _PLAIN or torch.compiler.is_compiling():
        return None
    winner = tuning.table.backend(op, tensors, options)
    implementation = _BY_OP[op].get(winner)
    return winner if implementation and not implementation.reasons(tensors, mask, size) else None


def _explain(
    op: str,
    name: str | None,
    strict: bool,
    tensors: tuple[Tensor | None, ...],
    mask: Tensor | None,
    size: int | None,
) -> None:
    reasons = []
    for candidate in BACKENDS:
        if candidate == "torch":
            continue
        implementation = _BY_OP[op].get(candidate)
        why = implementation.reasons(tensors, mask, size) if implementation else [f"has no kernel for {op}"]
        if why:
            reasons.append(f"  {candidate}: {'; '.join(why)}")
    text = "\n".join(reasons)
    if strict:
        raise NotImplementedError(
            f"fastformer.ops.{op}: backend {name!r} was asked for and can't take this call\n{text}"
        )
    _warn_once(f"fastformer.ops.{op} runs on plain PyTorch here, because no fused backend takes this call:\n{text}")


_said: set[str] = set()


@torch._dynamo.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=5)  # the line that calls fastformer.ops.*
