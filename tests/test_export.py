"""Tied weights as codebook and indices, and files of them: what was written comes back bit for bit, or not at all."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import itertools
import json
import math
import os
import stat
import subprocess
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from checks import parameter, randn, same_bits, same_tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import labels, laid_out, layouts, normal, seeds, shapes, spelled, tied_tensors
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode

import tieopt.testing
from tieopt import Tie, TiedOptimizer, export, patterns, tie_
from tieopt.export import codebook
from tieopt.export.tensor_file import Writer
from tieopt.tensors import bits
from tieopt.ties.slices import Slices, numbered

# --- in memory ---


@given(data=st.data(), shape=shapes(empty=True))
def test_indexing_the_codebook_gives_any_tied_tensor_back_bit_for_bit(data, shape):
    names = data.draw(labels(shape[0]))
    tensor = data.draw(tied_tensors(shape, names))
    given_as = laid_out(tensor, data.draw(layouts(tensor)))

    entries, indices = export.encode(given_as, data.draw(spelled(names)))

    # As bits: torch 2.6 does not index 8-bit floats.
    assert same_bits(bits(entries)[indices].view(tensor.dtype), tensor)
    assert len(entries) == len(names[names >= 0].unique()) + int((names < 0).sum())
    assert indices.dtype == torch.int64
    assert indices.shape == names.shape


def tied_along_any_dimension(
    data: st.DataObject, shape: tuple[int, ...], seed: int
) -> tuple[Tensor, Tensor, int, Tensor]:
    dim = data.draw(st.integers(0, len(shape) - 1))
    weight = randn(*shape, seed=seed, dtype=torch.float64)
    labelled = weight.movedim(dim, 0).shape[: data.draw(st.integers(1, 3))]
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(-1, 5, labelled, generator=generator)
    scale = torch.tensor([1.0, -1.0, 0.0, 0.3])[torch.randint(4, labelled, generator=generator)]
    return tie_(weight, names, dim=dim, scale=scale), names, dim, scale


@given(data=st.data(), shape=shapes(), seed=seeds)
def test_a_codebook_has_each_multiple_of_each_group_once(data, shape, seed):
    weight, names, dim, scale = tied_along_any_dimension(data, shape, seed)

    entries, indices = export.encode(weight, names, dim=dim, scale=scale)

    assert same_bits(entries[indices].movedim(0, dim), weight)
    pairs = {pair for pair in zip(names.flatten().tolist(), scale.flatten().tolist(), strict=True) if pair[0] >= 0}
    assert len(entries) == len(pairs) + int((names < 0).sum())
    assert indices.flatten().unique().tolist() == list(range(len(entries)))


def test_labels_may_be_as_large_as_integers_are():
    names, scale = torch.tensor([2**63 - 1, 2**63 - 1, 2**63 - 3, -1]), torch.tensor([1.0, -1.0, 0.5, 1.0])
    weight = tie_(randn(4, 3), names, scale=scale)
    entries, indices = export.encode(weight, names, scale=scale)
    assert same_bits(entries[indices], weight)
    assert len(entries) == 4


@given(width=st.integers(0, 20), count=st.integers(0, 50), seed=seeds)
def test_packed_numbers_are_unpacked(width, count, seed):
    numbers = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(seed))

    data = codebook.packed(numbers, width)

    assert len(data) == math.ceil(width * count / 8)
    assert torch.equal(codebook.unpacked(data, width, numbers.shape), numbers)


def test_numbers_are_packed_in_chunks_without_gaps(monkeypatch):
    numbers = torch.arange(100) % 8
    whole = codebook.packed(numbers, 3)
    monkeypatch.setattr(codebook, "_CHUNK", 16)

    assert torch.equal(codebook.packed(numbers, 3), whole)
    assert torch.equal(codebook.unpacked(whole, 3, numbers.shape), numbers)


def test_what_is_not_tied_is_refused(monkeypatch):
    monkeypatch.setattr(codebook, "_CHUNK", 8)  # one row at a time
    with pytest.raises(ValueError, match=r"(?s)not tied.*the tensor of shape \(7, 5\).*tie_weights.* 2 that differ"):
        export.encode(parameter(7, 5), [[0, 3, 5]])
    weight = tie_(torch.zeros(7, 5), [[0, 3, 6]])
    weight[6, 4] = -0.0
    with pytest.raises(ValueError, match=r"(?s)equal bit for bit.* 1 that differ"):
        export.encode(weight, [[0, 3, 6]])


# --- files ---


def network(seed: int = 0) -> nn.Sequential:
    """With joined, scaled and overlaid ties, buffers, a parameter that is there twice, and views of one memory."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Linear(6, 6))
    model.register_buffer("first", torch.arange(6.0))
    model.register_buffer("rest", model.first[2:])
    with torch.no_grad():
        for number, param in enumerate(model.parameters()):
            param.copy_(randn(*param.shape, seed=seed + number))
    model.register_parameter("again", model[3].weight)
    model.register_parameter("offset", model[0].bias)
    return model


def ties_of(model: nn.Sequential) -> list[Tie]:
    signs = torch.tensor([1.0, -1, 0, 1, 2, 1])
    return [
        Tie.join(Tie(model[0].weight, torch.arange(4)), Tie(model[2].weight, torch.arange(4), dim=1)),
        Tie(model[3].weight, torch.tensor([0, 0, 1, 0, 0, -1]), scale=signs),
        Tie(model[3].weight, torch.tensor([-1, -1, -1, -1, -1, 1])),
        Tie(model[0].bias, [[0, 1, 2]]),
    ]


def tied(compact: bool, seed: int = 0) -> tuple[nn.Sequential, TiedOptimizer]:
    model = network(seed)
    optimizer = TiedOptimizer(AdamW(model.named_parameters(), lr=0.01), ties_of(model), compact=compact)
    model[3](model[2](model[1](model[0](randn(5, 6))))).square().mean().backward()
    optimizer.step()
    return model, optimizer


def fingerprints(optimizer: TiedOptimizer) -> dict[int, str]:
    return optimizer.state_dict().get("tieopt", {}).get("ties", {})


def test_a_trained_model_comes_back_bit_for_bit_with_its_ties(tmp_path, compact):
    model, optimizer = tied(compact)
    file = tmp_path / "model.safetensors"
    model.eval()

    export.save(model, optimizer, file)

    assert not model.training
    state = export.load(file)
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    other = network(seed=9)
    other.load_state_dict(state)
    before = copy.deepcopy(other.state_dict())
    again = TiedOptimizer(AdamW(other.named_parameters(), lr=0.01), export.load_ties(file), compact=compact)
    assert same_tree(other.state_dict(), before)  # It was tied.
    assert fingerprints(again) == fingerprints(optimizer)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for trained, trainer in ((model, optimizer), (other, again)):
        trained.train()
        trainer.zero_grad()
        trained[3](trained[2](trained[1](trained[0](randn(5, 6, seed=3))))).square().mean().backward()
        trainer.step()
    assert all(map(same_bits, model.parameters(), other.parameters()))


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64, torch.float8_e5m2]


@given(data=st.data(), seed=seeds, dtype=st.sampled_from(DTYPES), tied_first=st.booleans())
def test_ties_of_every_kind_come_back(data, seed, dtype, tied_first, tmp_path_factory):
    all_shapes = [(4, 3), (3, 4), (5,), (2, 3, 2), (0, 3), (3, 0)]
    chosen = data.draw(st.lists(st.sampled_from(all_shapes), min_size=1, max_size=3))
    model = nn.ParameterDict({f"p{i}": nn.Parameter(normal(shape, dtype, seed + i)) for i, shape in enumerate(chosen)})
    params = list(model.values())
    if data.draw(st.booleans()):  # transposed in memory
        params[0].data = params[0].data.movedim(0, -1).contiguous().movedim(-1, 0)
    given_ties = data.draw(tieopt.testing.ties(params))
    optimizer = TiedOptimizer(SGD(model.named_parameters()), given_ties)
    file = tmp_path_factory.mktemp("files") / "model"

    export.save(model, optimizer if tied_first else optimizer.ties, file)

    state = export.load(file)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        name: tuple(param.shape) for name, param in model.items()
    }
    assert all(same_bits(state[name], param.detach()) for name, param in model.items())
    again = nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in state.items()})
    assert fingerprints(TiedOptimizer(SGD(again.named_parameters()), export.load_ties(file))) == fingerprints(optimizer)


def test_names_and_an_optimizer_say_the_same(tmp_path):
    model = network()
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {model[2].weight: [[0, 1]]})

    export.save(model, optimizer, tmp_path / "optimizer")
    export.save(model, {"2.weight": [[0, 1]]}, tmp_path / "names")

    assert (tmp_path / "optimizer").read_bytes() == (tmp_path / "names").read_bytes()
    with safe_open(tmp_path / "names", "pt") as opened:
        names = set(opened.keys())
    assert {"2.weight.codebook", "2.weight.indices", "2.weight.free"} <= names
    assert not {"2.weight", "2.weight.groups", "2.weight.scales"} & names


@pytest.mark.parametrize("signs", [False, True])
def test_a_codebook_of_two_values_takes_little_more_than_a_bit_for_each_weight(tmp_path, signs):
    model = nn.Linear(256, 256, bias=False)
    labels = torch.arange(256**2).view(256, 256) % (1 if signs else 2)
    scale = 1.0 - 2 * (torch.arange(256**2).view(256, 256) % 2) if signs else None
    optimizer = TiedOptimizer(SGD(model.parameters()), Tie(model.weight, labels, scale=scale))
    export.save(model, {}, tmp_path / "dense")
    export.save(model, optimizer, tmp_path / "coded")

    dense, coded = ((tmp_path / name).stat().st_size for name in ("dense", "coded"))
    assert dense >= 4 * 256**2
    assert coded <= 256**2 / 8 + 2048


def test_many_groups_take_their_values_and_indices_and_nothing_beside(tmp_path):
    model = nn.ParameterDict({"weight": nn.Parameter(torch.arange(100_000.0) // 2)})
    export.save(model, {"weight": torch.arange(100_000) // 2}, tmp_path / "coded")
    assert (tmp_path / "coded").stat().st_size <= 4 * 50_000 + 2 * 100_000 + 2048

    scale = torch.tensor([1.0, -1.0]).repeat(50_000)
    optimizer = TiedOptimizer(SGD(model.parameters()), Tie(model["weight"], torch.arange(100_000) // 4, scale=scale))
    export.save(model, optimizer, tmp_path / "coded")
    # Of each entry the value, the group, and the sign; and for each weight an index of 16 bits.
    assert (tmp_path / "coded").stat().st_size <= 50_000 * (4 + 2 + 1) + 2 * 100_000 + 2048


def payload(file: Path) -> int:
    """The bytes of a file behind its header."""
    written = file.read_bytes()
    return len(written) - 8 - int.from_bytes(written[:8], "little")


def contents_of(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["tieopt"])


def test_subvectors_take_their_centroids_and_an_index_each(tmp_path):
    model = nn.Linear(64, 64, bias=False)
    labels = patterns.clusters(model.weight, 16, of=4)
    optimizer = TiedOptimizer(SGD(model.named_parameters()), {"weight": labels})
    export.save(model, optimizer, tmp_path / "model")

    assert payload(tmp_path / "model") == 16 * 4 * 4 + 1024 * 4 // 8 == 768
    assert same_bits(export.load(tmp_path / "model")["weight"], model.weight.detach())
    ties = export.load_ties(tmp_path / "model")
    assert fingerprints(TiedOptimizer(SGD(model.named_parameters()), ties)) == fingerprints(optimizer)


@given(data=st.data(), seed=seeds, block=st.integers(1, 4), free=st.booleans(), scaled=st.booleans())
def test_ties_of_blocks_come_back(data, seed, block, free, scaled, tmp_path_factory):
    rows, columns, kinds = (data.draw(st.integers(1, 5)) for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    params, ties = {}, []
    scale = torch.tensor([1.0, -1.0, 0.5])[torch.randint(3, (kinds, block), generator=generator)]
    for name in data.draw(st.sampled_from(["v", "vw"])):
        kind = torch.randint(-int(free), kinds, (rows, columns), generator=generator)
        labels = torch.where(kind[..., None] < 0, -1, kind[..., None] * block + torch.arange(block)).flatten(1)
        params[name] = nn.Parameter(randn(rows, columns * block, 2, seed=seed + ord(name)).movedim(0, 1))
        ties.append(Tie(params[name].data, labels, dim=1, scale=scale[kind].flatten(1) if scaled else None))
    joined = Tie.join(
        *[
            Tie(name, part.groups, dim=1, scale=part.scale)
            for name, tie in zip(params, ties, strict=True)
            for part in tie.parts
        ]
    )
    model = nn.ParameterDict(params)
    optimizer = TiedOptimizer(SGD(model.named_parameters()), joined)
    file = tmp_path_factory.mktemp("files") / "model"
    export.save(model, optimizer, file)

    state = export.load(file)
    assert all(same_bits(state[name], param.detach()) for name, param in model.items())
    assert same_tree(dict(export.stream(file)), state)
    read = TiedOptimizer(SGD(model.named_parameters()), export.load_ties(file))
    assert fingerprints(read) == fingerprints(optimizer)
    (parts,) = contents_of(file)["ties"]
    assert all(part.get("block", 1) % block == 0 for part in parts)
    assert (contents_of(file)["format"] == "2") == ("block" in parts[0])


@given(
    data=st.data(),
    seed=seeds,
    shapes=st.lists(st.sampled_from([(6,), (4, 6), (0, 6), (2, 1, 4)]), min_size=1, max_size=2),
)
def test_the_largest_block_is_the_largest(data, seed, shapes):
    """Against a search through all sizes, by the definition."""
    block, free = data.draw(st.sampled_from([1, 2, 3])), data.draw(st.booleans())
    generator = torch.Generator().manual_seed(seed)
    flat = torch.cat([torch.randint(-int(free), 3, (math.prod(shape),), generator=generator) for shape in shapes])
    if data.draw(st.booleans()):  # Blocks that may or may not be aligned
        start = flat.repeat_interleave(block)[: len(flat)]
        flat = torch.where(start < 0, start, start * block + torch.arange(len(flat)) % block)
    (named,) = numbered([Slices(flat)])
    count = int(named.labels.max()) + 1 if len(flat) else 0
    column = torch.where(named.labels < 0, count, named.labels)
    parts = torch.split(column, [math.prod(shape) for shape in shapes])
    indices = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def fits(size: int) -> bool:
        if any(part.shape[-1] % size for part in indices):
            return False
        blocks = [tuple(row) for part in indices for row in part.reshape(-1, size).tolist()]
        tied = {row for row in blocks if row != (count,) * size}
        return count not in itertools.chain(*tied) and len(set(itertools.chain(*tied))) == len(tied) * size

    assert codebook.largest_block(indices, count) == max(size for size in range(1, 7) if fits(size))


@pytest.mark.parametrize(
    ("indices", "count", "block"),
    [
        ([[0, 1, 2, 0, 1, 2]], 3, 3),
        ([[0, 1, 2, 3], [2, 3, 0, 1]], 4, 2),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], 8, 4),
        ([[0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3], [2, 3, 4, 5, 0, 1]], 6, 2),
        # One entry would be in two blocks.
        ([[0, 1, 1, 2]], 3, 1),
        ([[0, 1], [1, 0]], 2, 1),
        # Slices that are free have the number of entries.
        ([[0, 1, 4, 4], [2, 3, 0, 1]], 4, 2),
        ([[0, 1, 2, 2]], 2, 2),
        ([[0, 1, 2, 3]], 3, 1),
        ([[4, 4, 0, 1], [4, 2, 3, 4]], 4, 1),
    ],
)
def test_blocks_are_found(indices, count, block):
    assert codebook.largest_block([torch.tensor(indices)], count) == block


@pytest.mark.parametrize(("width", "number"), [(16, "2"), (17, "1")])
def test_wide_slices_are_written_as_version_1_0_0_reads_them(width, number, tmp_path):
    model = nn.ParameterDict({"embedding": nn.Parameter(randn(9, width)), "head": nn.Parameter(randn(9, width))})
    TiedOptimizer(SGD(model.named_parameters()), Tie.equal("embedding", "head"))
    export.save(model, Tie.equal("embedding", "head"), tmp_path / "model")
    assert contents_of(tmp_path / "model")["format"] == number


@pytest.mark.parametrize("has_blocks", [False, True])
def test_files_without_blocks_are_those_of_version_1_0_0(has_blocks, tmp_path, monkeypatch):
    file, model = tmp_path / "model", nn.ParameterDict({"w": nn.Parameter(torch.zeros(6))})
    # That version wrote blocks slice by slice.
    monkeypatch.setattr("tieopt.export.model_file.largest_block", lambda *_: 1) if has_blocks else None
    labels = torch.tensor([0, 1, 0, 1, 2, 3] if has_blocks else [0, 1, 0, 0, 1, -1])
    export.save(model, {"w": labels}, file)

    contents = contents_of(file)
    assert contents["format"] == "1"
    assert contents["ties"][0][0].keys() == {"name", "key", "dim", "shape", "bits"}
    assert same_bits(export.load(file)["w"], torch.zeros(6))
    assert torch.equal(export.load_ties(file)[0].parts[0].groups, labels)


class Buffers(nn.Module):
    def __init__(self, **buffers: Tensor) -> None:
        super().__init__()
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def test_what_another_program_reads_is_what_is_there(tmp_path):
    dtypes = [torch.bool, torch.uint8, torch.int16, torch.uint32, torch.int64, *DTYPES, torch.float8_e4m3fn]
    # Odd numbers of bytes, after which the next tensor must stand where its type may.
    model = Buffers(**{f"b{i}": normal((3,), torch.float32, i).to(dtype) for i, dtype in enumerate(dtypes)})
    export.save(model, {}, tmp_path / "model")
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in load_file(tmp_path / "model").items())
    written = (tmp_path / "model").read_bytes()
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    assert length % 8 == 0
    assert not [i for i, dtype in enumerate(dtypes) if header[f"b{i}"]["data_offsets"][0] % dtype.itemsize]
    assert all(same_bits(tensor, model.state_dict()[name]) for name, tensor in export.load(tmp_path / "model").items())


@pytest.mark.parametrize(
    "model", [nn.Module(), nn.Identity(), Buffers(a=torch.tensor(3)), Buffers(a=torch.zeros(0), b=torch.zeros(2, 0))]
)
def test_a_model_needs_no_parameters(model, tmp_path):
    export.save(model, {}, tmp_path / "model")
    assert same_tree(export.load(tmp_path / "model"), dict(model.state_dict()))
    assert export.load_ties(tmp_path / "model") == []


def test_of_two_parameters_without_entries_the_tied_one_is_named(tmp_path):
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(0, 3)) for name in "ab"})
    optimizer = TiedOptimizer(SGD(model.parameters()), {model["b"]: []})
    export.save(model, optimizer, tmp_path / "model")
    assert [tie.parts[0].param for tie in export.load_ties(tmp_path / "model")] == ["b"]


def test_a_conjugated_view_is_another_tensor_than_what_it_is_of(tmp_path):
    values = randn(4, 3, dtype=torch.complex64)
    model = Buffers(a=values, b=values.conj(), c=values.conj().imag, d=values.imag, e=values)
    export.save(model, {}, tmp_path / "model")
    state = export.load(tmp_path / "model")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert state["a"] is state["e"]


def test_weights_that_two_layers_share_are_written_once_and_shared_again(tmp_path):
    model = nn.ModuleDict({"encoder": nn.Embedding(1000, 8), "decoder": nn.Linear(8, 1000, bias=False)})
    model["decoder"].weight = model["encoder"].weight
    optimizer = TiedOptimizer(SGD(model.parameters()), {model["decoder"].weight: torch.arange(1000) // 2})
    export.save(model, optimizer, tmp_path / "model")
    state = export.load(tmp_path / "model")
    assert (tmp_path / "model").stat().st_size < 4 * 500 * 8 + 1250 + 2048
    assert state["encoder.weight"] is state["decoder.weight"]
    assert same_bits(state["encoder.weight"], model["encoder"].weight.detach())


def test_a_tied_parameter_that_is_a_buffer_too_has_the_name_of_the_parameter(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4))
    model.register_buffer("view", model[0].weight.data)
    tie_(model[0].weight, [[0, 1]])
    export.save(model, {"0.weight": [[0, 1]]}, tmp_path / "model")
    TiedOptimizer(SGD(model.named_parameters()), export.load_ties(tmp_path / "model"))
    state = export.load(tmp_path / "model")
    assert state["view"] is state["0.weight"]


def test_one_tensor_is_held_at_a_time(tmp_path, monkeypatch):
    model = nn.Sequential(*[nn.Linear(64, 64, bias=False) for _ in range(8)])
    written: list[weakref.ref[Tensor]] = []
    add = Writer.add

    def watched(self: Writer, name: str, tensor: Tensor) -> None:
        written.append(weakref.ref(tensor))
        assert sum(reference() is not None for reference in written) <= 2  # the indices, and the codebook
        add(self, name, tensor)

    monkeypatch.setattr(Writer, "add", watched)
    optimizer = TiedOptimizer(SGD(model.parameters()), {param: torch.arange(64) // 2 for param in model.parameters()})
    export.save(model, optimizer, tmp_path / "model")

    assert len(written) == 16
    given_out: list[weakref.ref[Tensor]] = []
    for _, tensor in export.stream(tmp_path / "model"):
        given_out.append(weakref.ref(tensor))
        del tensor
        assert sum(reference() is not None for reference in given_out) <= 1


def test_another_default_device_does_not_matter(tmp_path):
    model, optimizer = tied(compact=False)
    weight = tie_(randn(6, 3), [[0, 1], [2, 5]])
    with torch.device("meta"):
        export.save(model, optimizer, tmp_path / "model")
        state, ties = export.load(tmp_path / "model"), export.load_ties(tmp_path / "model")
        entries, indices = export.encode(weight, [[0, 1], [2, 5]])
    assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    assert len(ties) == len(optimizer.ties)
    assert same_bits(entries[indices], weight)


# --- files that are not as they were written ---


@given(data=st.data())
def test_a_file_that_was_altered_or_cut_off_is_refused_or_says_the_same(data, tmp_path_factory):
    model, optimizer = tied(compact=False)
    file = tmp_path_factory.mktemp("files") / "model"
    export.save(model, optimizer, file)
    written, state = file.read_bytes(), export.load(file)
    for _ in range(20):
        at = data.draw(st.integers(0, len(written) - 1))
        if data.draw(st.booleans()):
            file.write_bytes(written[:at])
        else:
            file.write_bytes(written[:at] + bytes([written[at] ^ data.draw(st.integers(1, 255))]) + written[at + 1 :])
        with contextlib.suppress(ValueError):
            assert same_tree(export.load(file), state)


def test_the_weights_of_a_file_that_was_altered_are_not_given(tmp_path):
    model, optimizer = tied(compact=False)
    file = tmp_path / "model"
    export.save(model, optimizer, file)
    written = bytearray(file.read_bytes())
    written[-1] ^= 1
    file.write_bytes(written)

    with pytest.raises(ValueError, match="as it was written"):
        export.load(file)


def test_what_was_read_stays_as_it_is_when_the_file_changes(tmp_path):
    file = tmp_path / "model"
    export.save(Buffers(a=torch.arange(5.0)), {}, file)
    state = export.load(file)
    file.write_bytes(bytes(file.stat().st_size))
    assert torch.equal(state["a"], torch.arange(5.0))


def forged(file: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Changes the metadata and the tensors of a file, and has the hashes say that they are as they were written."""
    with safe_open(file, "pt") as opened:
        contents = json.loads(opened.metadata()["tieopt"])
        tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    change(contents, tensors)
    for name, tensor in tensors.items():
        known = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        known.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
        contents["sha256"][name] = known.hexdigest()
    text = json.dumps(contents)
    hashed = hashlib.sha256(text.encode()).hexdigest()
    save_file(tensors, file, {"format": "pt", "tieopt": text, "tieopt.sha256": hashed})


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place, *(inner for key in keys for inner in places(value[key], (*place, key)))]


NONSENSE = [None, -1, 0, 1, 7, 2**70, True, 1.5, math.nan, "x", "0.weight", [], [1], [-1], [2**70], [[]], {}, {"a": 1}]


def test_metadata_that_make_no_sense_are_refused(tmp_path):
    shapes_of = {"empty": (0, 2), "one": (3, 2), "some": (4,)}
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes_of.items()})
    model.free = nn.Parameter(torch.zeros(2))
    model.alias = model.free
    file = tmp_path / "model"
    export.save(model, {"empty": [], "one": [[0, 1, 2]], "some": [[0, 1]]}, file)
    written = file.read_bytes()
    with safe_open(file, "pt") as opened:
        said = json.loads(opened.metadata()["tieopt"])
    said.pop("sha256")
    refused = 0
    for (*above, last), nonsense in itertools.product(places(said)[1:], ["remove", *NONSENSE]):

        def change(contents: dict[str, Any], _: dict[str, Tensor]) -> None:
            for key in above:  # noqa: B023 - called at once
                contents = contents[key]
            if nonsense == "remove":  # noqa: B023
                del contents[last]  # noqa: B023
            else:
                contents[last] = nonsense  # noqa: B023

        file.write_bytes(written)
        forged(file, change)
        for read in (export.load, export.load_ties):
            try:
                read(file)
            except ValueError as error:
                assert "cannot be read" in str(error)  # noqa: PT017 - a few say nothing else, and are read
                refused += 1
    assert refused > 500


@pytest.mark.parametrize(
    "other",
    [
        lambda _: torch.zeros(0),
        lambda _: torch.zeros(()),
        lambda tensor: torch.full((len(tensor) + 1, *tensor.shape[1:]), 255).to(tensor.dtype),
        lambda tensor: tensor[:-1].clone(),
        lambda tensor: tensor[None].clone(),
        lambda tensor: tensor.to(torch.complex64),
    ],
    ids=["nothing", "a number", "one more", "one less", "another shape", "another dtype"],
)
@pytest.mark.parametrize("name", ["codebook", "indices", "free", "groups", "scales", "1.codebook", "1.indices"])
def test_tensors_that_do_not_fit_each_other_are_refused(name, other, tmp_path):
    file = tmp_path / "model"
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(10, 6))})
    tie = Tie("w", torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, -1, -1]), scale=torch.tensor([1.0, -1] * 5))
    export.save(model, [tie, Tie("w", torch.tensor([-1] * 8 + [0, -1]))], file)
    export.load(file)
    export.load_ties(file)

    def change(_: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[f"w.{name}"] = other(tensors[f"w.{name}"])

    forged(file, change)
    refused = 0
    for read in (export.load, export.load_ties):
        try:
            read(file)
        except ValueError as error:
            assert "does not fit" in str(error)  # noqa: PT017 - one of the two may read it
            refused += 1
    assert refused or name == "1.codebook"  # A codebook may have an entry that no index stands for.


@pytest.mark.parametrize("text", ["", "[", "{}", "[]", "null", "3", '"a"', "[" * 100_000])
def test_metadata_that_are_others_are_refused(text, tmp_path):
    metadata = {"tieopt": text, "tieopt.sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"weight": torch.ones(2)}, tmp_path / "other", metadata)
    with pytest.raises(ValueError, match=r"tieopt\.export\.save"):
        export.load(tmp_path / "other")


READERS = [export.load, lambda file: list(export.stream(file)), export.load_ties]


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def one_group(file: Path, shape: tuple[int, ...] = (3, 2)) -> None:
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(shape))}), {"w": torch.zeros(shape[0]).long()}, file)


@pytest.mark.parametrize(("rows", "bits_each"), [(2**25, 0), (2**40, 0), (2**40, 1), (2**40, 40)])
@pytest.mark.parametrize(
    ("codebook", "columns"), [((1, 2), 2), ((0, 2), 2), ((1, 0), 0)], ids=["one entry", "none", "without numbers"]
)
def test_sizes_that_the_file_does_not_hold_are_refused_before_anything_is_made(
    rows, bits_each, codebook, columns, tmp_path
):
    file = tmp_path / "model"
    one_group(file)

    def change(contents: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        contents["tied"]["w"] = [rows, columns]
        contents["ties"][0][0].update(shape=[rows], bits=bits_each)
        tensors["w.codebook"] = torch.zeros(codebook)
        tensors["w.indices"] = torch.zeros(0 if bits_each == 0 else 64, dtype=torch.uint8)

    forged(file, change)
    for read in READERS:
        with Largest() as largest, pytest.raises(ValueError, match=r"(?s)cannot be read.*does not fit"):
            read(file)
        assert largest.bytes <= 4096


def blocks(file: Path) -> None:
    """A file with blocks of two."""
    labels = (torch.arange(40) % 10).view(5, 8)
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(5, 8))}), {"w": labels}, file)
    assert contents_of(file)["ties"][0][0]["block"] == 2


@pytest.mark.parametrize("block", [0, -2, 3, 2**70, True, 2.0, None, "2", [2]])
def test_blocks_that_no_file_has_are_refused(block, tmp_path):
    blocks(tmp_path / "model")
    forged(tmp_path / "model", lambda contents, _: contents["ties"][0][0].update(block=block))
    for read in READERS:
        with pytest.raises(ValueError, match="metadata that"):
            read(tmp_path / "model")


@pytest.mark.parametrize("block", [1, 4])
def test_blocks_that_do_not_fit_the_indices_are_refused(block, tmp_path):
    blocks(tmp_path / "model")
    forged(tmp_path / "model", lambda contents, _: contents["ties"][0][0].update(block=block))
    for read in READERS:
        with pytest.raises(ValueError, match=r"w\.indices that does not fit"):
            read(tmp_path / "model")


@pytest.mark.parametrize(
    ("codebook", "columns"),
    [((1, 2), 2), ((0, 2), 2), ((2**40, 0), 0), ((2**20 + 1,), None)],
    ids=["one entry", "none", "without numbers", "no multiple"],
)
def test_few_indices_of_large_blocks_are_refused_before_anything_is_made(codebook, columns, tmp_path):
    file = tmp_path / "model"
    one_group(file)
    size = 2**20 if columns is None else 2**40
    rest = [] if columns is None else [columns]

    def change(contents: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        contents["tied"]["w"] = [size, *rest]
        contents["ties"][0][0].update(shape=[size], bits=1, block=size)
        tensors["w.codebook"] = torch.zeros(codebook)
        tensors["w.indices"] = torch.zeros(1, dtype=torch.uint8)

    forged(file, change)
    for read in READERS:
        with Largest() as largest, pytest.raises(ValueError, match=r"(?s)cannot be read.*does not fit"):
            read(file)
        assert largest.bytes <= 4096


def test_an_index_beyond_the_blocks_is_refused(tmp_path):
    blocks(tmp_path / "model")
    forged(tmp_path / "model", lambda _, tensors: tensors["w.indices"].fill_(255))
    for read in READERS:
        with pytest.raises(ValueError, match=r"w\.indices that does not fit"):
            read(tmp_path / "model")


def test_entries_that_take_no_room_are_not_more_than_labels(tmp_path):
    file = tmp_path / "model"
    one_group(file, (3, 0))
    forged(file, lambda _, tensors: tensors.update({"w.codebook": torch.zeros(2**40, 0)}))
    for read in READERS:
        with Largest() as largest, pytest.raises(ValueError, match=r"w\.codebook that does not fit"):
            read(file)
        assert largest.bytes <= 4096


def test_indices_are_not_read_for_several_parameters(tmp_path):
    file = tmp_path / "model"
    model = nn.ParameterDict({name: nn.Parameter(torch.zeros(3, 2)) for name in "vw"})
    export.save(model, {"v": [[0, 1]], "w": [[0, 1]]}, file)
    forged(file, lambda contents, _: contents["ties"][1][0].update(key=contents["ties"][0][0]["key"]))
    for read in READERS:
        with pytest.raises(ValueError, match="metadata that"):
            read(file)


@pytest.mark.parametrize("columns", [2, 0])
def test_indices_of_no_bits_as_version_1_0_0_wrote_those_of_one_group_are_read(columns, tmp_path):
    file = tmp_path / "model"
    one_group(file, (3, columns))

    def change(contents: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        contents["ties"][0][0]["bits"] = 0
        tensors["w.indices"] = torch.zeros(0, dtype=torch.uint8)

    forged(file, change)
    assert same_bits(export.load(file)["w"], torch.zeros(3, columns))
    assert torch.equal(export.load_ties(file)[0].parts[0].groups, torch.zeros(3).long())


@pytest.mark.parametrize(
    ("key", "values"),
    [("scales", torch.tensor([1.0, math.nan])), ("groups", torch.tensor([0, -2])), ("groups", torch.ones(2).bool())],
)
def test_groups_and_scales_that_no_tie_has_are_refused(key, values, tmp_path):
    file = tmp_path / "model"
    tie = Tie("w", torch.zeros(4).long(), scale=torch.tensor([1.0, 2, 1, 2]))
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(4))}), tie, file)
    forged(file, lambda _, tensors: tensors.update({f"w.{key}": values}))
    with pytest.raises(ValueError, match=rf"w\.{key} that does not fit"):
        export.load_ties(file)


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F8_E8M0", [4], 4), ("F4", [4], 2), ("U8", [0, 2**63], 0)])
def test_tensors_that_torch_cannot_have_are_refused(dtype, shape, size, tmp_path):
    contents = {"format": "1", "ties": [], "tied": {}, "whole": ["a"], "aliases": {}, "sha256": {"a": ""}}
    text = json.dumps(contents)
    metadata = {"tieopt": text, "tieopt.sha256": hashlib.sha256(text.encode()).hexdigest()}
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": metadata, "a": entry}).encode()
    (tmp_path / "model").write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    with pytest.raises(ValueError, match="cannot be read"):
        export.load(tmp_path / "model")


def test_a_tensor_that_is_larger_than_the_memory_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "model"
    one_group(file)

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(ValueError, match=r"(?s)fit into memory.*w of shape \(3, 2\)"):
        export.load(file)


def test_shapes_that_no_tensor_has_are_refused(tmp_path):
    file = tmp_path / "model"
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 2))}), {"w": torch.zeros(3, 2).long()}, file)
    for shape, labelled in (([2**40, 2**40], [2**40, 2**40]), ([3, 2**62], [3]), ([-1, 2], [-1, 2])):

        def change(contents: dict[str, Any], _: dict[str, Tensor]) -> None:
            contents["tied"]["w"] = shape  # noqa: B023 - called at once
            contents["ties"][0][0]["shape"] = labelled  # noqa: B023

        forged(file, change)
        with pytest.raises(ValueError, match="cannot be read"):
            export.load(file)


@pytest.mark.parametrize(("key", "value"), [("dim", -1), ("dim", 2), ("dim", True), ("shape", []), ("shape", [4])])
def test_labels_of_what_is_not_there_are_refused(key, value, tmp_path):
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(3, 3))}), {"w": [[0, 1, 2]]}, tmp_path / "model")
    forged(tmp_path / "model", lambda contents, _: contents["ties"][0][0].update({key: value}))
    for read in (export.load, export.load_ties):
        with pytest.raises(ValueError, match="metadata that"):
            read(tmp_path / "model")


@pytest.mark.parametrize(("key", "value"), [("ties", [[]]), ("aliases", {"w": ["w"]})])
def test_a_tie_of_nothing_and_a_name_of_two_tensors_are_refused(key, value, tmp_path):
    export.save(nn.ParameterDict({"w": nn.Parameter(torch.zeros(3))}), {}, tmp_path / "model")
    forged(tmp_path / "model", lambda contents, _: contents.update({key: value}))
    for read in (export.load, export.load_ties):
        with pytest.raises(ValueError, match="metadata that"):
            read(tmp_path / "model")


def test_tensors_that_are_more_or_fewer_are_refused(tmp_path):
    export.save(nn.Linear(2, 2), {}, tmp_path / "model")
    with safe_open(tmp_path / "model", "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tmp_path / "model")
    for others in ({**tensors, "more": torch.zeros(1)}, {"bias": tensors["bias"]}):
        save_file(others, tmp_path / "model", metadata)
        with pytest.raises(ValueError, match=r"(?s)tensors that were written.*others: (more|weight)"):
            export.load(tmp_path / "model")


def test_another_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other")

    with pytest.raises(ValueError, match=r"tieopt\.export\.save"):
        export.load(tmp_path / "other")
    with pytest.raises(OSError, match="missing"):
        export.load(tmp_path / "missing")


def test_a_file_of_another_format_is_refused(tmp_path):
    export.save(nn.Linear(2, 2), {}, tmp_path / "model")
    forged(tmp_path / "model", lambda contents, _: contents.update(format="3"))
    with pytest.raises(ValueError, match=r"(?s)format 1 or 2.*'3'.*another version"):
        export.load(tmp_path / "model")


# --- files that are there already, or cannot be ---


def test_nothing_is_written_of_what_is_not_tied_and_what_was_there_stays(tmp_path):
    model, optimizer = tied(compact=False)
    file = tmp_path / "model"
    (tmp_path / "model.partial").write_text("somebody's")
    export.save(model, optimizer, file)
    written = file.read_bytes()
    with torch.no_grad():
        model[3].weight[0, 0] += 1

    with pytest.raises(ValueError, match=r"(?s)not tied.*again of shape \(6, 6\)"):
        export.save(model, optimizer, file)

    assert file.read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.partial"]


def test_a_file_has_the_permissions_of_others_and_is_written_behind_a_link(tmp_path):
    (tmp_path / "plain").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    export.save(nn.Linear(2, 2), {}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model", "plain"]


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
@pytest.mark.parametrize("behind", [False, True], ids=["plain", "link"])
def test_a_file_that_is_replaced_keeps_its_permissions(behind, tmp_path):
    file, target = tmp_path / "model", tmp_path / ("target" if behind else "model")
    for mode in (0o600, 0o664, 0o440):
        target.unlink(missing_ok=True)
        target.write_text("")
        target.chmod(mode)
        if behind and not file.is_symlink():
            file.symlink_to(target)
        export.save(nn.Linear(2, 2), {}, file)
        assert export.load(file).keys() == {"weight", "bias"}
        assert stat.S_IMODE(target.stat().st_mode) == mode
        assert file.is_symlink() == behind


@pytest.mark.skipif(os.name != "posix", reason="other systems have no such permissions")
def test_what_is_to_replace_a_private_file_is_private_all_along_and_gone_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "model"
    file.write_text("before")
    file.chmod(0o600)
    seen = []

    def fail(source: str, target: str) -> None:
        seen.append(stat.S_IMODE(os.stat(source).st_mode))
        raise OSError("no room")

    def copied(source: Any, whole: Any, length: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(whole.fileno()).st_mode))

    monkeypatch.setattr("tieopt.export.tensor_file.os.replace", fail)
    monkeypatch.setattr("tieopt.export.tensor_file.shutil.copyfileobj", copied)
    with pytest.raises(OSError, match="no room"):
        export.save(nn.Linear(2, 2), {}, file)
    assert seen == [0o600] * 5  # when the tensors of four sizes of entries are copied, and when it is complete
    assert file.read_text() == "before"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_written_to_any_kind_of_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in (tmp_path / "a", str(tmp_path / "b"), "c", os.fsencode("d")):
        model = nn.Linear(2, 2)
        export.save(model, {}, file)
        assert same_tree(sorted(export.load(file)), ["bias", "weight"])
    (tmp_path / "folder").mkdir()
    for file in (tmp_path / "missing" / "a", tmp_path / "folder"):
        with pytest.raises(OSError, match=tmp_path.name):
            export.save(nn.Linear(2, 2), {}, file)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "d", "folder"]


def test_of_several_that_write_at_once_one_has_written_the_file(tmp_path):
    models = [Buffers(a=torch.full((1000,), float(number))) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda model: export.save(model, {}, tmp_path / "model"), models))
    assert len(export.load(tmp_path / "model")["a"].unique()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- what cannot be written ---


def test_a_parameter_of_another_model_is_refused(tmp_path):
    _, optimizer = tied(compact=False)
    with pytest.raises(ValueError, match=r"(?s)not in the state of the model.*\(4, 6\)"):
        export.save(network(), optimizer, tmp_path / "model")


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match=r"(?s)_extra_state.*Got: +\{'a': 1\} \(dict\)"):
        export.save(Stateful(2, 2), {}, tmp_path / "model")


class Wrapper(Tensor):
    """A tensor that is made of another one, and has no memory itself."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Self:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls(args[0].inner) if function is torch.ops.aten.detach.default else NotImplemented


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.zeros(3, device="meta"),
        lambda: Wrapper(torch.zeros(3)),
        lambda: nn.parameter.UninitializedBuffer(),
        lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ],
    ids=["sparse", "meta", "wrapper", "lazy", "nested", "quantized"],
)
@pytest.mark.filterwarnings("ignore")  # of what torch says of nested and quantized tensors
def test_what_has_no_memory_is_refused(made, tmp_path):
    with pytest.raises(TypeError, match=r"(?s)b cannot be written.*dense"):
        export.save(Buffers(a=torch.zeros(2), b=made()), {}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"(?s)torch\.nn\.Module.*'model' \(str\)"):
        export.save("model", {}, tmp_path / "model")


@pytest.mark.parametrize("name", ["__metadata__", "w.codebook"])
def test_a_name_that_a_file_has_already_is_refused(name, tmp_path):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(3))})
    model.register_state_dict_post_hook(lambda _, state, *__: state.update({name: torch.zeros(2)}))
    with pytest.raises(ValueError, match=rf"(?s)one name.*Got: +{name}"):
        export.save(model, {"w": [[0, 1]]}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"(?s)safetensors.*complex128"):
        export.save(nn.Linear(2, 2, dtype=torch.complex128), {}, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    export.save(nn.Linear(2, 2), {}, tmp_path / "model")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"tieopt\[export\]"):
        export.load(tmp_path / "model")


@pytest.mark.slow
def test_a_file_is_written_without_numpy(tmp_path):
    program = f"""
        import sys, warnings
        sys.modules["numpy"] = None  # an import of it fails
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        import torch
        from tieopt import export
        export.save(torch.nn.Linear(2, 3), {{"weight": []}}, {str(tmp_path / "model")!r})
    """
    subprocess.run([sys.executable, "-c", inspect.cleandoc(program)], check=True)  # noqa: S603
    assert export.load(tmp_path / "model").keys() == {"weight", "bias"}
