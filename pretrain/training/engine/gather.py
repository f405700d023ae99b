"""Whole tensors of a state for the ranks that write them. Under ZeRO the parts of a tensor lie on several ranks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.training.optim.parts import wire

ROUND = 1 << 24  # numbers that the ranks exchange at once; a larger tensor is a round of its own

Key = tuple[str, str]  # the kind of a tensor ("weights" or a state of the optimizer), and the name of its weight
Held = Callable[[str, str], Tensor]  # the kind and the name → the numbers of the tensor that this rank holds, flat
Runs = Mapping[str, Sequence[slice]]  # by the name of a weight: the numbers of the flat weight that each rank holds


@dataclass(frozen=True)
class Wanted:
    """A tensor, and the rank that wants the whole of it."""

    kind: str
    name: str
    rank: int


def copy_whole(wanted: Sequence[Wanted], into: Mapping[Key, Tensor], held: Held, rank: int) -> None:
    """Copy the tensors that this rank wants into flat fp32 tensors on the CPU. Every rank holds whole tensors."""
    for one in wanted:
        if one.rank == rank:
            into[one.kind, one.name].copy_(held(one.kind, one.name))


def copy_parts(wanted: Sequence[Wanted], into: Mapping[Key, Tensor], held: Held, runs: Runs, rank: int) -> None:
    """As `copy_whole`, if every rank holds only its run of each tensor; a collective.

    A rank sends its run to the rank that wants the tensor, and to no other. Between two ranks on two busy cores 1.5 GB
    took 0.3 s this way, and 0.7 to 1.4 s with `all_to_all`, which needs a copy before and after.
    """
    net = torch.distributed
    for together in _rounds(wanted, runs):
        operations, received = [], []
        for number, one in enumerate(together):
            for other, run in enumerate(runs[one.name]):
                if not _size(run) or other == one.rank or rank not in (other, one.rank):
                    continue
                mine = held(one.kind, one.name)
                if rank == other:
                    operations.append(net.P2POp(net.isend, mine.to(wire(mine)), one.rank, tag=number))
                    continue
                place = into[one.kind, one.name][run]
                buffer = place if wire(mine) == place.device else torch.empty_like(place, device=wire(mine))
                received.append((place, buffer))
                operations.append(net.P2POp(net.irecv, buffer, other, tag=number))
        works = net.batch_isend_irecv(operations) if operations else []
        for one in together:
            if one.rank == rank:
                into[one.kind, one.name][runs[one.name][rank]].copy_(held(one.kind, one.name))
        for work in works:
            work.wait()
        for place, buffer in received:
            if buffer is not place:
                place.copy_(buffer)


def _rounds(wanted: Sequence[Wanted], runs: Runs) -> Iterator[list[Wanted]]:
    """Divide the tensors into rounds of up to ROUND numbers, in their order."""
    together: list[Wanted] = []
    numbers = 0
    for one in wanted:
        size = sum(map(_size, runs[one.name]))
        if together and numbers + size > ROUND:
            yield together
            together, numbers = [], 0
        together.append(one)
        numbers += size
    if together:
        yield together


def _size(run: slice) -> int:
    return run.stop - run.start
