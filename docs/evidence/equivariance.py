"""Ranks of equivariant layers beside published ones, and a network that commutes with the Rubik's cube group.

**Ranks.** A linear layer that commutes with a finite group has so many values to learn; ``patterns.equivariant`` finds
them as orbits. The first table has them beside

- Maron et al., 2019 (https://arxiv.org/abs/1812.09902): 2, 5 and 15 for permutations of n things, from vectors to
  vectors, from matrices to vectors, and from matrices to matrices, whatever n is; in general a Bell number;
- what EMLP prints in its own introduction (Finzi et al., 2021, https://arxiv.org/abs/2104.09459;
  docs/notebooks/1quickstart.ipynb of https://github.com/mfinzi/equivariant-MLP), which solves linear equations for
  them: bases of 6, 15, 7 and 84 000 elements. The last one is a layer of 1420 x 1420 entries.

Where a group is small enough to be listed, Burnside's lemma counts the same rank from nothing but traces.

**The cube.** A quarter turn of a face permutes the 48 stickers that are not in the middle of a face; the six turns
generate a group of 4.3e19 elements. A network of two layers reads the colours of all stickers, and says for each of
them which colour the next sticker on the same piece has. A turn keeps pieces together, so the task commutes with the
group; with ties the network does, too. Whoever commutes with the group and is right about the solved cube is right
about all cubes: the network is trained on the solved cube alone, and tested on scrambled ones. There is no published
number for this; the rank of a layer from stickers to stickers, 9, is counted by hand in a comment.

Run it as ``python equivariance.py``. It needs scipy and takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from tieopt import TiedOptimizer, patterns

# A group is a list of generators: each says for every place from which one its entry comes.
Generators = Sequence[Tensor]

# --- ranks ---


def symmetric_group(n: int) -> Generators:
    """Return a swap and a rotation, which generate all permutations of n things."""
    return [torch.tensor([1, 0, *range(2, n)]), torch.arange(n).roll(1)]


def on_tensors(generators: Generators, order: int) -> Generators:
    """Return how the generators act on tensors of an order, flattened."""
    images = []
    for permutation in generators:
        entries = torch.arange(len(permutation) ** order).view([len(permutation)] * order)
        for dim in range(order):
            entries = entries.index_select(dim, permutation)
        images.append(entries.flatten())
    return images


def copies(generators: Generators, counts: Sequence[int]) -> Generators:
    """Return how the generators act on so many scalars, so many vectors, so many matrices ..., side by side."""
    images = []
    for number in range(len(generators)):
        blocks, size = [], 0
        for order, count in enumerate(counts):
            image = on_tensors(generators, order)[number]
            blocks += [image + size + copy * len(image) for copy in range(count)]
            size += count * len(image)
        images.append(torch.cat(blocks))
    return images


def rank(inputs: Generators, outputs: Generators) -> int:
    """Return how many values are left of a layer that commutes with the group."""
    labels, _ = patterns.equivariant(inputs, outputs)
    return len(labels.unique())


def burnside(inputs: Generators, outputs: Generators) -> int:
    """Return the rank by Burnside's lemma: the mean, over the group, of the product of both traces."""
    generators = [torch.cat([i, o + len(i)]) for i, o in zip(inputs, outputs, strict=True)]
    elements, new = set(), [tuple(range(len(generators[0])))]
    while new:
        element = new.pop()
        if element not in elements:
            elements.add(element)
            new += [tuple(torch.tensor(element)[generator].tolist()) for generator in generators]
    size = len(inputs[0])
    fixed = [[place == image for place, image in enumerate(element)] for element in elements]
    total = sum(sum(places[:size]) * sum(places[size:]) for places in fixed)
    assert total % len(elements) == 0
    return total // len(elements)


def print_ranks() -> None:
    """Print ranks by tieopt, by Burnside's lemma where the group can be listed, and as published."""
    # Quarter turns of a die, as permutations of its faces.
    die = [torch.tensor([0, 1, 4, 5, 3, 2]), torch.tensor([4, 5, 2, 3, 1, 0])]
    cases: list[tuple[str, Generators, Sequence[int], Sequence[int], int | None, str]] = [
        *(
            (f"S_{n}: {name}", symmetric_group(n), counts_in, counts_out, published, "Maron et al.")
            for n in (4, 5, 10)
            for name, counts_in, counts_out, published in [
                ("vector to vector", (0, 1), (0, 1), 2),
                ("matrix to vector", (0, 0, 1), (0, 1), 5),
                ("matrix to matrix", (0, 0, 1), (0, 0, 1), 15),
            ]
        ),
        ("S_6: 3 indices to 2", symmetric_group(6), (0, 0, 0, 1), (0, 0, 1), 52, "Bell number"),
        ("Z_6: vector to vector", [torch.arange(6).roll(1)], (0, 1), (0, 1), 6, "EMLP"),
        ("S_6: matrix to matrix", symmetric_group(6), (0, 0, 1), (0, 0, 1), 15, "EMLP"),
        ("S_6: vector and matrix to vector", symmetric_group(6), (0, 1, 1), (0, 1), 7, "EMLP"),
        ("S_6: 100, 100, 20 to the same", symmetric_group(6), (100, 100, 20), (100, 100, 20), 84_000, "EMLP"),
        ("die: faces to faces", die, (0, 1), (0, 1), None, ""),
        ("die: pairs of faces to faces", die, (0, 0, 1), (0, 1), None, ""),
    ]
    print(f"{'group: from and to':34s}{'entries':>10s}{'tieopt':>8s}{'Burnside':>10s}{'published':>11s}")
    for name, generators, counts_in, counts_out, published, source in cases:
        inputs, outputs = copies(generators, counts_in), copies(generators, counts_out)
        entries, found = len(inputs[0]) * len(outputs[0]), rank(inputs, outputs)
        counted = burnside(inputs, outputs) if len(generators[0]) <= 6 and entries < 10**5 else None
        known = f"{'' if published is None else published:>11}  {source}".rstrip()
        print(f"{name:34s}{entries:10d}{found:8d}{'' if counted is None else counted:>10}{known}")
        assert {found} >= {number for number in (published, counted) if number is not None}


# --- the cube ---

COLOURS, HIDDEN, STEPS, SCRAMBLED, MOVES = 6, 3, 150, 1000, 100

Sticker = tuple[tuple[int, ...], int]


def stickers() -> list[Sticker]:
    """Return the 48 stickers that a turn can move: the place of its piece, and along which axis it looks."""
    pieces = [piece for piece in product((-1, 0, 1), repeat=3) if sum(map(abs, piece)) > 1]
    return [(piece, axis) for piece in pieces for axis in range(3) if piece[axis]]


def as_permutation(image: Callable[[Sticker], Sticker]) -> Tensor:
    """Return the numbers of the images of all stickers."""
    numbers = {sticker: number for number, sticker in enumerate(stickers())}
    return torch.tensor([numbers[image(sticker)] for sticker in stickers()])


def quarter_turn(axis: int, side: int) -> Tensor:
    """Return the quarter turn of a face."""
    first, second = (axis + 1) % 3, (axis + 2) % 3

    def image(sticker: Sticker) -> Sticker:
        piece, facing = sticker
        if piece[axis] != side:
            return sticker
        moved = list(piece)
        moved[first], moved[second] = -piece[second], piece[first]
        return tuple(moved), {first: second, second: first}.get(facing, facing)

    return as_permutation(image)


def next_on_the_piece(sticker: Sticker) -> Sticker:
    """Return the next sticker of a piece, in the same sense of rotation on every piece."""
    piece, facing = sticker
    axes = [axis for axis in range(3) if piece[axis]]
    # Seen from outside, the axes of a corner follow each other in one sense or in the other.
    forward = piece[0] * piece[1] * piece[2] >= 0
    return piece, axes[(axes.index(facing) + (1 if forward else -1)) % len(axes)]


def scrambled_cubes(turns: Generators) -> Tensor:
    """Return permutations of the stickers by random turns, a row for each cube."""
    generator = torch.Generator().manual_seed(1)
    cubes = torch.arange(48).repeat(SCRAMBLED, 1)
    for _ in range(MOVES):
        chosen = torch.stack(list(turns))[torch.randint(len(turns), (SCRAMBLED,), generator=generator)]
        cubes = cubes.gather(1, chosen)
    return cubes


def with_channels(permutation: Tensor, channels: int) -> Tensor:
    """Return how a permutation of stickers acts on ``[sticker, channel]``, flattened."""
    return torch.arange(len(permutation) * channels).view(-1, channels)[permutation].flatten()


def network(turns: Generators, *, tied: bool) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """Return two layers from the colours of the stickers to scores of the colours next to them, and their optimizer."""
    torch.manual_seed(0)
    sizes = (COLOURS, HIDDEN * COLOURS, COLOURS)
    layers = [nn.Linear(48 * size_in, 48 * size_out) for size_in, size_out in pairwise(sizes)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1]).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if not tied:
        return model, optimizer
    ties = {}
    for layer, (size_in, size_out) in zip(layers, pairwise(sizes), strict=True):
        inputs, outputs = ([with_channels(turn, size) for turn in turns] for size in (size_in, size_out))
        # Permutations without signs give scales of 1.
        ties[layer.weight], _ = patterns.equivariant(inputs, outputs)
        ties[layer.bias], _ = patterns.equivariant(None, outputs)
    # Means of many random numbers would be nearly zero.
    return model, TiedOptimizer(optimizer, ties, reduction="sum", compact=True, start="first")


def scores(model: nn.Module, colours: Tensor) -> Tensor:
    """Return the scores ``[cube, sticker, colour]`` of cubes whose stickers have these colours."""
    inputs = nn.functional.one_hot(colours, COLOURS).double().flatten(1)
    return model(inputs).view(-1, 48, COLOURS)


def is_equivariant(layer: nn.Linear, turns: Generators) -> bool:
    """Whether all turns of the inputs and outputs leave the weight and the bias as they are, bit for bit."""
    weight, bias = layer.weight.detach().view(48, -1, 48, layer.in_features // 48), layer.bias.detach().view(48, -1)
    return all(torch.equal(weight[turn][:, :, turn], weight) and torch.equal(bias[turn], bias) for turn in turns)


def print_cube() -> None:
    """Train with ties and without, and print how many stickers are right and what is equivariant."""
    turns = [quarter_turn(axis, side) for axis, side in product(range(3), (-1, 1))]
    following = as_permutation(next_on_the_piece)
    assert all(torch.equal(following[turn], turn[following]) for turn in turns)
    # Pairs of stickers of corners have four orbits: the same sticker, the next one of its corner, the one after that,
    # and those of other corners. Pairs of stickers of edges have three, and corners with edges one, either way.
    assert rank(turns, turns) == 4 + 3 + 1 + 1
    # The colour of a sticker of the solved cube is that of its face.
    solved = torch.tensor([[2 * axis + (piece[axis] > 0) for piece, axis in stickers()]])
    cubes = scrambled_cubes(turns)
    scrambled = solved[0][cubes]

    columns = f"{'entries':>9s}{'values':>8s}{'solved cube':>13s}{'scrambled':>11s}{'differ by':>11s}"
    print(f"\nStickers whose neighbour is read correctly\n{'':14s}{columns}")
    for tied in (True, False):
        model, optimizer = network(turns, tied=tied)
        for _ in range(STEPS):
            optimizer.zero_grad()
            nn.functional.cross_entropy(scores(model, solved)[0], solved[0][following]).backward()
            optimizer.step()
        with torch.no_grad():
            of_solved, of_scrambled = scores(model, solved), scores(model, scrambled)
        right = [
            (found.argmax(dim=2) == colours[:, following]).double().mean().item()
            for found, colours in ((of_solved, solved), (of_scrambled, scrambled))
        ]
        # Turning the cube and turning the scores has to be the same.
        apart = (of_scrambled - of_solved[0][cubes]).abs().max().item()
        entries = sum(param.numel() for param in model.parameters())
        values = optimizer.tie_summary().distinct if isinstance(optimizer, TiedOptimizer) else entries
        name = "with ties" if tied else "without ties"
        print(f"{name:14s}{entries:9d}{values:8d}{right[0]:13.1%}{right[1]:11.1%}{apart:11.1e}")
        if tied:
            assert all(is_equivariant(layer, turns) for layer in (model[0], model[2]))
            assert right == [1, 1]
            assert apart < 1e-12
    print("'differ by': the scores of a turned cube from the turned scores of the cube, at most")
    print("With ties, all six turns leave weights and biases as they are, bit for bit.")


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    print_ranks()
    print_cube()


if __name__ == "__main__":
    main()
