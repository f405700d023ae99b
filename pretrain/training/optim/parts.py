"""The parts of weights that each rank of ZeRO holds, and what a rule does that needs whole weights."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 26  # about the most numbers of matrices that a rank computes with at once


@dataclass(frozen=True)
class Part:
    """A run of numbers of one weight in a flat tensor of the optimizer."""

    weight: int  # the number of the weight in the model
    shape: tuple[int, ...]  # of the whole weight
    start: int  # its first number in the whole weight
    size: int
    at: int  # its first number in the flat tensor

    @property
    def numbers(self) -> int:
        """The count of numbers of the whole weight."""
        return math.prod(self.shape)

    @property
    def rows(self) -> tuple[int, int]:
        """The first row of the matrix that it has numbers of, and the row after the last."""
        width = self.shape[1]
        return self.start // width, (self.start + self.size - 1) // width + 1

    @property
    def sizes(self) -> tuple[int, int]:
        """The count of its numbers, and of its rows."""
        first, last = self.rows
        return self.size, last - first


def whole(weight: Tensor, number: int) -> list[list[Part]]:
    """The parts of a weight that is whole: one."""
    return [[Part(number, tuple(weight.shape), 0, weight.numel(), 0)]]


class Placed:
    """An optimizer of PyTorch whose rule needs whole weights derives from this class, too.

    Under ZeRO a tensor of the optimizer is flat and holds parts of many weights. The engine then says which.
    """

    _parts: Mapping[Tensor, list[list[Part]]] = {}
    _rank = 0

    def place(self, parts: Mapping[Tensor, list[list[Part]]], rank: int) -> None:
        """Set the parts of weights that each tensor holds, on every rank."""
        self._parts, self._rank = parts, rank

    def parts_of(self, tensor: Tensor, number: int) -> list[list[Part]]:
        """The parts that `tensor` holds, by rank. If it is a whole weight, `number` is the number of the weight."""
        return self._parts.get(tensor) or whole(tensor, number)


def sums(values: list[Tensor], parts: list[list[list[Part]]], rank: int) -> dict[int, Tensor]:
    """The sum of the numbers of each weight in flat tensors; a collective, if there are several ranks.

    `parts` lists, for each tensor, the parts of each rank. A sum is a tensor of one number, in fp64.
    """
    weights = sorted({part.weight for ranks in parts for held in ranks for part in held})
    found = torch.zeros(len(weights), dtype=torch.float64, device=values[0].device)
    places = {weight: place for place, weight in enumerate(weights)}
    for flat, ranks in zip(values, parts, strict=True):
        for part in ranks[rank]:
            found[places[part.weight]] += flat[part.at : part.at + part.size].sum(dtype=torch.float64)
    if len(parts[0]) > 1:
        summed = found.to(wire(found))
        torch.distributed.all_reduce(summed)
        found = summed.to(found.device)
    return dict(zip(weights, found, strict=True))


# An update of matrices (m, n), whose rows have a number each: the new matrices, and the new numbers of their rows.
Update = Callable[[list[Tensor], list[Tensor]], tuple[list[Tensor], list[Tensor]]]


@dataclass(frozen=True)
class Held:
    """Two flat tensors with the numbers of parts of weights. `of_rows` has one number at all places of a row."""

    values: Tensor
    of_rows: Tensor
    parts: list[list[Part]]  # of each rank


def by_matrix(every: list[Held], rank: int, update: Update) -> None:
    """Apply `update` to the whole matrices whose parts lie in the tensors of `every`, in place.

    A matrix that lies on one rank is updated there. The parts of any other are sent to one of the ranks, and come back
    updated; a collective, if there are such matrices.
    """
    holders = [_holders(held) for held in every]
    alone = [
        (held, part)
        for held, ranks in zip(every, holders, strict=True)
        for part in held.parts[rank]
        if len(ranks[part.weight]) == 1
    ]
    for some in _chunks(alone, [part.numbers for _, part in alone], 1):
        matrices = [held.values[part.at : part.at + part.size].view(part.shape) for held, part in some]
        rows = [held.of_rows[part.at : part.at + part.size].view(part.shape)[:, 0] for held, part in some]
        for (held, part), matrix, row in zip(some, *update(matrices, rows), strict=True):
            _set(held, part, matrix.flatten(), row)
    for held, ranks in zip(every, holders, strict=True):
        split = sorted(weight for weight, found in ranks.items() if len(found) > 1)
        shapes = {part.weight: part.shape for parts in held.parts for part in parts}
        for weights in _chunks(split, [math.prod(shapes[weight]) for weight in split], len(held.parts)):
            chosen = [[part for part in parts if part.weight in weights] for parts in held.parts]
            _together(
                Held(held.values, held.of_rows, chosen), {weight: shapes[weight] for weight in weights}, rank, update
            )


def _holders(held: Held) -> dict[int, set[int]]:
    """The ranks that have parts of each weight."""
    found: dict[int, set[int]] = {}
    for rank, parts in enumerate(held.parts):
        for part in parts:
            found.setdefault(part.weight, set()).add(rank)
    return found


def _chunks(matrices: Sequence, sizes: list[int], ranks: int) -> Iterator[list]:
    """The matrices in groups of at most `ranks` times CHUNK numbers, but at least one matrix for each rank."""
    group: list = []
    numbers = 0
    for matrix, size in zip(matrices, sizes, strict=True):
        if len(group) >= ranks and numbers + size > ranks * CHUNK:
            yield group
            group, numbers = [], 0
        group.append(matrix)
        numbers += size
    if group:
        yield group


def _set(held: Held, part: Part, numbers: Tensor, rows: Tensor) -> None:
    """Write the numbers of `part`, and the number of each of its rows to all places of the row."""
    width, place = part.shape[1], slice(part.at, part.at + part.size)
    begin = part.start - part.rows[0] * width
    held.values[place] = numbers
    held.of_rows[place] = rows.repeat_interleave(width)[begin : begin + part.size]


def _together(held: Held, shapes: dict[int, tuple[int, ...]], rank: int, update: Update) -> None:
    """Update matrices whose parts lie on several ranks: each on one rank, which gets the parts and returns them."""
    ranks = range(len(held.parts))
    largest = sorted(shapes, key=lambda weight: (-math.prod(shapes[weight]), weight))
    doers = {weight: number % len(ranks) for number, weight in enumerate(largest)}
    mine = [[part for part in held.parts[rank] if doers[part.weight] == other] for other in ranks]  # by who updates it
    theirs = [[part for part in held.parts[other] if doers[part.weight] == rank] for other in ranks]
    sent = [
        tensor
        for parts in mine
        for part in parts
        for tensor in (held.values[part.at : part.at + part.size], _of_rows(held.of_rows, part))
    ]
    received = _exchanged(sent, mine, theirs, held.values)
    matrices = {weight: held.values.new_empty(shapes[weight]) for weight in shapes if doers[weight] == rank}
    rows = {weight: held.values.new_empty(shapes[weight][0]) for weight in matrices}
    for part, numbers, row in received:
        matrices[part.weight].view(-1)[part.start : part.start + part.size] = numbers
        rows[part.weight][slice(*part.rows)] = row
    done = dict(zip(matrices, zip(*update(list(matrices.values()), list(rows.values())), strict=True), strict=True))
    returned = []
    for part, _, _ in received:
        matrix, row = done[part.weight]
        returned += [matrix.reshape(-1)[part.start : part.start + part.size], row[slice(*part.rows)]]
    for part, numbers, row in _exchanged(returned, theirs, mine, held.values):
        _set(held, part, numbers, row)


def _of_rows(of_rows: Tensor, part: Part) -> Tensor:
    """The number of each row that `part` has numbers of."""
    first, last = part.rows
    places = [max(row * part.shape[1], part.start) - part.start + part.at for row in range(first, last)]
    return of_rows[torch.tensor(places, device=of_rows.device)]


def _exchanged(
    sent: list[Tensor], to: list[list[Part]], of: list[list[Part]], like: Tensor
) -> list[tuple[Part, Tensor, Tensor]]:
    """Send numbers and rows of the parts `to[r]` to each rank r, and return those of `of[r]`; a collective."""
    device = wire(like)
    out = torch.cat(sent).to(device) if sent else like.new_empty(0, device=device)
    sizes = [[size for part in parts for size in part.sizes] for parts in of]
    received = like.new_empty(sum(map(sum, sizes)), device=device)
    lengths = [sum(size for part in parts for size in part.sizes) for parts in to]
    torch.distributed.all_to_all_single(received, out, [sum(each) for each in sizes], lengths)
    pieces = received.to(like.device).split([size for each in sizes for size in each])
    parts = [part for every in of for part in every]
    return list(zip(parts, pieces[::2], pieces[1::2], strict=True))


def wire(tensor: Tensor) -> torch.device:
    """The device that a tensor is sent from: with NCCL the GPU, even if the tensor was offloaded to the CPU."""
    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else tensor.device
