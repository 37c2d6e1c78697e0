"""The programs of docs/how-to/deploy.md, and what the page says beside them."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from tieopt import Tie, TiedOptimizer, patterns, tie_

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"

# coremltools has not been tested with this torch, and says so; torchao names what it will remove.
pytestmark = pytest.mark.filterwarnings("ignore")


def program(name: str, **how: Any) -> dict[str, Any]:
    """Run a program of the page and return its names; it prints only with ``run_name="__main__"``."""
    package = "coremltools" if name == "coreml" else "torchao"
    pytest.importorskip(package)
    return runpy.run_path(str(HOW_TO / f"deploy_{name}.py"), **how)


@pytest.mark.parametrize("name", ["coreml", "codebook", "qat"])
def test_programs_print_what_the_page_shows(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    program(name, run_name="__main__")
    assert f"```text\n{capsys.readouterr().out}```" in (HOW_TO / "deploy.md").read_text(encoding="utf-8")


def test_core_ml_leaves_small_weights_dense_unless_told(tmp_path: Path) -> None:
    names = program("coreml")
    converted = names["convert"](names["model"], names["images"][:1])
    default, everything = names["palettize"](converted), names["palettize"](converted, weight_threshold=0)
    metadata = names["coreml"].get_weights_metadata
    assert sum("lut" in name for name in metadata(default, weight_threshold=0)) == 1
    assert sum("lut" in name for name in metadata(everything, weight_threshold=0)) > 1
    names["saved"](everything, tmp_path / "all.mlpackage")
    for read, weight in zip(names["weights_in"](tmp_path / "all.mlpackage"), names["weights"], strict=True):
        assert torch.equal(read, weight.half())


def test_core_ml_keeps_the_clusters_of_each_channel(tmp_path: Path) -> None:
    names = program("coreml")
    ct = names["ct"]
    model = nn.Sequential(nn.Linear(256, 256))
    tie_(model[0].weight.data, patterns.clusters(model[0].weight, 16, of="values", per="channel"))
    target = {"compute_precision": ct.precision.FLOAT32, "minimum_deployment_target": ct.target.iOS18}
    converted = names["convert"](model, torch.zeros(1, 256), **target)
    per_channel = names["palettize"](converted, granularity="per_grouped_channel", group_size=1)
    sizes = [names["saved"](made, tmp_path / "made.mlpackage") for made in (converted, names["palettize"](converted))]
    assert sizes[1] > 0.9 * sizes[0]
    assert names["saved"](per_channel, tmp_path / "made.mlpackage") < sizes[0] / 4
    (weight,) = names["weights_in"](tmp_path / "made.mlpackage")
    assert torch.equal(weight, model[0].weight)


def test_core_ml_stores_subvectors_entry_by_entry(tmp_path: Path) -> None:
    names = program("coreml")
    model = nn.Sequential(nn.Linear(256, 256))
    tie_(model[0].weight.data, patterns.clusters(model[0].weight, 16, of=4))
    converted = names["convert"](model, torch.zeros(1, 256), compute_precision=names["ct"].precision.FLOAT32)
    six_bits = 6 * 256**2 // 8
    assert six_bits < names["saved"](names["palettize"](converted), tmp_path / "made.mlpackage") < six_bits + 5000
    (weight,) = names["weights_in"](tmp_path / "made.mlpackage")
    assert torch.equal(weight, model[0].weight)


def test_core_ml_stores_equal_parameters_once(tmp_path: Path) -> None:
    names = program("coreml")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))

    def size() -> int:
        return names["saved"](names["convert"](model, torch.zeros(1, 256)), tmp_path / "made.mlpackage")

    before = size()
    TiedOptimizer(SGD(model.named_parameters(), lr=0.1), Tie.equal("0.weight", "2.weight"))
    assert size() < before - 2 * 256**2 + 1000


def test_codebook_tensors_serve_an_embedding_of_fewer_values() -> None:
    names = program("codebook")
    torch.manual_seed(0)
    embedding = nn.Embedding(64, 32)
    labels = patterns.clusters(embedding.weight, 11, of="values")
    tie_(embedding.weight.data, labels)
    words = torch.arange(64)
    expected = embedding(words)
    embedding.weight = nn.Parameter(names["quantized"](embedding.weight, labels), requires_grad=False)
    assert torch.equal(embedding(words), expected)


def test_the_other_codebook_tensor_computes_the_same_and_is_saved_dense(tmp_path: Path) -> None:
    names = program("codebook")
    from torchao.prototype.quantization.codebook import CodebookQuantizedTensor

    weight = names["layer"].weight.detach()
    codebook, codes = names["export"].encode(weight, names["labels"])
    ones = torch.ones(256, 1, 1)
    tensor = CodebookQuantizedTensor(
        codes.byte(), codebook.view(16, 1, 1), (1, 1), ones, weight.shape, dtype=weight.dtype
    )
    assert torch.equal(tensor.dequantize(), weight)
    torch.save(tensor, tmp_path / "tensor")
    assert (tmp_path / "tensor").stat().st_size > weight.nbytes


@pytest.mark.parametrize("prepared_first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("columns", [64, 256])
def test_values_of_a_whole_matrix_stay_where_all_rows_have_one_scale(columns: int, prepared_first: bool) -> None:
    names = program("qat")
    config, step = names["Int8DynamicActivationIntxWeightConfig"](torch.int8, names["PerAxis"](0)), names["QATConfig"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, 256))
    weight, bias = model.parameters()
    labels = patterns.clusters(weight, 16, of="values")
    if prepared_first:
        names["quantize_"](model, step(config, step="prepare"))
    optimizer = TiedOptimizer(SGD(model.parameters(), lr=0.1), {weight: labels})
    if not prepared_first:
        names["quantize_"](model, step(config, step="prepare"))
    assert model[0].weight is weight
    assert model[0].bias is bias
    model(torch.randn(8, columns)).square().mean().backward()
    optimizer.step()
    assert optimizer.tie_drift() == 0
    assert len(weight.unique()) == 16
    names["quantize_"](model, step(config, step="convert"))
    quantised = model[0].weight.dequantize()
    one_scale = len(model[0].weight.scale.unique()) == 1
    assert one_scale == (columns == 256)
    assert len(quantised.unique()) == (16 if one_scale else 31)
    assert names["most_values"](quantised) == 16
