"""Tied weights as codebook and indices, and files of them: what was written comes back bit for bit, or not at all."""

import contextlib
import copy
import math
import sys

import pytest
import torch
from checks import parameter, randn, same_bits, same_tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import labels, laid_out, layouts, seeds, shapes, spelled, tied_tensors
from torch import nn
from torch.optim import SGD, AdamW

from tieopt import Tie, TiedOptimizer, export, tie_

# --- in memory ---


@given(data=st.data(), shape=shapes(empty=True))
def test_decoding_gives_any_tied_tensor_back_bit_for_bit(data, shape):
    names = data.draw(labels(shape[0]))
    tensor = data.draw(tied_tensors(shape, names))
    given_as = laid_out(tensor, data.draw(layouts(tensor)))

    encoded = export.encode(given_as, data.draw(spelled(names)))

    assert same_bits(encoded.decode()[0], tensor)
    assert len(encoded.codebook) == len(names[names >= 0].unique()) + int((names < 0).sum())
    assert encoded.indices.nbytes == math.ceil(encoded.bits * len(names) / 8)


@given(data=st.data(), shape=shapes(), depth=st.integers(1, 3), seed=seeds)
def test_labels_and_scales_along_any_dimension_come_back(data, shape, depth, seed):
    dim = data.draw(st.integers(0, len(shape) - 1))
    weight = randn(*shape, seed=seed, dtype=torch.float64)
    labelled = weight.movedim(dim, 0).shape[:depth]
    generator = torch.Generator().manual_seed(seed)
    names = torch.randint(-1, 5, labelled, generator=generator)
    scale = torch.tensor([1.0, -1.0, 0.0, 0.3])[torch.randint(4, labelled, generator=generator)]
    tie_(weight, names, dim=dim, scale=scale)

    encoded = export.encode(weight, names, dim=dim, scale=scale)

    (decoded,), ((found, multiples),) = encoded.decode(), encoded.labels()
    assert same_bits(decoded, weight)
    torch.testing.assert_close(decoded, tie_(decoded.clone(), found, dim=dim, scale=multiples), rtol=0, atol=0)
    again = randn(*shape, seed=seed + 1, dtype=torch.float64)
    torch.testing.assert_close(
        tie_(again.clone(), found, dim=dim, scale=multiples), tie_(again, names, dim=dim, scale=scale)
    )


def test_the_default_device_does_not_matter(tmp_path):
    weight, names = tie_(randn(6, 4), [[0, 5], [1, 2, 3]]), torch.tensor([0, 1, 1, 1, -1, 0])
    model = nn.Linear(4, 6)
    with torch.no_grad():
        model.weight.copy_(weight)
    with torch.device("meta"):
        encoded = export.encode(weight, names)
        assert same_bits(encoded.decode()[0], weight)
        assert encoded.labels()[0][0].tolist() == names.tolist()
        export.save(tmp_path / "model.safetensors", model, Tie(model.weight, names))
        loaded = export.load(tmp_path / "model.safetensors")
        assert all(same_bits(loaded[name], value) for name, value in model.state_dict().items())


@given(width=st.integers(0, 20), count=st.integers(0, 50), seed=seeds)
def test_packed_numbers_are_unpacked(width, count, seed):
    numbers = torch.randint(2**width, (count,), generator=torch.Generator().manual_seed(seed))

    packed = export._packed(numbers, width)

    assert len(packed) == math.ceil(width * count / 8)
    assert torch.equal(export._unpacked(packed, width, count), numbers)


def test_numbers_are_packed_in_chunks_without_gaps(monkeypatch):
    numbers = torch.arange(100) % 8
    whole = export._packed(numbers, 3)
    monkeypatch.setattr(export, "_CHUNK", 16)

    assert torch.equal(export._packed(numbers, 3), whole)
    assert torch.equal(export._unpacked(whole, 3, 100), numbers)


def test_what_is_not_tied_is_refused():
    with pytest.raises(ValueError, match=r"(?s)not tied.*the tensor of shape \(7, 5\).*tie_weights"):
        export.encode(parameter(7, 5), [[0, 3]])


def test_indices_that_lead_out_of_the_codebook_are_refused():
    encoded = export.encode(tie_(randn(7, 5), [[0, 3]]), [[0, 3]])
    with pytest.raises(ValueError, match="out of the codebook"):
        encoded._replace(codebook=encoded.codebook[:-1]).decode()


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


def test_a_trained_model_comes_back_bit_for_bit_with_its_ties(tmp_path, compact):
    model, optimizer = tied(compact)
    file = tmp_path / "model.safetensors"

    export.save(file, model, optimizer)

    state = export.load(file)
    assert state.keys() == model.state_dict().keys()
    assert all(same_bits(state[name], tensor) for name, tensor in model.state_dict().items())
    other = network(seed=9)
    other.load_state_dict(state)
    before = copy.deepcopy(other.state_dict())
    again = TiedOptimizer(SGD(other.named_parameters(), lr=0.1), export.ties(file), compact=compact)
    assert same_tree(other.state_dict(), before)  # It was tied.
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            theirs.copy_(mine.copy_(randn(*mine.shape, seed=4)))
    optimizer.tie_weights()
    again.tie_weights()
    assert all(map(same_bits, model.parameters(), other.parameters()))


def test_names_and_an_optimizer_say_the_same(tmp_path):
    model = network()
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {model[2].weight: [[0, 1]]})

    export.save(tmp_path / "one", model, optimizer)
    export.save(tmp_path / "other", model, {"2.weight": [[0, 1]]})

    with safe_open(tmp_path / "one", "pt") as one, safe_open(tmp_path / "other", "pt") as other:
        assert one.metadata() == other.metadata()
        assert {"2.weight.codebook", "2.weight.indices", "2.weight.groups"} <= set(one.keys())
        assert "2.weight" not in one.keys()  # noqa: SIM118 - it is no mapping


def test_a_codebook_of_two_values_takes_a_bit_for_each_weight(tmp_path):
    model = nn.Linear(256, 256, bias=False)
    export.save(tmp_path / "dense", model, {})
    export.save(
        tmp_path / "coded",
        model,
        TiedOptimizer(SGD(model.parameters()), {model.weight: torch.arange(256**2).view(256, 256) % 2}),
    )

    dense, coded = ((tmp_path / name).stat().st_size for name in ("dense", "coded"))
    assert dense >= 4 * 256**2
    assert coded <= 256**2 / 8 + 1024


@given(data=st.data())
def test_a_file_that_was_altered_or_cut_off_is_refused_or_says_the_same(data, tmp_path_factory):
    model, optimizer = tied(compact=False)
    file = tmp_path_factory.mktemp("files") / "model"
    export.save(file, model, optimizer)
    written, state = file.read_bytes(), export.load(file)
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
    export.save(file, model, optimizer)
    written = bytearray(file.read_bytes())
    written[-1] ^= 1
    file.write_bytes(written)

    with pytest.raises(ValueError, match="as it was written"):
        export.load(file)


def test_another_file_is_refused(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "other")

    with pytest.raises(ValueError, match=r"tieopt\.export\.save"):
        export.load(tmp_path / "other")
    with pytest.raises(OSError, match="missing"):
        export.load(tmp_path / "missing")


def test_nothing_is_written_of_what_is_not_tied_and_what_was_there_stays(tmp_path):
    model, optimizer = tied(compact=False)
    file = tmp_path / "model"
    export.save(file, model, optimizer)
    written = file.read_bytes()
    with torch.no_grad():
        model[3].weight[0, 0] += 1

    with pytest.raises(ValueError, match=r"(?s)not tied.*again of shape \(6, 6\)"):
        export.save(file, model, optimizer)

    assert file.read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_parameter_of_another_model_is_refused(tmp_path):
    _, optimizer = tied(compact=False)
    with pytest.raises(ValueError, match=r"(?s)not in the state of the model.*\(4, 6\)"):
        export.save(tmp_path / "model", network(), optimizer)


def test_a_state_that_is_no_tensor_is_refused(tmp_path):
    class Stateful(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match=r"(?s)_extra_state.*Got: +dict"):
        export.save(tmp_path / "model", Stateful(2, 2), {})


def test_a_dtype_that_the_format_does_not_have_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"(?s)safetensors.*complex128"):
        export.save(tmp_path / "model", nn.Linear(2, 2, dtype=torch.complex128), {})
    assert not list(tmp_path.iterdir())


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"tieopt\[export\]"):
        export.save(tmp_path / "model", nn.Linear(2, 2), {})
