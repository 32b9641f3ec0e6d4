"""The report of the machine code: what is read from cuobjdump's text, and what is a fault."""

from collections import Counter

import pytest
import torch
from resources import Facts, faults, launch_of, read, short

RESOURCES = """\
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _Z6kernelv:
  REG:40 STACK:8 SHARED:4096 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
Fatbin elf code:
================
arch = sm_90

Resource usage:
 Function _Z6kernelv:
  REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
CODE = """\
code for sm_80
arch = sm_80
		Function : _Z6kernelv
	.headerflags	@"EF_CUDA_SM80"
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
        /*0010*/              @!P0 LDG.E.128 R4, [R2.64] ;   /* 0x0000000402047981 */
        /*0020*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0030*/            @!UPT UIADD3 URZ, URZ, URZ, URZ ;
        /*0040*/                   STL.64 [R1], R4 ;
arch = sm_90
		Function : _Z6kernelv
        /*0000*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
"""


def test_read():
    facts = read(RESOURCES, CODE)
    assert set(facts) == {("_Z6kernelv", "sm_80"), ("_Z6kernelv", "sm_90")}
    old, new = facts.values()
    assert (old.registers, old.stack, old.shared) == (40, 8, 4096)
    assert old.instructions == Counter(["MOV", "LDG", "HMMA", "UIADD3", "STL"])
    assert new.instructions == Counter(["HMMA"])


def test_names():
    name = "void fastformer::(anonymous namespace)::finish_kernel<__nv_bfloat16>(fastformer::FinishArgs)"
    assert short(name) == "finish_kernel<bf16>"
    tile = "fastformer::(anonymous namespace)::Tile<128, 128, 2, 4>"
    product = (
        f"void fastformer::(anonymous namespace)::matmul_kernel<__half, {tile}, true, false>(fastformer::MatmulArgs)"
    )
    assert short(product) == "matmul_kernel<f16, Tile<128, 128, 2, 4>, true, false>"
    assert launch_of(short(product)) == (256, 69632)
    assert launch_of("unknown_kernel") == (0, 0)
    hopper = "void fastformer::(anonymous namespace)::matmul_hopper_kernel<__half, "
    hopper += (
        "fastformer::(anonymous namespace)::HopperTile<256>, true, false>(fastformer::MatmulArgs, CUtensorMap_st, "
    )
    assert short(hopper + "CUtensorMap_st)") == "matmul_hopper_kernel<f16, HopperTile<256>, true, false>"
    assert launch_of(short(hopper + "CUtensorMap_st)")) == (384, 196672)


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(
    ("name", "dtype"), [("float", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)]
)
def test_launches_of_attention(sim, name, dtype, size):
    """The table says how the kernels are launched."""
    q = torch.ones(1, 1, 3, size, dtype=dtype)
    raw, options = torch.ops.fastformer_cuda, (0.0, None, False, 1.0, -1, -1)
    output, lse = raw.scaled_dot_product_attention(q, q, q, None, *options)
    raw.scaled_dot_product_attention_backward(q, q, q, q, None, output, lse, *options)
    launches = {launch.kernel.split()[1].removeprefix("attention_"): launch for launch in sim.launches()}
    for kernel in ("forward", "grad_key_value", "grad_query"):
        launch = launches[kernel]
        threads, shared_bytes = launch_of(f"attention::{kernel}_kernel<{name}, {size}>")
        assert (launch.block[0], launch.shared_bytes) == (threads, shared_bytes), kernel


BUDGET = {"registers": 128, "shared": 1024, "warps": 16, "instructions": ["HMMA"]}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"registers": 129}, "registers: 129, at most 128 allowed"),
        ({"shared": 1025}, "shared: 1025, at most 1024 allowed"),
        ({"warps": 12}, "warps: 12, at least 16 wanted"),
        ({"stack": 8}, "8 bytes of stack"),
        ({"instructions": Counter(HMMA=1, LDL=2, STL=1)}, "3 loads and stores of local memory"),
        ({"instructions": Counter(HMMA=1, WARPGROUP=2)}, "2 waits of wgmma, at most 0 allowed"),
        ({"instructions": Counter(FFMA=1)}, "no HMMA any more"),
    ],
)
def test_faults(change, fault):
    given = {"registers": 128, "stack": 0, "shared": 1024, "threads": 256, "instructions": Counter(HMMA=1), "warps": 16}
    facts = Facts(**given | change)
    assert faults(facts, BUDGET) == ([fault] if fault else [])
    assert faults(facts, None)[-1] == "no budget"
