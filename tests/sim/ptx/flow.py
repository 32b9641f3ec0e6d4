"""Basic blocks, and an order of them in which threads that went apart meet again.

Of the groups of threads that stand at different blocks, the one at the first block in this order runs. The order is a
weak topological one (Bourdoncle 1993): a block comes after all that lead to it, loops are contiguous, and what follows
a loop comes after all of it. So threads wait where paths join, and behind a loop for those that are still in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .parse import Instruction, Kernel, PtxError, Symbol

BARRIERS = ("bar.sync", "bar.arrive", "barrier.sync", "barrier.arrive")


@dataclass
class Block:
    """Instructions that run one after the other; `end`: a branch, ret or barrier, if that is what comes last."""

    body: list[Instruction]
    end: Instruction | None
    target: int | None = None  # place in the order of the block that a taken branch leads to
    following: int | None = None  # of the next in the text
    loops: tuple[int, ...] = ()  # the heads of the loops that it is in, the outermost first
    successors: list[int] = field(default_factory=list)


def is_end(instruction: Instruction) -> bool:
    name = instruction.opcode.split(".")[0]
    return name in ("bra", "ret", "exit") or instruction.opcode in BARRIERS


def blocks_of(kernel: Kernel) -> list[Block]:
    """In order, the first at 0."""
    if not kernel.instructions or not is_end(kernel.instructions[-1]):
        raise PtxError(f"{kernel.name} does not end with ret or a branch")
    starts = {0, *kernel.labels.values()}
    starts |= {i + 1 for i, instruction in enumerate(kernel.instructions) if is_end(instruction)}
    starts = sorted(start for start in starts if start < len(kernel.instructions))
    number = {start: i for i, start in enumerate(starts)}  # in the text
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(kernel.instructions)], strict=True):
        body = kernel.instructions[start:stop]
        end = body.pop() if is_end(body[-1]) else None
        block = Block(body, end)
        if end is not None and end.opcode in ("bra", "bra.uni"):
            (target,) = end.operands
            if not isinstance(target, Symbol) or target.name not in kernel.labels:
                raise PtxError(f"{end}: no such label")
            if kernel.labels[target.name] not in number:
                raise PtxError(f"{end}: a label at the end of the kernel")
            block.target = number[kernel.labels[target.name]]
        elif end is not None and end.opcode not in ("ret", "exit", *BARRIERS):
            raise PtxError(f"{end}: {end.opcode} is not known")
        if end is None or end.guard is not None or end.opcode in BARRIERS:
            block.following = number.get(stop)
            if block.following is None:
                raise PtxError(f"{kernel.name} runs past its end")
        block.successors = [n for n in (block.target, block.following) if n is not None]
        blocks.append(block)
    order: list[int] = []
    _arrange(blocks, set(range(len(blocks))), [0], order, ())
    place = {n: i for i, n in enumerate(order)}
    for block in blocks:
        block.target = place.get(block.target)
        block.following = place.get(block.following)
    return [blocks[n] for n in order]


def _arrange(
    blocks: list[Block], inside: set[int], entries: list[int], order: list[int], loops: tuple[int, ...]
) -> None:
    """Appends the blocks of `inside` that `entries` reach."""
    for component in _components(blocks, inside, entries):
        first = component[-1]  # the one that was met first: the head of a loop
        blocks[first].loops = loops
        if len(component) == 1 and first not in blocks[first].successors:
            order.append(first)
            continue
        blocks[first].loops = (*loops, first)
        order.append(first)
        rest = set(component) - {first}
        _arrange(blocks, rest, [n for n in blocks[first].successors if n in rest], order, (*loops, first))


def _components(blocks: list[Block], inside: set[int], entries: list[int]) -> list[list[int]]:
    """Tarjan's strongly connected components, in topological order; the last of each was met first."""
    index: dict[int, int] = {}
    low: dict[int, int] = {}
    on_stack: set[int] = set()
    stack: list[int] = []
    found: list[list[int]] = []
    for entry in entries:
        if entry in index:
            continue
        work = [(entry, iter(blocks[entry].successors))]
        index[entry] = low[entry] = len(index)
        stack.append(entry)
        on_stack.add(entry)
        while work:
            node, successors = work[-1]
            for successor in successors:
                if successor not in inside:
                    continue
                if successor not in index:
                    index[successor] = low[successor] = len(index)
                    stack.append(successor)
                    on_stack.add(successor)
                    work.append((successor, iter(blocks[successor].successors)))
                    break
                if successor in on_stack:
                    low[node] = min(low[node], index[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = []
                    while not component or component[-1] != node:
                        component.append(stack.pop())
                        on_stack.discard(component[-1])
                    found.append(component)
    return found[::-1]
