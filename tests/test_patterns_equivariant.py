"""Layers that commute with a finite group, and orbits with signs: against Burnside's lemma and known ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from checks import randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tieopt import Tie, TiedOptimizer, patterns, tie_

seeds = st.integers(0, 2**20)

# What a generator does to the entries of a vector: x becomes x[permutation] * signs.
Action = tuple[Tensor, Tensor]


def as_pair(action: Tensor | Action) -> Action:
    permutation, signs = action if isinstance(action, tuple) else (action, torch.ones_like(action))
    return permutation.flatten(), signs.flatten()


def matrix(action: Tensor | Action) -> Tensor:
    """The matrix of an action, in float64."""
    permutation, signs = as_pair(action)
    return torch.eye(len(permutation), dtype=torch.float64)[permutation] * signs[:, None]


def transformed(weight: Tensor, on_input: Tensor | Action, on_output: Tensor | Action) -> Tensor:
    """A weight that equals the given one, if that commutes with the actions."""
    (columns, column_signs), (rows, row_signs) = as_pair(on_input), as_pair(on_output)
    return weight[rows][:, columns] * row_signs[:, None] * column_signs


def rank(labels: Tensor, scale: Tensor) -> int:
    return len(labels[scale != 0].unique())


def random_action(n: int, seed: int, signed: bool) -> Tensor | Action:
    """A permutation that moves about half of the entries, so that there are several orbits."""
    generator = torch.Generator().manual_seed(seed)
    permutation = torch.arange(n)
    moved = torch.randperm(n, generator=generator)[: (n + 1) // 2]
    permutation[moved] = moved[torch.randperm(len(moved), generator=generator)]
    signs = torch.tensor([1, 1, -1])[torch.randint(3, (n,), generator=generator)]
    return (permutation, signs) if signed else permutation


# --- properties ---


@given(m=st.integers(1, 6), n=st.integers(1, 6), data=st.data(), seed=seeds)
def test_any_tied_weight_and_bias_commute_and_nothing_else_does(m, n, data, seed):
    count = data.draw(st.integers(1, 3))
    signed = data.draw(st.lists(st.booleans(), min_size=2 * count, max_size=2 * count))
    inputs = [random_action(n, seed + k, signed[k]) for k in range(count)]
    outputs = [random_action(m, seed + 100 + k, signed[count + k]) for k in range(count)]

    labels, scale = patterns.equivariant(inputs, outputs)
    bias_labels, bias_scale = patterns.equivariant(None, outputs)
    weight = tie_(randn(m, n, seed=seed), labels, scale=scale)
    bias = tie_(randn(m, seed=seed), bias_labels, scale=bias_scale)

    assert labels.shape == scale.shape == (m, n)
    assert bias_labels.shape == bias_scale.shape == (m,)
    assert labels.dtype == torch.int64
    assert scale.dtype == torch.float32
    for on_input, on_output in zip(inputs, outputs, strict=True):
        assert torch.equal(transformed(weight, on_input, on_output), weight)
        assert torch.equal(transformed(bias[:, None], torch.arange(1), on_output), bias[:, None])
    # The solutions of W A - B W = 0 are a space of as many dimensions as there are shared values.
    equations = torch.cat(
        [
            torch.kron(torch.eye(m).double(), matrix(on_input).T.contiguous())
            - torch.kron(matrix(on_output), torch.eye(n).double())
            for on_input, on_output in zip(inputs, outputs, strict=True)
        ]
    )
    assert rank(labels, scale) == m * n - int(torch.linalg.matrix_rank(equations))
    assert rank(bias_labels, bias_scale) == len(bias[bias != 0].abs().unique())


@given(shape=st.lists(st.integers(1, 3), max_size=3), count=st.integers(1, 3), seed=seeds)
def test_signed_orbits_are_tied_to_the_entries_that_they_are_mapped_to(shape, count, seed):
    n = torch.Size(shape).numel()
    actions = [as_pair(random_action(n, seed + k, signed=True)) for k in range(count)]
    shaped = [(permutation.view(shape), signs.view(shape)) for permutation, signs in actions]
    before = [(permutation.clone(), signs.clone()) for permutation, signs in shaped]

    labels, scale = patterns.orbits(*shaped)
    weight = tie_(randn(n, seed=seed), labels.flatten(), scale=scale.flatten())

    assert labels.shape == scale.shape == torch.Size(shape)
    assert all(torch.equal(weight[permutation] * signs, weight) for permutation, signs in actions)
    # Signs take no entry to another orbit.
    plain = patterns.orbits(*[permutation for permutation, _ in shaped])
    assert len(torch.stack([labels.flatten(), plain.flatten()]).unique(dim=1).T) == len(plain.unique())
    assert labels.unique().tolist() == list(range(len(plain.unique())))
    for label in labels.unique():
        of_orbit = scale[labels == label]
        assert of_orbit[0] in (0, 1)
        assert (of_orbit.abs() == of_orbit[0]).all()
    for (permutation, signs), (old_permutation, old_signs) in zip(shaped, before, strict=True):
        assert torch.equal(permutation, old_permutation)
        assert torch.equal(signs, old_signs)


def test_signed_orbits_give_an_antisymmetric_matrix():
    entries = torch.arange(25).view(5, 5)
    labels, scale = patterns.orbits((entries.T, -torch.ones(5, 5)))
    expected_labels, expected_scale = patterns.antisymmetric((5, 5))
    assert torch.equal(scale, expected_scale)
    assert len(torch.stack([labels.flatten(), expected_labels.flatten()]).unique(dim=1).T) == len(labels.unique())


def test_signs_of_one_permutation_are_enough_for_scales():
    swap = torch.tensor([1, 0, 2, 3])
    labels, scale = patterns.orbits(swap, (torch.tensor([0, 1, 3, 2]), torch.tensor([1, 1, -1, -1])))
    assert labels.tolist() == [0, 0, 1, 1]
    assert scale.tolist() == [1, 1, 1, -1]


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bfloat16, torch.float64])
def test_signs_have_any_real_dtype(dtype):
    labels, scale = patterns.orbits((torch.tensor([1, 0, 2], dtype=torch.int16), torch.tensor([-1, -1, -1]).to(dtype)))
    assert labels.tolist() == [0, 0, 1]
    assert scale.tolist() == [1, -1, 0]


def test_a_bias_is_the_weight_of_one_input_that_stays():
    outputs = [(torch.tensor([1, 0, 2, 3]), torch.tensor([1, 1, -1, 1]))]
    labels, scale = patterns.equivariant(None, outputs)
    with_input = patterns.equivariant([torch.tensor([0])], outputs)
    assert torch.equal(labels[:, None], with_input[0])
    assert torch.equal(scale[:, None], with_input[1])
    assert scale.tolist() == [1, 1, 0, 1]


# --- ranks ---


def group_of(generators: Sequence[Sequence[Action]]) -> list[tuple[Action, ...]]:
    """All elements of a group, each as its actions on several spaces."""
    identity = tuple((torch.arange(len(space[0])), torch.ones(len(space[0]))) for space in generators[0])

    def key(element: Sequence[Action]) -> Any:
        return tuple((tuple(permutation.tolist()), tuple(signs.tolist())) for permutation, signs in element)

    elements, new = {key(identity): identity}, [identity]
    while new:
        element = new.pop()
        for generator in generators:
            made = tuple(
                (then[first], then_signs[first] * signs)
                for (then, then_signs), (first, signs) in zip(element, generator, strict=True)
            )
            if key(made) not in elements:
                elements[key(made)] = made
                new.append(made)
    return list(elements.values())


def burnside(inputs: Sequence[Tensor | Action], outputs: Sequence[Tensor | Action]) -> int:
    """The number of linear maps that commute with a group: the mean of the product of its two characters."""
    generators = [tuple(map(as_pair, pair)) for pair in zip(inputs, outputs, strict=True)]
    group = group_of(generators)
    traces = [[(signs * (p == torch.arange(len(p)))).sum() for p, signs in element] for element in group]
    total = sum(int(on_input * on_output) for on_input, on_output in traces)
    assert total % len(group) == 0
    return total // len(group)


def on_tensors(permutation: Tensor, order: int) -> Tensor:
    """How a permutation of n things acts on the entries of a tensor of shape [n] * order, flattened."""
    n = len(permutation)
    image = torch.zeros(1, dtype=torch.int64)
    for _ in range(order):
        image = (image[:, None] * n + permutation).flatten()
    return image


def symmetric_group(n: int) -> list[Tensor]:
    return [torch.tensor([1, 0, *range(2, n)]), torch.arange(n).roll(1)]


# Both rotate the six faces of a cube about an axis by 90 degrees.
CUBE = [torch.tensor([0, 1, 4, 5, 3, 2]), torch.tensor([4, 5, 2, 3, 1, 0])]

# Maps of tensors of one order to tensors of another: for S_n the number of partitions of so many indices, 2, 5 and 15
# for vectors and matrices (Maron et al., 2019, https://arxiv.org/abs/1812.09902). The groups are those of Finzi et al.,
# 2021, https://arxiv.org/abs/2104.09459; Z_n has n^(orders - 1), and the cube was counted by Burnside's lemma.
RANKS = {
    ("S4", 1, 0): 1,
    ("S4", 1, 1): 2,
    ("S4", 2, 1): 5,
    ("S4", 1, 2): 5,
    ("S4", 2, 2): 15,
    ("S6", 1, 0): 1,
    ("S6", 1, 1): 2,
    ("S6", 2, 1): 5,
    ("S6", 2, 2): 15,
    ("S6", 3, 2): 52,
    ("Z6", 1, 0): 1,
    ("Z6", 1, 1): 6,
    ("Z6", 2, 1): 36,
    ("Z6", 2, 2): 216,
    ("Cube", 1, 0): 1,
    ("Cube", 1, 1): 3,
    ("Cube", 2, 1): 12,
    ("Cube", 2, 2): 60,
}
GROUPS = {"S4": symmetric_group(4), "S6": symmetric_group(6), "Z6": [torch.arange(6).roll(1)], "Cube": CUBE}


@pytest.mark.parametrize(("name", "order_in", "order_out"), RANKS)
def test_ranks_of_maps_between_tensors(name, order_in, order_out):
    inputs, outputs = ([on_tensors(p, order) for p in GROUPS[name]] for order in (order_in, order_out))
    labels, scale = patterns.equivariant(inputs, outputs)

    assert (scale == 1).all()
    assert rank(labels, scale) == burnside(inputs, outputs) == RANKS[name, order_in, order_out]


def test_the_rank_does_not_depend_on_the_number_of_things():
    for n in range(4, 9):
        generators = symmetric_group(n)
        entries = torch.arange(n * n).view(n, n)
        matrices = [entries[p][:, p] for p in generators]
        assert rank(*patterns.equivariant(generators, generators)) == 2
        assert rank(*patterns.equivariant(matrices, generators)) == 5
        assert rank(*patterns.equivariant(matrices, matrices)) == 15


def rubiks_cube() -> list[Tensor]:
    """The quarter turns of the six faces, as permutations of the 48 stickers that a turn moves."""
    cubies = [cubie for cubie in product((-1, 0, 1), repeat=3) if sum(map(abs, cubie)) > 1]
    stickers = [(cubie, axis) for cubie in cubies for axis in range(3) if cubie[axis]]
    number = {sticker: index for index, sticker in enumerate(stickers)}
    turns = []
    for axis, side in product(range(3), (-1, 1)):
        first, second = (axis + 1) % 3, (axis + 2) % 3
        turn = list(range(len(stickers)))
        for (cubie, facing), index in number.items():
            if cubie[axis] == side:
                moved = list(cubie)
                moved[first], moved[second] = -cubie[second], cubie[first]
                turn[index] = number[tuple(moved), {first: second, second: first}.get(facing, facing)]
        turns.append(torch.tensor(turn))
    return turns


def test_ranks_of_rubiks_cube():
    """The group has 4.3e19 elements, so its orbits are counted by hand.

    Stickers of corners and of edges do not mix, so there are two orbits of stickers. Pairs of stickers of corners have
    four: the same sticker, the next one on that corner, the one after that, and those of other corners. Pairs of
    stickers of edges have three, and there is one of a corner and an edge, and one of an edge and a corner.
    """
    turns = rubiks_cube()
    assert len(turns) == 6
    assert rank(*patterns.equivariant(turns, turns)) == 4 + 3 + 1 + 1
    assert rank(*patterns.equivariant(None, turns)) == 2
    assert rank(*patterns.equivariant(turns, [torch.arange(1)] * 6)) == 2


def rotations_of_space() -> list[Action]:
    """The rotations of the cube on vectors of space: permutations of the axes with signs."""
    return [(torch.tensor([1, 0, 2]), torch.tensor([-1, 1, 1])), (torch.tensor([0, 2, 1]), torch.tensor([1, -1, 1]))]


def test_ranks_with_signs():
    space = rotations_of_space()
    on_matrices = [on_matrix(*action) for action in space]
    mirrored = [(torch.tensor([1, 0, 2]), torch.tensor([1, 1, -1]))]
    for inputs, outputs, expected in [
        # Rotations commute with multiples of the identity alone, and no vector is fixed.
        (space, space, 1),
        (space, [torch.arange(1)] * 2, 0),
        # Of matrices: the trace; of matrices and vectors: the cross product.
        (on_matrices, [torch.arange(1)] * 2, 1),
        (on_matrices, space, 1),
        (mirrored, mirrored, 5),
    ]:
        labels, scale = patterns.equivariant(inputs, outputs)
        assert rank(labels, scale) == burnside(inputs, outputs) == expected


def on_matrix(permutation: Tensor, signs: Tensor) -> Action:
    """How a signed permutation acts on matrices, in their shape."""
    entries = torch.arange(len(permutation) ** 2).view(len(permutation), -1)
    return entries[permutation][:, permutation], signs[:, None] * signs


# --- training ---


@pytest.mark.parametrize("compact", [False, True])
def test_a_policy_commutes_with_a_mirror_after_training(compact):
    observation = (torch.tensor([1, 0, 3, 2, 4]), torch.tensor([1, 1, -1, -1, -1]))
    hidden = torch.arange(8).flip(0)
    action = (torch.tensor([1, 0, 2]), torch.tensor([1, 1, -1]))
    torch.manual_seed(0)
    policy = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    ties = []
    for layer, inputs, outputs in [(policy[0], observation, hidden), (policy[2], hidden, action)]:
        for param, given_inputs in ((layer.weight, [inputs]), (layer.bias, None)):
            labels, scale = patterns.equivariant(given_inputs, [outputs])
            ties.append(Tie(param, labels, scale=scale))
    optimizer = TiedOptimizer(torch.optim.AdamW(policy.parameters(), lr=0.1), ties, compact=compact)
    for step in range(5):
        optimizer.zero_grad()
        policy(randn(16, 5, seed=step).double()).square().mean().backward()
        optimizer.step()

    assert torch.equal(transformed(policy[0].weight, observation, hidden), policy[0].weight)
    assert torch.equal(transformed(policy[2].weight, hidden, action), policy[2].weight)
    assert policy[2].bias[2] == 0
    x = randn(16, 5).double()
    mirrored = policy(x[:, observation[0]] * observation[1])
    torch.testing.assert_close(mirrored, policy(x)[:, action[0]] * action[1], rtol=1e-12, atol=1e-12)


# --- errors ---

SWAP = torch.tensor([1, 0])
PERMUTATION = "an integer tensor, as torch.arange(n).view(shape) rearranged, or a pair of it and its signs"


@pytest.mark.parametrize(
    ("error", "inputs", "outputs", "wrong", "expected", "got"),
    [
        (TypeError, SWAP, [SWAP], "The inputs are not a list.", None, "a tensor of shape (2,) and torch.int64"),
        (TypeError, [SWAP], SWAP, "The outputs are not a list.", None, "a tensor of shape (2,) and torch.int64"),
        (TypeError, [SWAP], None, "The outputs are not a list.", None, "None (NoneType)"),
        (ValueError, None, [], "The outputs are an empty list.", "one generator or more", "none"),
        (ValueError, [], [SWAP], "The inputs are an empty list.", "one generator or more", "none"),
        (
            ValueError,
            [SWAP],
            [SWAP, SWAP],
            "Every generator acts on the inputs and on the outputs.",
            "as many permutations of the inputs as of the outputs",
            "1 of the inputs and 2 of the outputs",
        ),
        (
            TypeError,
            [[1, 0]],
            [SWAP],
            "Permutation 0 of the inputs is not one of integers.",
            PERMUTATION,
            "[1, 0] (list)",
        ),
        (
            TypeError,
            [torch.eye(2)],
            [SWAP],
            "Permutation 0 of the inputs is not one of integers.",
            PERMUTATION,
            "a tensor of shape (2, 2) and torch.float32",
        ),
        (
            TypeError,
            [(SWAP, SWAP, SWAP)],
            [SWAP],
            "Permutation 0 of the inputs is not one of integers.",
            PERMUTATION,
            "(tensor([1, 0]), tensor([1, 0]), tensor([1, 0])) (tuple)",
        ),
        (
            ValueError,
            [SWAP, SWAP],
            [SWAP, torch.arange(3)],
            "Permutation 1 of the outputs has another shape than the first.",
            "(2,)",
            "(3,)",
        ),
        (
            ValueError,
            [SWAP],
            [torch.tensor([1, 1])],
            "Permutation 0 of the outputs is not a rearrangement.",
            "each number from 0 to 1, once",
            "1 more than once",
        ),
        (
            ValueError,
            # A list of a permutation and its signs, in place of a pair of them in a list.
            [SWAP, torch.tensor([1, -1])],
            [SWAP, SWAP],
            "Permutation 1 of the inputs is not a rearrangement.",
            "each number from 0 to 1, once",
            "-1",
        ),
        (
            TypeError,
            [(SWAP, [1, -1])],
            [SWAP],
            "The signs of permutation 0 of the inputs are not a real tensor.",
            "a tensor of 1 and -1",
            "[1, -1] (list)",
        ),
        (
            TypeError,
            [(SWAP, torch.tensor([True, False]))],
            [SWAP],
            "The signs of permutation 0 of the inputs are not a real tensor.",
            "a tensor of 1 and -1",
            "a tensor of shape (2,) and torch.bool",
        ),
        (
            ValueError,
            [(SWAP, torch.ones(1))],
            [SWAP],
            "The signs of permutation 0 of the inputs have another shape than it.",
            "(2,)",
            "(1,)",
        ),
        (
            ValueError,
            [SWAP],
            [(SWAP, torch.tensor([1.0, 0.5]))],
            "The signs of permutation 0 of the outputs are not signs.",
            "1 or -1 for each entry",
            "0.5 at position 1",
        ),
    ],
)
def test_what_is_no_generator_is_refused(error, inputs, outputs, wrong, expected, got):
    expected = expected or "a list of permutations, one for each generator of the group"
    with pytest.raises(error) as caught:
        patterns.equivariant(inputs, outputs)
    assert str(caught.value) == f"{wrong}\n  Expected: {expected}\n  Got:      {got}"


@pytest.mark.parametrize("sign", [0.0, 2.0, float("nan")])
def test_signs_of_orbits_that_are_none_are_refused(sign):
    with pytest.raises(ValueError, match="The signs of permutation 1 are not signs"):
        patterns.orbits(SWAP, (SWAP, torch.tensor([1.0, sign])))
