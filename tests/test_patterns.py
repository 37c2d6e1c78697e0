"""Patterns: each label builder against the orbits that its definition generates, entry by entry.

Every pattern says of an entry which other entries equal it. The slow reference walks from each entry to
all that it can reach so; the labels have to be that partition.
"""

import re
import sys
from itertools import product

import numpy
import pytest
import torch
from checks import bits, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tieopt import patterns

sizes = st.integers(1, 7)
seeds = st.integers(0, 2**20)
trailing = st.sampled_from([(), (3,), (3, 2)])


def orbits_of(shape, images):
    """The entries' orbits, numbered in the order of their first entries; ``images`` of an index, in range or not."""
    number = {}
    for start in product(*map(range, shape)):
        reached = [] if start in number else [start]
        name = len(set(number.values()))
        while reached:
            index = reached.pop()
            if index not in number:
                number[index] = name
                reached += [image for image in images(*index) if in_range(image, shape)]
    return torch.tensor([number[index] for index in product(*map(range, shape))]).view(shape)


def in_range(index, shape):
    return all(0 <= place < size for place, size in zip(index, shape, strict=True))


def renumbered(labels):
    """The same partition, numbered in the order of first entries."""
    names = {}
    return torch.tensor([names.setdefault(label, len(names)) for label in labels.flatten().tolist()]).view(labels.shape)


def assert_labels(labels, shape, images, groups):
    """Asserts that the labels are the orbits, in the promised form, and that there are so many."""
    assert labels.dtype == torch.int64
    assert labels.device.type == "cpu"
    assert labels.shape == torch.Size(shape)
    assert torch.equal(renumbered(labels), orbits_of(shape, images))
    assert len(labels.unique()) == groups
    # No number is left out, and there are no free entries.
    assert labels.min() == 0
    assert labels.max() == groups - 1


def expanded(labels, seed, scale=1):
    """A weight with the pattern, of random values."""
    return randn(int(labels.max()) + 1, seed=seed)[labels] * scale


# --- matrices ---


@given(n=sizes, rest=trailing, seed=seeds)
def test_symmetric(n, rest, seed):
    labels = patterns.symmetric((n, n, *rest))
    weight = expanded(labels, seed)

    assert_labels(labels, (n, n), lambda i, j: [(j, i)], n * (n + 1) // 2)
    assert torch.equal(weight, weight.T)


@given(n=sizes, rest=trailing, seed=seeds)
def test_antisymmetric(n, rest, seed):
    labels, scale = patterns.antisymmetric((n, n, *rest))
    weight = expanded(labels, seed, scale)

    assert_labels(labels, (n, n), lambda i, j: [(j, i)], n * (n - 1) // 2 + n)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, torch.ones(n, n).triu(1) - torch.ones(n, n).tril(-1))
    assert torch.equal(weight, -weight.T)
    assert weight.count_nonzero() == n * (n - 1)


@given(n=sizes, rest=trailing, seed=seeds)
def test_persymmetric(n, rest, seed):
    labels = patterns.persymmetric((n, n, *rest))
    weight = expanded(labels, seed)

    assert_labels(labels, (n, n), lambda i, j: [(n - 1 - j, n - 1 - i)], n * (n + 1) // 2)
    assert torch.equal(weight.flip(1), weight.flip(1).T)


@given(m=sizes, n=sizes, rest=trailing, seed=seeds)
def test_centrosymmetric(m, n, rest, seed):
    labels = patterns.centrosymmetric((m, n, *rest))
    weight = expanded(labels, seed)

    assert_labels(labels, (m, n), lambda i, j: [(m - 1 - i, n - 1 - j)], (m * n + 1) // 2)
    assert torch.equal(weight, weight.rot90(2))


@given(n=sizes, rest=trailing, seed=seeds)
def test_circulant(n, rest, seed):
    labels = patterns.circulant((n, n, *rest))
    weight, x = expanded(labels, seed).double(), randn(n, seed=seed + 1).double()

    assert_labels(labels, (n, n), lambda i, j: [((i + 1) % n, (j + 1) % n)], n)
    assert torch.equal(labels[0], torch.arange(n))
    # Circulant matrices are those that the Fourier transform makes diagonal.
    product_ = torch.fft.ifft(torch.fft.fft(weight[:, 0]) * torch.fft.fft(x)).real
    torch.testing.assert_close(weight @ x, product_)


@given(rows=st.integers(1, 3), columns=st.integers(1, 3), block=st.integers(1, 4), rest=trailing, seed=seeds)
def test_block_circulant(rows, columns, block, rest, seed):
    m, n = rows * block, columns * block
    labels = patterns.block_circulant((m, n, *rest), block)
    weight = expanded(labels, seed)

    def next_in_block(place):
        return place // block * block + (place + 1) % block

    assert_labels(labels, (m, n), lambda i, j: [(next_in_block(i), next_in_block(j))], m * n // block)
    for i, j in product(range(0, m, block), range(0, n, block)):
        part = weight[i : i + block, j : j + block]
        assert torch.equal(part, part.roll((1, 1), (0, 1)))


def test_one_block_is_circulant_and_blocks_of_one_are_free_of_each_other():
    assert torch.equal(patterns.block_circulant((5, 5), 5), patterns.circulant((5, 5)))
    assert torch.equal(patterns.block_circulant((2, 3), 1), torch.arange(6).view(2, 3))


@given(m=sizes, n=sizes, rest=trailing, seed=seeds)
def test_toeplitz(m, n, rest, seed):
    labels = patterns.toeplitz((m, n, *rest))
    weight = expanded(labels, seed)

    assert_labels(labels, (m, n), lambda i, j: [(i + 1, j + 1), (i - 1, j - 1)], m + n - 1)
    assert torch.equal(weight[1:, 1:], weight[:-1, :-1])


@given(m=sizes, n=sizes, rest=trailing, seed=seeds)
def test_hankel(m, n, rest, seed):
    labels = patterns.hankel((m, n, *rest))
    weight = expanded(labels, seed)

    assert_labels(labels, (m, n), lambda i, j: [(i + 1, j - 1), (i - 1, j + 1)], m + n - 1)
    assert torch.equal(weight[1:, :-1], weight[:-1, 1:])


# --- symmetries of any shape ---


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data(), seed=seeds)
def test_mirrored(shape, data, seed):
    places = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    dims = [dim - data.draw(st.sampled_from([0, len(shape)])) for dim in places]
    labels = patterns.mirrored(shape, dims)
    weight = expanded(labels, seed)

    def images(*index):
        return [(*index[:dim], shape[dim] - 1 - index[dim], *index[dim + 1 :]) for dim in places]

    groups = torch.tensor([(size + 1) // 2 if dim in places else size for dim, size in enumerate(shape)]).prod()
    assert_labels(labels, shape, images, groups)
    assert all(torch.equal(weight, weight.flip(dim)) for dim in dims)


def test_the_last_dimension_is_mirrored_unless_told_otherwise():
    assert torch.equal(patterns.mirrored((2, 3, 4)), patterns.mirrored((2, 3, 4), dims=(2,)))


@given(kernels=st.lists(st.integers(1, 3), max_size=2), k=st.integers(1, 6), mirrored=st.booleans(), seed=seeds)
def test_rotated(kernels, k, mirrored, seed):
    shape = (*kernels, k, k)
    labels = patterns.rotated(shape, mirrored=mirrored)
    weight = expanded(labels, seed)

    def images(*index):
        *kernel, i, j = index
        return [(*kernel, j, k - 1 - i), *([(*kernel, i, k - 1 - j)] if mirrored else [])]

    half = (k + 1) // 2
    each = half * (half + 1) // 2 if mirrored else (k * k + 3) // 4
    assert_labels(labels, shape, images, each * torch.tensor(kernels).prod().int())
    assert torch.equal(weight, weight.rot90(1, (-2, -1)))
    assert not mirrored or torch.equal(weight, weight.flip(-1))


@given(shape=st.lists(st.integers(1, 4), max_size=3), count=st.integers(1, 3), seed=seeds)
def test_orbits(shape, count, seed):
    n = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    # Few entries are moved, so that there are several orbits.
    permutations = []
    for _ in range(count):
        permutation = torch.arange(n)
        moved = torch.randperm(n, generator=generator)[: (n + 1) // 2]
        permutation[moved] = permutation[moved[torch.randperm(len(moved), generator=generator)]]
        permutations.append(permutation.view(shape))
    before = [permutation.clone() for permutation in permutations]
    labels = patterns.orbits(*permutations)

    flat = [permutation.flatten().tolist() for permutation in permutations]
    expected = orbits_of((n,), lambda i: [(images[i],) for images in flat]).view(shape)
    assert labels.dtype == torch.int64
    assert torch.equal(renumbered(labels), expected)
    assert all(map(torch.equal, permutations, before))


@given(k=st.integers(1, 3), n=st.integers(1, 3), seed=seeds)
def test_orbits_of_swapped_and_turned_kernels(k, n, seed):
    shape = (n, n, k, k)
    entries = torch.arange(n * n * k * k).view(shape)
    labels = patterns.orbits(entries.transpose(0, 1).flip(2, 3))
    weight = expanded(labels, seed)

    # The entries that the symmetry leaves in place are alone.
    fixed = n * (k % 2)
    assert_labels(labels, shape, lambda i, j, a, b: [(j, i, k - 1 - a, k - 1 - b)], (n * n * k * k + fixed) // 2)
    assert torch.equal(weight, weight.transpose(0, 1).flip(2, 3))


def test_orbits_give_the_other_patterns():
    entries = torch.arange(36).view(6, 6)
    square = [entries.rot90(), entries.flip(0)]
    rolled = entries.roll((1, 1), (0, 1))

    assert torch.equal(renumbered(patterns.orbits(entries.T)), renumbered(patterns.symmetric((6, 6))))
    assert torch.equal(renumbered(patterns.orbits(rolled)), renumbered(patterns.circulant((6, 6))))
    assert torch.equal(renumbered(patterns.orbits(*square)), renumbered(patterns.rotated((6, 6), mirrored=True)))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_orbits_take_any_integer_dtype(dtype):
    assert patterns.orbits(torch.tensor([1, 0, 2], dtype=dtype)).tolist() == [0, 0, 1]


# --- convolutions ---


def convolutions():
    return st.fixed_dictionaries(
        {
            "dim": st.sampled_from([1, 2]),
            "groups": st.integers(1, 2),
            "inputs": st.integers(1, 2),
            "outputs": st.integers(1, 2),
            "kernel": st.tuples(st.integers(1, 3), st.integers(1, 4)),
            "dilation": st.tuples(st.integers(1, 2), st.integers(1, 3)),
            "stride": st.tuples(st.integers(1, 3), st.integers(1, 2)),
            "padding": st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 3))),
            "extra": st.tuples(st.integers(0, 3), st.integers(0, 3)),
        }
    )


def built(case):
    """The convolution of a case, in float64, and the size of its input, as small as it can be and a little more."""
    dim = case["dim"]
    kernel, dilation, extra = (case[name][:dim] for name in ("kernel", "dilation", "extra"))
    padding = case["padding"] if isinstance(case["padding"], str) else case["padding"][:dim]
    conv = (nn.Conv1d if dim == 1 else nn.Conv2d)(
        case["groups"] * case["inputs"],
        case["groups"] * case["outputs"],
        kernel,
        stride=1 if padding == "same" else case["stride"][:dim],
        padding=padding,
        dilation=dilation,
        groups=case["groups"],
    ).double()
    for seed, param in enumerate(conv.parameters()):
        param.data = randn(*param.shape, seed=seed, dtype=torch.float64)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padded = reach if padding == "same" else [0] * dim if padding == "valid" else [2 * p for p in padding]
    least = [max(r + 1 - p, 1) for r, p in zip(reach, padded, strict=True)]
    return conv, tuple(map(sum, zip(least, extra, strict=True)))


@given(case=convolutions(), seed=seeds)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_a_convolution_unrolled_computes_the_convolution(case, seed):
    conv, size = built(case)
    labels, scale = patterns.convolution(conv, size)
    bias = patterns.convolution_bias(conv, size)
    x = randn(3, conv.in_channels, *size, seed=seed, dtype=torch.float64)
    expected = conv(x).flatten(1)
    zero = conv.weight.numel()

    assert labels.dtype == bias.dtype == torch.int64
    assert scale.dtype == torch.float32
    assert labels.shape == scale.shape == (expected.shape[1], x[0].numel())
    weight = nn.functional.pad(conv.weight.flatten(), (0, 1))[labels]
    torch.testing.assert_close(x.flatten(1) @ weight.T + conv.bias[bias], expected)
    # The same in the words of a tie: scale times the shared value.
    assert torch.equal(scale, (labels != zero).float())
    assert torch.equal(weight, conv.weight.flatten()[labels.clamp(max=zero - 1)] * scale)


@given(case=convolutions())
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_the_labels_of_a_convolution_are_positions_in_its_weight(case):
    conv, size = built(case)
    labels, scale = patterns.convolution(conv, size)
    # What each entry of the weight contributes to which output, by asking the convolution.
    inputs = torch.eye(conv.in_channels * torch.Size(size).numel(), dtype=torch.float64)
    # An even number, that is exact: position plus one, to be told from zero.
    conv.weight.data = torch.arange(1, conv.weight.numel() + 1, dtype=torch.float64).view(conv.weight.shape)
    conv.bias.data = torch.zeros_like(conv.bias)
    responses = conv(inputs.view(-1, conv.in_channels, *size)).flatten(1).T.round().long()

    assert torch.equal(torch.where(scale == 1, labels + 1, 0), responses)
    conv.bias.data = torch.arange(conv.out_channels, dtype=torch.float64)
    only_bias = conv(torch.zeros(conv.in_channels, *size, dtype=torch.float64)).flatten()
    assert torch.equal(patterns.convolution_bias(conv, size), only_bias.long())


@pytest.mark.parametrize("number", [4, numpy.int64(4), torch.tensor(4)], ids=["int", "numpy", "torch"])
def test_one_number_stands_for_height_and_width(number):
    conv = nn.Conv2d(1, 2, 3, padding=1)
    for one, two in zip(patterns.convolution(conv, number), patterns.convolution(conv, [4, 4]), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(patterns.convolution_bias(conv, number), patterns.convolution_bias(conv, torch.Size([4, 4])))


def test_a_convolution_is_not_written():
    conv = nn.Conv1d(2, 3, 2)
    before = [bits(param) for param in conv.parameters()]
    patterns.convolution(conv, 5)
    patterns.convolution_bias(conv, 5)

    assert all(torch.equal(bits(param), old) for param, old in zip(conv.parameters(), before, strict=True))


# --- compression ---


def murmur3(key, seed):
    """MurmurHash3_x86_32 of bytes, by the book."""

    def rotated(word, by):
        return (word << by | word >> 32 - by) & 0xFFFFFFFF

    h = seed
    for start in range(0, len(key), 4):
        block = key[start : start + 4]
        word = rotated(int.from_bytes(block, "little") * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF
        h ^= word
        if len(block) == 4:
            h = (rotated(h, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    h ^= len(key)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    buckets=st.integers(1, 2**31 - 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_hashed(shape, buckets, seed):
    labels, scale = patterns.hashed(shape, buckets, seed=seed)
    n = torch.Size(shape).numel()
    bucket, sign = (
        [murmur3(i.to_bytes(4, "little"), murmur3(f"{use} {seed}".encode(), 0)) for i in range(n)]
        for use in ("bucket", "sign")
    )

    assert labels.dtype == torch.int64
    assert scale.dtype == torch.float32
    assert torch.equal(labels, torch.tensor([value % buckets for value in bucket]).view(shape))
    assert torch.equal(scale, torch.tensor([-1.0 if value % 2 else 1.0 for value in sign]).view(shape))


def test_hashes_are_the_same_for_ever():
    labels, scale = patterns.hashed((2, 5), 100)
    assert labels.tolist() == [[44, 34, 79, 2, 82], [82, 87, 45, 85, 83]]
    assert scale.tolist() == [[1, -1, -1, 1, 1], [1, 1, 1, -1, -1]]
    assert patterns.hashed((5,), 100, seed=7)[0].tolist() == [18, 34, 27, 74, 64]


def test_hashes_are_even_and_signs_go_with_no_bucket():
    labels, scale = patterns.hashed((400, 250), 10)
    other, other_scale = patterns.hashed((400, 250), 10, seed=1)
    cells = torch.bincount(2 * labels.flatten() + (scale.flatten() > 0), minlength=20)
    pairs = torch.bincount(10 * labels.flatten() + other.flatten(), minlength=100)

    # 5000 and 1000 are expected; five standard deviations.
    assert (cells - 5000).abs().max() < 5 * 5000**0.5
    assert (pairs - 1000).abs().max() < 5 * 1000**0.5
    assert (scale * other_scale).mean().abs() < 5 / 100_000**0.5


@st.composite
def blobs(draw):
    """Rows around well-separated centers, in any order, and the blob that each is of."""
    owner = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=1, max_size=20)))
    columns = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    noise = 0.1 * randn(len(owner), *columns, seed=draw(seeds)).clamp(-2, 2)
    return owner, noise + 100.0 * owner.view(-1, *[1] * len(columns))


@given(case=blobs(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_clusters_of_rows_are_the_blobs(case, seed, dtype):
    owner, rows = case
    labels = patterns.clusters(rows.to(dtype), len(owner.unique()), seed=seed)

    assert labels.dtype == torch.int64
    assert torch.equal(renumbered(labels), renumbered(owner))


@given(case=blobs(), seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_clusters_of_values_are_the_blobs_in_ascending_order(case, seed, dtype):
    owner, rows = case
    labels = patterns.clusters(rows.to(dtype), len(owner.unique()), of="values", seed=seed)

    rank = torch.unique(owner, return_inverse=True)[1]
    assert labels.dtype == torch.int64
    assert torch.equal(labels, rank.view(-1, *[1] * (rows.dim() - 1)).expand(rows.shape))


@given(n=st.integers(2, 30), count=st.integers(1, 8), of=st.sampled_from(["rows", "values"]), seed=seeds)
def test_clusters_do_not_depend_on_the_order_of_rows(n, count, of, seed):
    tensor = randn(n, 3, seed=seed).round(decimals=1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    count = min(count, n)
    labels = patterns.clusters(tensor, count, of=of, seed=seed)

    assert torch.equal(patterns.clusters(tensor[order], count, of=of, seed=seed), labels[order])
    assert len(labels.unique()) <= count


@given(n=st.integers(1, 20), distinct=st.integers(1, 4), seed=seeds)
def test_no_more_distinct_rows_than_clusters_have_one_each(n, distinct, seed):
    owner = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(seed))
    rows = randn(distinct, 3, seed=seed)[owner]

    for count in {min(len(owner.unique()), n), min(distinct, n), n}:
        assert torch.equal(renumbered(patterns.clusters(rows, count)), renumbered(owner))
    values = randn(distinct, seed=seed)[owner]
    assert torch.equal(renumbered(patterns.clusters(values, n, of="values")), renumbered(owner))


@pytest.mark.parametrize("of", ["rows", "values"])
@pytest.mark.parametrize("seed", range(5))
def test_equal_ones_count_as_often_as_they_occur(of, seed):
    # Zeros that are not alone keep their center, and the last of the few between is nearer to the others.
    between, others = torch.tensor([0.8, 0.94, 1.0]), torch.linspace(1.89, 1.91, 10)
    labels = patterns.clusters(torch.cat([torch.zeros(1000), between, others]), 2, of=of, seed=seed)

    assert renumbered(labels).tolist() == [0] * 1001 + [1] * 12


def squared_error(values, labels, count):
    values = values.flatten().double()
    labels = labels.flatten()
    means = torch.zeros(count, dtype=torch.float64).index_add_(0, labels, values) / torch.bincount(
        labels, minlength=count
    )
    return (values - means[labels]).square().mean().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "best"), [(2, 0.3634), (16, 0.009497), (64, 0.000644)])
def test_clusters_of_many_values_are_nearly_the_best(count, best, seed):
    # Of normal values the best quantisers are known (Max, 1960).
    values = randn(200, 500)
    labels = patterns.clusters(values, count, of="values", seed=seed)

    assert len(labels.unique()) == count
    assert squared_error(values, labels, count) < 1.15 * best
    order = values.flatten().argsort()
    assert (labels.flatten()[order].diff() >= 0).all()


def test_a_far_value_and_many_equal_ones_leave_room_for_the_rest():
    values = torch.cat([randn(30_000), torch.zeros(30_000), torch.tensor([1e8])])
    labels = patterns.clusters(values, 9, of="values")

    assert len(labels.unique()) == 9
    assert (labels == 8).nonzero().tolist() == [[60_000]]
    assert squared_error(values[:-1], labels[:-1], 8) < 0.05


@given(bins=st.integers(16, 64), seed=seeds)
def test_a_summary_keeps_masses_and_moments_and_far_values(bins, seed):
    far = torch.tensor([-5.0, 7.0, 8.0, 9.0])
    values = torch.cat([randn(1000, seed=seed).clamp(-2, 2), far]).double().unique()
    masses = torch.randint(1, 9, (len(values),), generator=torch.Generator().manual_seed(seed))
    means, weights = patterns._summary(values, masses, bins)

    assert bins <= len(means) <= 2 * bins
    assert (means.diff() > 0).all()
    assert weights.sum() == masses.sum()
    torch.testing.assert_close(means @ weights, values @ masses.double())
    assert {-5.0, 7.0, 8.0, 9.0} <= set(means.tolist())
    # Where there are many values, a bin has few.
    assert weights.max() <= 9 * (len(values) / (bins - 1) + 1)


def test_there_are_more_bins_than_clusters(monkeypatch):
    monkeypatch.setattr(patterns, "_SUMMARY", 16)
    assert len(patterns.clusters(randn(1000), 60, of="values").unique()) == 60


@pytest.mark.parametrize("of", ["rows", "values"])
def test_clusters_are_the_same_for_a_seed_and_write_nothing(of):
    tensor = randn(60, 4).requires_grad_()
    before, state = bits(tensor.detach()), torch.get_rng_state()
    numpy.random.seed(0)  # noqa: NPY002
    labels = patterns.clusters(tensor, 7, of=of, seed=5)
    numpy.random.seed(1)  # noqa: NPY002

    assert len(labels.unique()) == 7
    assert torch.equal(patterns.clusters(tensor, 7, of=of, seed=5), labels)
    assert torch.equal(bits(tensor.detach()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(patterns.clusters(tensor, 7, of=of, seed=seed), labels) for seed in range(5))


# --- what all have in common ---

BUILDERS = {
    "symmetric": patterns.symmetric,
    "antisymmetric": patterns.antisymmetric,
    "persymmetric": patterns.persymmetric,
    "centrosymmetric": patterns.centrosymmetric,
    "circulant": patterns.circulant,
    "block_circulant": lambda shape: patterns.block_circulant(shape, 2),
    "toeplitz": patterns.toeplitz,
    "hankel": patterns.hankel,
    "mirrored": patterns.mirrored,
    "rotated": patterns.rotated,
    "hashed": lambda shape: patterns.hashed(shape, 3),
}
SQUARE = ["symmetric", "antisymmetric", "persymmetric", "circulant"]
builders = pytest.mark.parametrize("name", BUILDERS)


@builders
def test_the_same_twice_and_new_each_time(name):
    shape = [4, 4]
    first, second = BUILDERS[name](shape), BUILDERS[name](torch.Size([4, 4]))
    for one, two in zip(*(out if isinstance(out, tuple) else (out,) for out in (first, second)), strict=True):
        kept = two.clone()
        one.fill_(7)
        assert torch.equal(two, kept)
    assert shape == [4, 4]


@builders
def test_labels_take_memory_of_their_own(name):
    # No two entries share memory, so that a user may write to them.
    out = BUILDERS[name]((4, 4))
    for tensor in out if isinstance(out, tuple) else (out,):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@builders
def test_a_shape_without_entries_has_labels_without_entries(name):
    out = BUILDERS[name]((0, 0))
    for tensor in out if isinstance(out, tuple) else (out,):
        assert tensor.shape == (0, 0)


# --- errors ---


def refused(error, text, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


def says(wrong, expected, got):
    return f"{wrong}\n  Expected: {expected}\n  Got:      {got}"


@builders
@pytest.mark.parametrize(
    ("shape", "got"),
    [
        (torch.zeros(3, 3), "a tensor of shape (3, 3) and torch.float32"),
        (3, "3 (int)"),
        ("33", "'33' (str)"),
        ((3, 3.0), "(3, 3.0) (tuple)"),
        (None, "None (NoneType)"),
    ],
    ids=str,
)
def test_what_is_no_shape_is_refused(name, shape, got):
    expected = "the sizes of a parameter, as weight.shape"
    refused(TypeError, says("A shape is not a sequence of integers.", expected, got), BUILDERS[name], shape)


@builders
@pytest.mark.parametrize("shape", [(), (4,), (4, -4), (-4, -4)], ids=str)
def test_too_few_dimensions_and_negative_sizes_are_refused(name, shape):
    least = 1 if name in ("mirrored", "hashed") else 2
    if len(shape) >= least and min(shape) >= 0:
        BUILDERS[name](shape)
        return
    expected = f"{least} dimension{'s' if least == 2 else ''} or more, of no negative size"
    refused(ValueError, says("A pattern does not fit this shape.", expected, shape), BUILDERS[name], shape)


@pytest.mark.parametrize("name", SQUARE)
def test_a_matrix_that_has_to_be_square_is_refused_if_it_is_not(name):
    wrong = f"A matrix of this shape cannot be {name}."
    refused(
        ValueError,
        says(wrong, "the first two dimensions to be equal", (3, 4, 4)),
        BUILDERS[name],
        torch.Size([3, 4, 4]),
    )


def test_a_kernel_that_is_not_square_is_refused():
    expected = "the last two dimensions to be equal"
    refused(ValueError, says("Such kernels cannot be rotated.", expected, (3, 3, 2)), patterns.rotated, (3, 3, 2))


@pytest.mark.parametrize("block", [4, 3, 2])
def test_a_block_that_does_not_divide_is_refused(block):
    shape = {4: (8, 6), 3: (8, 6), 2: (4, 5)}[block]
    expected = f"a divisor of {shape[0]} and of {shape[1]}"
    refused(
        ValueError,
        says("A matrix cannot be cut into such blocks.", expected, block),
        patterns.block_circulant,
        shape,
        block,
    )


@pytest.mark.parametrize(
    ("error", "wrong", "expected", "got", "function", "args"),
    [
        (ValueError, "The size of a block", "1 to 6", "0", patterns.block_circulant, ((4, 6), 0)),
        (ValueError, "The size of a block", "1 to 6", "12", patterns.block_circulant, ((4, 6), 12)),
        (TypeError, "The size of a block", "1 to 6", "2.0 (float)", patterns.block_circulant, ((4, 6), 2.0)),
        (ValueError, "The number of buckets", "1 to 2147483647", "0", patterns.hashed, ((4, 6), 0)),
        (ValueError, "The number of buckets", "1 to 2147483647", "2147483648", patterns.hashed, ((4, 6), 2**31)),
        (TypeError, "The number of buckets", "1 to 2147483647", "True (bool)", patterns.hashed, ((4, 6), True)),
        (ValueError, "The number of clusters", "1 to 4", "0", patterns.clusters, (torch.ones(4, 3), 0)),
        (ValueError, "The number of clusters", "1 to 4", "5", patterns.clusters, (torch.ones(4, 3), 5)),
        (TypeError, "The number of clusters", "1 to 4", "None (NoneType)", patterns.clusters, (torch.ones(4, 3), None)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_numbers_out_of_range_are_refused(error, wrong, expected, got, function, args):
    what = "is out of range" if error is ValueError else "is not an integer"
    refused(error, says(f"{wrong} {what}.", f"an integer from {expected}", got), function, *args)


def test_there_may_be_as_many_clusters_of_values_as_values():
    tensor = randn(4, 3)
    assert len(patterns.clusters(tensor, 12, of="values").unique()) == 12
    expected = says("The number of clusters is out of range.", "an integer from 1 to 12", 13)
    refused(ValueError, expected, patterns.clusters, tensor, 13, of="values")


@pytest.mark.parametrize(
    ("error", "seed", "got"), [(ValueError, -1, "-1"), (ValueError, 2**32, 2**32), (TypeError, "a", "'a' (str)")]
)
def test_seeds_out_of_range_are_refused(error, seed, got):
    what = "is out of range" if error is ValueError else "is not an integer"
    text = says(f"A seed {what}.", "an integer from 0 to 4294967295", got)
    refused(error, text, patterns.hashed, (2, 2), 2, seed=seed)
    refused(error, text, patterns.clusters, torch.ones(2, 2), 2, seed=seed)


def test_more_entries_than_a_hash_has_keys_are_refused():
    text = says("A shape has too many entries to be hashed.", "2147483647 or fewer", "2147483648 in (32768, 65536)")
    refused(ValueError, text, patterns.hashed, (2**15, 2**16), 5)


@pytest.mark.parametrize(
    ("error", "wrong", "expected", "got", "dims"),
    [
        (IndexError, "A dimension is out of range.", "from -2 to 1", "2", (0, 2)),
        (IndexError, "A dimension is out of range.", "from -2 to 1", "-3", (-3,)),
        (ValueError, "A dimension occurs more than once.", "each dimension once", "(1, -1)", (1, -1)),
        (
            TypeError,
            "What is mirrored is not a sequence of integers.",
            "the numbers of dimensions, as (0, 1)",
            "1 (int)",
            1,
        ),
    ],
    ids=str,
)
def test_dimensions_that_are_not_there_are_refused(error, wrong, expected, got, dims):
    refused(error, says(wrong, expected, got), patterns.mirrored, (3, 4), dims)


@pytest.mark.parametrize(
    ("error", "number", "wrong", "expected", "got", "permutations"),
    [
        (TypeError, 0, "is not one of integers", None, "a tensor of shape (2,) and torch.float32", [torch.ones(2)]),
        (TypeError, 0, "is not one of integers", None, "[0, 1] (list)", [[0, 1]]),
        (TypeError, 0, "is not one of integers", None, "a tensor of shape (2,) and torch.bool", [torch.ones(2) > 0]),
        (ValueError, 1, "has another shape than the first", (2,), (3,), [torch.arange(2), torch.arange(3)]),
        (ValueError, 1, "is not a rearrangement", 1, "0 more than once", [torch.arange(2), torch.tensor([0, 0])]),
        (ValueError, 0, "is not a rearrangement", 1, "2", [torch.tensor([0, 2])]),
        (ValueError, 0, "is not a rearrangement", 1, "-1", [torch.tensor([1, -1])]),
    ],
    ids=str,
)
def test_what_is_no_permutation_is_refused(error, number, wrong, expected, got, permutations):
    if error is TypeError:
        expected = "an integer tensor, as torch.arange(n).view(shape) rearranged, or a pair of it and its signs"
    elif expected == 1:
        expected = "each number from 0 to 1, once"
    refused(error, says(f"Permutation {number} {wrong}.", expected, got), patterns.orbits, *permutations)


def test_orbits_of_nothing_are_refused():
    refused(TypeError, says("Orbits need a permutation.", "one integer tensor or more", "none"), patterns.orbits)


CONV1D = nn.Conv1d(1, 1, 3)
CONV2D = nn.Conv2d(1, 1, (2, 3), dilation=(1, 2), padding=(0, 1))
unrolling = pytest.mark.parametrize("function", [patterns.convolution, patterns.convolution_bias])


@unrolling
def test_what_is_no_such_convolution_is_refused(function):
    text = says("Only a convolution can be unrolled.", "torch.nn.Conv1d or torch.nn.Conv2d", "ReLU() (ReLU)")
    refused(TypeError, text, function, nn.ReLU(), 4)
    with pytest.raises(TypeError, match="Got:      ConvTranspose1d"):
        function(nn.ConvTranspose1d(1, 1, 2), 4)


@unrolling
@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_other_padding_than_by_zeros_is_refused(function, mode):
    text = says("Such padding cannot be unrolled.", "padding_mode='zeros'", repr(mode))
    refused(ValueError, text, function, nn.Conv1d(1, 1, 3, padding=1, padding_mode=mode), 4)


@unrolling
@pytest.mark.parametrize(
    ("error", "conv", "size", "expected", "got"),
    [
        (ValueError, CONV1D, 0, "1 integer from 1 on", "(0,)"),
        (ValueError, CONV1D, (4, 4), "1 integer from 1 on", "(4, 4)"),
        (ValueError, CONV2D, (4,), "2 integers from 1 on", "(4,)"),
        (ValueError, CONV2D, (4, -1), "2 integers from 1 on", "(4, -1)"),
        (TypeError, CONV2D, 4.0, "2 integers from 1 on", "4.0 (float)"),
        (TypeError, CONV2D, "44", "2 integers from 1 on", "'44' (str)"),
    ],
    ids=["zero", "pair", "single", "negative", "float", "string"],
)
def test_sizes_that_no_input_has_are_refused(function, error, conv, size, expected, got):
    wrong = "The input of a convolution cannot have this size."
    if error is TypeError:
        wrong = "The size of an input is not a sequence of integers."
    refused(error, says(wrong, expected, got), function, conv, size)


@unrolling
def test_an_input_that_is_smaller_than_the_kernel_is_refused(function):
    wrong = "The input of a convolution is too small in dimension 1."
    refused(ValueError, says(wrong, f"3 or more, for {CONV2D}", 2), function, CONV2D, (2, 2))
    function(CONV2D, (2, 3))


def test_a_convolution_without_a_bias_has_none_to_label():
    conv = nn.Conv1d(1, 1, 3, bias=False)
    refused(ValueError, says("A convolution has no bias.", "bias=True", conv), patterns.convolution_bias, conv, 4)
    patterns.convolution(conv, 4)


@pytest.mark.parametrize(
    ("tensor", "got"),
    [
        ([[1.0]], "[[1.0]] (list)"),
        (torch.ones(2, 2, dtype=torch.int64), "a tensor of shape (2, 2) and torch.int64, torch.strided"),
        (torch.ones(2, 2, dtype=torch.complex64), "a tensor of shape (2, 2) and torch.complex64, torch.strided"),
        (torch.ones(2, 2).to_sparse(), "a tensor of shape (2, 2) and torch.float32, torch.sparse_coo"),
    ],
    ids=["list", "integers", "complex", "sparse"],
)
def test_what_cannot_be_clustered_is_refused(tensor, got):
    text = says("This cannot be clustered.", "a dense tensor of a real floating dtype", got)
    refused(TypeError, text, patterns.clusters, tensor, 1)


@pytest.mark.parametrize("of", ["rows", "values"])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_nothing_to_cluster_is_refused(of, shape):
    text = says("There is nothing to cluster.", "one entry or more", f"a tensor of shape {shape} and torch.float32")
    refused(ValueError, text, patterns.clusters, torch.ones(shape), 1, of=of)


@pytest.mark.parametrize("of", ["rows", "values"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_entries_that_are_not_finite_are_refused(of, value):
    tensor = torch.ones(3, 2, 2)
    tensor[1, 0, 1] = value
    text = says("A tensor cannot be clustered.", "finite entries", f"{value} at (1, 0, 1)")
    refused(ValueError, text, patterns.clusters, tensor, 1, of=of)


def test_clusters_of_something_else_are_refused():
    text = says("This cannot be clustered.", "of='rows', of='values' or a number of entries", "'columns' (str)")
    refused(ValueError, text, patterns.clusters, torch.ones(2, 2), 1, of="columns")


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("scipy.sparse", lambda: patterns.orbits(torch.arange(3))),
        ("scipy.sparse.csgraph", lambda: patterns.orbits(torch.arange(3))),
        ("scipy.sparse", lambda: patterns.equivariant(None, [torch.arange(3)])),
        ("scipy.spatial.distance", lambda: patterns.similar(torch.ones(2, 2), 1.0)),
        ("scipy.cluster.hierarchy", lambda: patterns.similar(torch.ones(2, 2), 1.0)),
        ("sklearn.utils", lambda: patterns.hashed((2, 2), 2)),
        ("sklearn.cluster", lambda: patterns.clusters(torch.ones(2, 2), 1)),
    ],
)
def test_what_is_not_installed_is_asked_for(module, call, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'tieopt[patterns]'")) as caught:
        call()
    assert str(caught.value).startswith(f"This pattern needs {module}.\n  Expected: ")
    assert "\n  Got:      import of" in str(caught.value)


def test_the_other_patterns_need_torch_alone(monkeypatch):
    for module in ("scipy", "sklearn", "numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    for name in BUILDERS.keys() - {"hashed"}:
        BUILDERS[name]((4, 4))
    patterns.convolution(CONV1D, 4)
    patterns.convolution_bias(CONV1D, 4)
