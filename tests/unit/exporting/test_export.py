"""`loraio.export`: a file that computes the same as the network, or no file."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import loraio
from loraio.bases.networks import resize_heads
from loraio.errors import ConfigError, FormatError, OutputError, OutputExistsError, UnknownNameError, VerificationError
from loraio.exporting import export

FORMATS = sorted(export.RUNTIMES)

EXPORTED = {"rtol": 1e-5, "atol": 1e-5}
"""onnxruntime sums float32 in another order than torch; logits are about 10."""

OWN = """
import torch
from torch import nn


class Pair(nn.Module):
    def __init__(self, form="tuple"):
        super().__init__()
        self.form = form
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        row = self.fc(x.flatten(1))
        total = row.sum(1)
        return {
            "tuple": (row, total),
            "list": [row, total],
            "dict": {"row": row, "total": total},
            "nested": (row, (total,)),
            "none": None,
            "mean": row.mean(0),
            "empty": row[:, :0],
            "mask": row > 0,
        }[self.form]


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)) if x.sum() > 0 else x.flatten(1)[:, :4]
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Writes a checkpoint of a network of the user's own; returns the options of `export` for it."""
    (tmp_path / "own_pair.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_pair", raising=False)

    def write(name: str, **args: Any) -> dict[str, Any]:
        path = tmp_path / "own.safetensors"
        loraio.save_base(loraio.build_network(f"own_pair:{name}", args=args, seed=1), path, overwrite=True)
        options = {"checkpoint": path, "model": f"own_pair:{name}", "model_args": args}
        return {**options, "output": tmp_path / "own.pt2", "input_shape": (2, 3)}

    return write


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check_answers(path: Path, network: nn.Module) -> None:
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(run(path, x)[0].detach(), network(x).detach(), **EXPORTED)


def run(path: Path, x: Tensor) -> list[Tensor]:
    """Run the file."""
    if path.suffix == ".pt2":
        with path.open("rb") as file:
            given = torch.export.load(file).module()(x)
        return list(given) if isinstance(given, tuple) else [given]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(array) for array in session.run(None, {"input": x.numpy()})]


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_merged_network_leaves_for_batches_of_any_size(
    files: Path, out: Path, suffix: str, digits_test: loraio.Dataset
) -> None:
    path = out / f"merged{suffix}"
    done = loraio.export(files / "merged.safetensors", path, batches=[5])
    assert names(out) == [path.name]
    assert (done.path, done.format, done.bytes) == (path, suffix[1:], path.stat().st_size)
    assert (done.network, done.input_shape, done.batches, done.stripped) == ("digit-cnn", (1, 28, 28), (1, 3, 5), "")
    (output,) = done.outputs
    assert (output.name, output.shape, output.argmax_agreement) == ("output", (10,), 1.0)
    assert done.max_abs == output.max_abs <= output.bound
    network, base = (loraio.load_base(files / f"{name}.safetensors") for name in ("merged", "base"))
    for count in (1, 2, 3, 64):
        images = digits_test.images[:count]
        with torch.no_grad():
            expected = network(images)
            before = base(images)
        (found,) = run(path, images)
        torch.testing.assert_close(found.detach(), expected, **EXPORTED)
        assert not torch.allclose(expected, before, atol=0.5)


def test_an_onnx_file_has_names_the_opset_and_the_weights(files: Path, out: Path) -> None:
    path = out / "merged.onnx"
    assert loraio.export(files / "merged.safetensors", path, opset=18).opset == 18
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    for value, name, sizes in (
        (model.graph.input[0], "input", ["batch", 1, 28, 28]),
        (model.graph.output[0], "output", ["batch", 10]),
    ):
        dims = value.type.tensor_type.shape.dim
        assert (value.name, [dim.dim_param or dim.dim_value for dim in dims]) == (name, sizes)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, tensor in loraio.read_base(files / "merged.safetensors").state.items():
        assert np.array_equal(stored[name], tensor.numpy())


def test_a_wrong_opset_is_refused(files: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="opset"):
        loraio.export(files / "merged.safetensors", out / "m.onnx", opset=9999)
    with pytest.raises(ConfigError, match=r"an opset, 18, is for \*.onnx"):
        loraio.export(files / "merged.safetensors", out / "m.pt2", opset=18)
    assert names(out) == []


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_bytes_depend_on_nothing_but_the_network(files: Path, out: Path, suffix: str) -> None:
    first, second = out / f"first{suffix}", out / f"another name{suffix}"
    for path, seed in ((first, 1), (second, 2)):
        loraio.export(files / "merged.safetensors", path, seed=seed, batches=[seed])
    assert first.read_bytes() == second.read_bytes()
    for place in (str(Path(loraio.__file__).parent), str(files), str(out), str(Path(torch.__file__).parent)):
        assert place.encode() not in first.read_bytes()


def with_other_weight(network: nn.Module) -> None:
    network.get_parameter("conv2.weight").data[0, 0, 0, 0] += 1e-2


def with_another_head(network: nn.Module) -> None:
    resize_heads(network, {"fc": 11})


@pytest.mark.parametrize(
    ("mutate", "suffix"), [(with_other_weight, ".onnx"), (with_other_weight, ".pt2"), (with_another_head, ".pt2")]
)
def test_a_file_that_computes_something_else_does_not_stay(
    files: Path, out: Path, mutate: Callable[[nn.Module], None], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = export._trace

    def wrong(network: nn.Module, example: Tensor) -> Any:
        other = copy.deepcopy(network)
        mutate(other)
        return traced(other, example)

    monkeypatch.setattr(export, "_trace", wrong)
    path = out / f"m{suffix}"
    path.write_bytes(b"mine")
    with pytest.raises(VerificationError, match="computes something else; nothing was written") as caught:
        loraio.export(files / "merged.safetensors", path, overwrite=True)
    assert "'output': the largest difference is" in caught.value.problems[0]
    assert names(out) == [path.name]
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_for_one_batch_size_does_not_stay(
    files: Path, out: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fixed(network: nn.Module, example: Tensor) -> Any:
        return torch.export.export(network, (example,))

    monkeypatch.setattr(export, "_trace", fixed)
    with pytest.raises(VerificationError, match="cannot be run; nothing was written"):
        loraio.export(files / "merged.safetensors", out / f"m{suffix}")
    assert names(out) == []


@pytest.mark.parametrize("place", ["_trace", "_run_file"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_where_it_ends_early(
    files: Path, out: Path, place: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        assert len(names(out)) == 1  # the temporary file
        raise error

    monkeypatch.setattr(export, place, stop)
    with pytest.raises(error):
        loraio.export(files / "merged.safetensors", out / "m.pt2")
    assert names(out) == []


def test_the_tolerance_is_what_was_asked_for(files: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export._run_file

    def off(*arguments: Any) -> list[list[Tensor]]:
        return [[outputs[0] + 0.25, *outputs[1:]] for outputs in found(*arguments)]

    monkeypatch.setattr(export, "_run_file", off)
    merged = files / "merged.safetensors"
    for options in ({}, {"atol": 0.24}, {"rtol": 1e-3}, {"rtol": 0, "atol": 0}):
        with pytest.raises(VerificationError, match="may be"):
            loraio.export(merged, out / "m.pt2", **options)
    done = loraio.export(merged, out / "m.pt2", rtol=0, atol=0.26)
    assert done.outputs[0].bound == 0.26
    assert done.max_abs == pytest.approx(0.25, abs=1e-5)
    assert loraio.export(merged, out / "n.pt2", rtol=0.5).max_abs == done.max_abs


def test_a_sharded_checkpoint_with_the_names_of_a_wrapper(
    base: nn.Module, files: Path, out: Path, tmp_path: Path, write_parts: Callable[..., Path]
) -> None:
    state = {f"module.{name}": tensor for name, tensor in base.state_dict().items()}
    index = write_parts(state, tmp_path / "parts")
    with pytest.raises(UnknownNameError, match="does not say which network"):
        loraio.export(index, out / "sharded.pt2")
    done = loraio.export(index.parent, out / "sharded.pt2", model="digit-cnn")
    assert done.stripped == "module."
    check_answers(done.path, base)
    merged = loraio.merge_file(index, files / "three.safetensors", tmp_path / "merged")
    assert len(merged.parts) == 2
    done = loraio.export(tmp_path / "merged", out / "merged.pt2")  # names its network
    check_answers(done.path, loraio.load_base(files / "merged.safetensors"))


def test_a_network_with_a_head_of_its_own(base: nn.Module, out: Path, tmp_path: Path) -> None:
    resize_heads(base, {"fc": 4})
    loraio.save_base(base, tmp_path / "head.safetensors")
    done = loraio.export(tmp_path / "head.safetensors", out / "head.pt2")
    assert done.outputs[0].shape == (4,)
    check_answers(done.path, base)


def test_a_network_of_another_size_and_library(out: Path, tmp_path: Path) -> None:
    network = loraio.build_network("torchvision:squeezenet1_1", args={"num_classes": 5}, seed=1)
    loraio.save_base(network, tmp_path / "base.safetensors")
    done = loraio.export(tmp_path / "base.safetensors", out / "small.pt2", input_shape=[3, 64, 48])
    assert (done.network, done.input_shape) == ("torchvision:squeezenet1_1", (3, 64, 48))
    torch.save(network.state_dict(), tmp_path / "base.pt")
    again = loraio.export(
        tmp_path / "base.pt",
        out / "again.pt2",
        model="torchvision:squeezenet1_1",
        model_args={"num_classes": 5},
        input_shape=[3, 64, 48],
    )
    assert again.path.read_bytes() == done.path.read_bytes()


@pytest.mark.parametrize("form", ["tuple", "list", "dict"])
def test_several_outputs_are_compared_one_by_one(own: Callable[..., Any], form: str) -> None:
    done = loraio.export(**own("Pair", form=form))
    expected = ["row", "total"] if form == "dict" else ["output_0", "output_1"]
    assert [(output.name, output.shape, output.argmax_agreement) for output in done.outputs] == [
        (expected[0], (4,), 1.0),
        (expected[1], (), None),
    ]
    assert done.max_abs <= 1e-6


def test_the_outputs_of_an_onnx_file_have_their_names(own: Callable[..., Any], out: Path) -> None:
    loraio.export(**own("Pair", form="dict") | {"output": out / "pair.onnx"})
    assert [output.name for output in onnx.load(out / "pair.onnx").graph.output] == ["row", "total"]


def test_one_wrong_output_of_several_is_named(own: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = export._run_file
    monkeypatch.setattr(
        export, "_run_file", lambda *arguments: [[row, total[:, None]] for row, total in found(*arguments)]
    )
    with pytest.raises(VerificationError) as caught:
        loraio.export(**own("Pair"))
    (problem,) = caught.value.problems
    assert problem.startswith("'output_1': the largest difference is inf")


def test_an_output_of_truth_values_is_compared(own: Callable[..., Any]) -> None:
    (output,) = loraio.export(**own("Pair", form="mask")).outputs
    assert (output.shape, output.max_abs, output.argmax_agreement) == ((4,), 0, 1)


@pytest.mark.parametrize(
    ("name", "form", "words"),
    [
        ("Pair", "nested", "gives tuple, not a tensor nor a flat tuple, list or dict"),
        ("Pair", "none", "gives NoneType"),
        ("Pair", "mean", r"is \(4,\) for 1 samples, not a row of numbers for each"),
        ("Pair", "empty", r"is \(1, 0\) for 1 samples"),
        ("Branching", None, r"torch\.export cannot export the network: "),
    ],
)
def test_networks_of_another_form_are_refused(own: Callable[..., Any], name: str, form: str | None, words: str) -> None:
    options = own(name, **({"form": form} if form else {}))
    before = names(options["output"].parent)
    with pytest.raises(ConfigError, match=words):
        loraio.export(**options)
    assert names(options["output"].parent) == before


def test_inputs_that_are_not_known_or_do_not_fit_are_refused(own: Callable[..., Any], files: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="the input shape of 'own_pair:Pair' is not known") as caught:
        loraio.export(**own("Pair") | {"input_shape": None})
    assert "--input-shape" in caught.value.hint
    with pytest.raises(ConfigError, match=r"does not take inputs of shape \(1, 3, 28, 28\)"):
        loraio.export(files / "merged.safetensors", out / "m.pt2", input_shape=(3, 28, 28))
    assert names(out) == []


def test_settings_outside_their_range_are_refused(files: Path, out: Path) -> None:
    options: list[dict[str, Any]] = [
        {"batches": [0]}, {"batches": [2.5]}, {"input_shape": (1, -28)}, {"atol": -1}, {"rtol": float("nan")},
    ]  # fmt: skip
    for option in options:
        with pytest.raises(ConfigError):
            loraio.export(files / "merged.safetensors", out / "m.pt2", **option)


def test_a_network_that_gives_no_numbers_is_refused(base: nn.Module, out: Path, tmp_path: Path) -> None:
    base.get_parameter("fc.bias").data[0] = torch.nan
    loraio.save_base(base, tmp_path / "nan.safetensors")
    with pytest.raises(ConfigError, match="NaN or infinite"):
        loraio.export(tmp_path / "nan.safetensors", out / "m.pt2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_torch_takes_every_dtype(base: nn.Module, out: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    loraio.save_base(base.to(dtype), tmp_path / "base.safetensors")
    done = loraio.export(tmp_path / "base.safetensors", out / "m.pt2")
    assert done.max_abs == 0
    (found,) = run(done.path, torch.zeros(2, 1, 28, 28, dtype=dtype))
    assert found.dtype == dtype


@pytest.mark.slow
def test_onnx_takes_the_dtypes_that_onnxruntime_has(base: nn.Module, out: Path, tmp_path: Path) -> None:
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16), ("double", torch.float64)):
        loraio.save_base(copy.deepcopy(base).to(dtype), tmp_path / f"{name}.safetensors")
    loraio.export(tmp_path / "half.safetensors", out / "m.onnx")
    assert onnx.load(out / "m.onnx").graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    with pytest.raises(ConfigError, match="bfloat16, which onnxruntime does not take") as refused:
        loraio.export(tmp_path / "brain.safetensors", out / "no.onnx")
    assert refused.value.hint == "name the output *.pt2"
    with pytest.raises(VerificationError, match=r"cannot be run.*NOT_IMPLEMENTED"):  # convolutions of float64
        loraio.export(tmp_path / "double.safetensors", out / "no.onnx")
    assert names(out) == ["m.onnx"]


def test_too_many_weights_for_one_onnx_file_are_refused(
    files: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * 113_162
    monkeypatch.setattr(export.onnx, "MAX_BYTES", weights - 1)
    with pytest.raises(ConfigError, match=r"452,648 bytes of weights, one ONNX file holds 452,647 at most"):
        loraio.export(files / "merged.safetensors", out / "m.onnx")
    assert names(out) == []


@pytest.mark.parametrize("package", export.onnx.PACKAGES)
def test_a_missing_package_is_named_with_its_extra(
    files: Path, out: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"ONNX needs the package {package}") as caught:
        loraio.export(files / "merged.safetensors", out / "m.onnx")
    assert caught.value.hint == "pip install 'loraio[onnx]'"
    loraio.export(files / "merged.safetensors", out / "m.pt2")
    assert names(out) == ["m.pt2"]


def test_wrong_outputs_and_inputs_are_refused(files: Path, out: Path, write_parts: Callable[..., Path]) -> None:
    merged, path = files / "merged.safetensors", out / "m.pt2"
    path.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists"):
        loraio.export(merged, path)
    shutil.copy(merged, path)
    with pytest.raises(OutputExistsError, match="is also an input"):
        loraio.export(path, path, overwrite=True)
    assert path.read_bytes() == merged.read_bytes()
    with pytest.raises(OutputError, match="does not exist"):
        loraio.export(merged, out / "no/m.pt2")
    loraio.export(merged, path, overwrite=True)
    assert path.read_bytes() != merged.read_bytes()
    for name in ("m", "m.txt", "m.safetensors"):
        with pytest.raises(UnknownNameError, match=r"no export format .* Known: \.onnx, \.pt2"):
            loraio.export(merged, out / name)
    assert names(out) == ["m.pt2"]
    with pytest.raises(FormatError, match="is an adapter, not a base model"):
        loraio.export(files / "three.safetensors", path, overwrite=True)
