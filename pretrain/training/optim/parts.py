"""Where the parts of each weight lie that the ranks of ZeRO hold, and rules that need whole weights in spite of it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

CHUNK = 1 << 26  # the most numbers of matrices that are gathered at once; a larger matrix is gathered alone


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


def whole(weight: Tensor, number: int = 0) -> list[list[Part]]:
    """The parts of a weight that is whole: one."""
    return [[Part(number, tuple(weight.shape), 0, weight.numel(), 0)]]


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
        torch.distributed.all_reduce(found)
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

    A matrix that lies on one rank is updated there. The others are gathered, and each is updated by one of the ranks;
    a collective, if there are any.
    """
    holders = [_holders(held) for held in every]
    alone = [
        (held, part)
        for held, ranks in zip(every, holders, strict=True)
        for part in held.parts[rank]
        if len(ranks[part.weight]) == 1
    ]
    matrices = [held.values[part.at : part.at + part.size].view(part.shape) for held, part in alone]
    rows = [held.of_rows[part.at : part.at + part.size].view(part.shape)[:, 0] for held, part in alone]
    for (held, part), matrix, row in zip(alone, *update(matrices, rows), strict=True):
        _set(held, part, matrix, row)
    for held, ranks in zip(every, holders, strict=True):
        split = sorted(weight for weight, found in ranks.items() if len(found) > 1)
        shapes = {part.weight: part.shape for parts in held.parts for part in parts}
        for weights in _chunks(split, shapes):
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


def _set(held: Held, part: Part, matrix: Tensor, row: Tensor) -> None:
    """Write the numbers of `part` from the whole matrix (m, n) and the numbers (m,) of its rows."""
    first, last = part.rows
    begin, place = part.start - first * part.shape[1], slice(part.at, part.at + part.size)
    held.values[place] = matrix.flatten()[part.start : part.start + part.size]
    held.of_rows[place] = row[first:last].repeat_interleave(part.shape[1])[begin : begin + part.size]


def _chunks(weights: Sequence[int], shapes: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """The weights in groups of about CHUNK numbers, in order."""
    ends = accumulate(math.prod(shapes[weight]) for weight in weights)
    numbered = [(end // CHUNK, weight) for end, weight in zip(ends, weights, strict=True)]
    return [[weight for _, weight in group] for _, group in groupby(numbered, key=lambda pair: pair[0])]


def _together(held: Held, shapes: dict[int, tuple[int, ...]], rank: int, update: Update) -> None:
    """Update matrices that lie on several ranks: gather the parts, update on one rank each, and gather the results."""
    mine, ranks = held.parts[rank], len(held.parts)
    sizes = [[part.size for part in parts] + [part.rows[1] - part.rows[0] for part in parts] for parts in held.parts]
    sent = [held.values[part.at : part.at + part.size] for part in mine] + [
        _of_rows(held.of_rows, part) for part in mine
    ]
    doers = {weight: number % ranks for number, weight in enumerate(shapes)}
    matrices = {weight: held.values.new_empty(shapes[weight]) for weight, doer in doers.items() if doer == rank}
    rows = {weight: held.values.new_empty(shapes[weight][0]) for weight in matrices}
    for parts, pieces in zip(held.parts, _gathered(sent, sizes, held.values), strict=True):
        for part, numbers, row in zip(parts, pieces[: len(parts)], pieces[len(parts) :], strict=True):
            if part.weight in matrices:
                matrices[part.weight].view(-1)[part.start : part.start + part.size] = numbers
                rows[part.weight][part.rows[0] : part.rows[1]] = row
    done, done_rows = update(list(matrices.values()), list(rows.values()))

    doing = [[weight for weight in shapes if doers[weight] == number] for number in range(ranks)]
    sizes = [
        [size for weight in weights for size in (math.prod(shapes[weight]), shapes[weight][0])] for weights in doing
    ]
    sent = [numbers.flatten() for both in zip(done, done_rows, strict=True) for numbers in both]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for weights, pieces in zip(doing, _gathered(sent, sizes, held.values), strict=True):
        found |= dict(zip(weights, zip(pieces[::2], pieces[1::2], strict=True), strict=True))
    for part in mine:
        _set(held, part, *found[part.weight])


def _of_rows(of_rows: Tensor, part: Part) -> Tensor:
    """The number of each row that `part` has numbers of."""
    first, last = part.rows
    places = [max(row * part.shape[1], part.start) - part.start + part.at for row in range(first, last)]
    return of_rows[torch.tensor(places, device=of_rows.device)]


def _gathered(sent: list[Tensor], sizes: list[list[int]], like: Tensor) -> list[tuple[Tensor, ...]]:
    """The tensors that each rank sends, in the order of ranks. `sizes` has the numbers of each."""
    numbers = like.new_zeros(max(map(sum, sizes)))
    if sent:
        torch.cat(sent, out=numbers[: sum(map(torch.numel, sent))])
    received = [torch.empty_like(numbers) for _ in sizes]
    torch.distributed.all_gather(received, numbers)
    return [all_[: sum(size)].split(size) for all_, size in zip(received, sizes, strict=True)]
