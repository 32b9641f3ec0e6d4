"""The Triton kernels: compiled as for a GPU (tests/kernels/aot.py), then run by the interpreter on CPU tensors.

with running_triton() as launches:
    ops.layer_norm(torch.randn(64, 768), 768)
print(launches[0].kernel, launches[0].counts)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from aot import compiling_for
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import Finished, Runner, buffers_of
from .program import Program
from .tensor_map import TensorMap

SCALARS = {"i1": np.int8, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64}
SCALARS |= {"u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "fp32": np.float32}


@contextlib.contextmanager
def running_triton(
    target: str = "sm_80", order: str = "together", seed: int = 0, edit: Callable[[str], str] | None = None
) -> Iterator[list[Finished]]:
    """Inside, calls on CPU tensors go to the Triton kernels, in the interpreter. The list has what each launch did.

    `edit` changes the PTX of each kernel, from .entry to its last brace.
    """
    runner = Runner(order, seed, edit)
    with compiling_for(target):
        compile_only = JITFunction.run

        def run(self: JITFunction, *args, grid, warmup, **options):
            compiled = compile_only(self, *args, grid=grid, warmup=warmup, **options)
            given = dict(zip(self.arg_names, args, strict=False)) | options
            size = grid(given) if callable(grid) else grid
            text = compiled.asm["ptx"]
            program = runner.program(text, compiled.metadata.name)
            maps = list(compiled.metadata.tensordesc_meta or ())
            signature = compiled.src.signature.items()
            arguments = [pair for name, kind in signature for pair in _flat(kind, given.get(name), maps)]
            parameters = _parameters(program, arguments)
            tensors = [x for _, x in arguments if isinstance(x, torch.Tensor)]
            tensors += [x.base for x in given.values() if isinstance(x, TensorDescriptor)]
            blocks = tuple([*size, 1, 1][:3])
            threads = (32 * compiled.metadata.num_warps, 1, 1)
            runner.run(program, blocks, threads, compiled.metadata.shared, parameters, buffers_of(tensors))
            return compiled

        JITFunction.run = run
        try:
            with _new_tensors_are_nan():
                yield runner.finished
        finally:
            JITFunction.run = compile_only


def _flat(kind: str | tuple, value: object, maps: list[dict]) -> list[tuple[str, object]]:
    """(type, value) of what the compiled kernel takes: tuples are one argument for each element; descriptors are a
    tensor map, for which `maps` has the next entry, sizes and strides."""
    if isinstance(kind, tuple):
        return [pair for k, v in zip(kind, value, strict=True) for pair in _flat(k, v, maps)]
    if kind.startswith("tensordesc<"):
        sizes = [("i32", n) for n in value.shape] + [("i64", n) for n in value.strides]
        return [("map", _tensor_map(value, maps.pop(0))), *sizes]
    return [] if kind == "constexpr" else [(kind, value)]


def _tensor_map(descriptor: TensorDescriptor, made: dict) -> TensorMap:
    """As Triton's launcher for NVIDIA encodes it."""
    if made["fp4_padded"] or made["is_im2col"] or descriptor.padding != "zero" or descriptor.round_f32_to_tf32:
        raise ValueError(f"a tensor descriptor that is not known: {descriptor}, {made}")
    host_types = {8: 10, 9: 8, 10: 9}  # the numbers of types differ between kernels and the driver
    return TensorMap(
        host_types.get(made["elem_type"], made["elem_type"]),
        descriptor.base.data_ptr(),
        tuple(descriptor.shape)[::-1],
        tuple(n * made["elem_size"] for n in descriptor.strides[:-1])[::-1],
        tuple(made["block_size"])[::-1],
        made["swizzle"],
    )


def _parameters(program: Program, arguments: list[tuple[str, object]]) -> np.ndarray:
    """The bytes of the kernel's parameters: the arguments, then two pointers to scratch memory that nothing uses."""
    result = np.zeros(program.parameter_bytes, np.uint8)
    parameters = program.kernel.parameters
    if len(parameters) != len(arguments) + 2:
        raise ValueError(f"{program.kernel.name} has {len(parameters)} parameters, got {len(arguments)} arguments")
    for parameter, (kind, value) in zip(parameters, arguments, strict=False):
        if kind.startswith("*"):
            number = np.uint64(value.data_ptr() if isinstance(value, torch.Tensor) else value or 0)
        elif kind in SCALARS:
            number = SCALARS[kind](value)
        elif kind == "map":
            number = value
        else:
            raise ValueError(f"{program.kernel.name}: an argument of type {kind} is not known")
        bits = np.frombuffer(number.tobytes(), np.uint8)
        if len(bits) != parameter.size:
            raise ValueError(f"{program.kernel.name}: {parameter.name} has {parameter.size} bytes, {kind} {len(bits)}")
        start = program.address_of(parameter.name)
        result[start : start + len(bits)] = bits
    return result


@contextlib.contextmanager
def _new_tensors_are_nan() -> Iterator[None]:
    """What a kernel reads and nobody wrote shows in the results."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = before[0]
        torch.use_deterministic_algorithms(before[1])
