"""Packed weights against `F.linear`, and what a row's bits depend on."""

import timeit
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqmodels import kernels, stepper
from seqmodels.config import Weights
from seqmodels.errors import ConfigError
from seqmodels.kernels import LINEAR, Int8Linear, Linear, PackedLinear, PackedLstm, packed
from seqmodels.state import State
from seqmodels.stepper import Group, Stepper
from tests.seqmodels.builders import RECURRENCES, make_language_model, make_translator
from tests.seqmodels.gpu import check_16_bits


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2048), (512, 7700), (33, 5), (1, 1)])
def test_packed_equals_linear(inputs: int, outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(outputs, inputs), torch.randn(outputs) if bias else None
    packed, x = PackedLinear(weight, offset), torch.randn(7, inputs)
    assert torch.allclose(packed(x), F.linear(x, weight, offset), atol=1e-5 * inputs**0.5, rtol=1e-4)


@pytest.mark.parametrize(("inputs", "outputs"), [(768, 2048), (512, 7700), (33, 5), (1, 1), (7, 64)])
def test_int8_is_near_linear_and_exact_on_whole_numbers(inputs: int, outputs: int) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(9, inputs)
    expected = F.linear(x, weight, bias)
    error = (Int8Linear(weight, bias)(x) - expected).norm() / expected.norm()
    assert error < 0.02
    whole, numbers = torch.randint(-127, 128, (outputs, inputs)).float(), torch.randint(-127, 128, (9, inputs)).float()
    whole[:, 0] = numbers[:, 0] = 127.0  # so that every scale is 1
    assert torch.equal(Int8Linear(whole)(numbers), F.linear(numbers.double(), whole.double()).float())


def test_int8_rows_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(0)
    linear, x = (
        Int8Linear(torch.randn(300, 64), torch.randn(300)),
        torch.randn(64, 64) * torch.logspace(-3, 3, 64)[:, None],
    )
    together = linear(x)
    for first, count in ((0, 4), (3, 5), (17, 31), (60, 4)):
        assert torch.equal(linear(x[first : first + count].contiguous()), together[first : first + count])


def test_int8_is_the_same_with_signed_inputs_where_there_is_no_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, x = torch.randn(64, 33), torch.randn(64), torch.randn(9, 33)
    here = Int8Linear(weight, bias)(x)
    for there in {False, kernels.has_vnni()}:
        monkeypatch.setattr(kernels, "has_vnni", lambda there=there: there)
        assert torch.equal(Int8Linear(weight, bias)(x), here)


@pytest.mark.skipif(not kernels.has_vnni(), reason="this CPU has no 8-bit dot products")
def test_int8_has_a_kernel_of_its_own() -> None:
    """Where oneDNN has none, it takes a thousand times as long as float32 and not a half."""
    weight, x = torch.randn(2048, 768), torch.randn(16, 768)
    float32, int8 = PackedLinear(weight), Int8Linear(weight)
    fastest = {
        linear: min(timeit.repeat(lambda linear=linear: linear(x), number=1, repeat=9)) for linear in (float32, int8)
    }
    assert fastest[int8] < 10 * fastest[float32]


def test_rows_of_nothing_are_the_bias() -> None:
    bias = torch.randn(5)
    assert torch.equal(Int8Linear(torch.zeros(5, 3), bias)(torch.zeros(4, 3)), bias.expand(4, -1))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit weights on this CPU: the arithmetic of a GPU, whose products of 16-bit numbers are summed in float32."""
    monkeypatch.setattr(kernels, "_on_gpu", lambda weight: True)
    monkeypatch.setattr(kernels, "_float32_product", lambda x, weight: x.float() @ weight.float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("weights", "error"), [("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_16_bits_are_near_linear_and_give_float32(weights: Weights, error: float, bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset, x = torch.randn(300, 64), torch.randn(300) if bias else None, torch.randn(9, 64)
    expected, found = F.linear(x, weight, offset), LINEAR[weights](weight, offset)(x)
    assert found.dtype == torch.float32
    assert (found - expected).norm() / expected.norm() < error


@pytest.mark.parametrize("kind", ["lstm", "gru", "normalised LSTM", "min_lstm"])
@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_16_bits_choose_as_float32_does(weights: Weights, kind: str) -> None:
    sizes = {"vocab_size": 500, "hidden_size": 64, "embedding_size": 32}
    check_16_bits(make_translator(1, **RECURRENCES[kind], **sizes), weights)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_weight_too_large_for_float16() -> None:
    large = torch.full((3, 3), 1e5)
    with pytest.raises(ConfigError, match="use bfloat16"):
        LINEAR["float16"](large)
    assert LINEAR["bfloat16"](large)(torch.ones(2, 3)).isfinite().all()


@pytest.mark.parametrize("weights", ["float16", "bfloat16"])
def test_16_bits_need_a_gpu(weights: Weights) -> None:
    with pytest.raises(ConfigError, match="need a CUDA device; use float32 or int8"):
        LINEAR[weights](torch.ones(2, 2))


def test_weights_of_no_known_type() -> None:
    with pytest.raises(ConfigError, match="decoder_weights is 'int4'; choose one of float32, int8"):
        Stepper(make_translator(0), "int4")  # type: ignore[arg-type]


@pytest.mark.parametrize("linear", [PackedLinear, Int8Linear])
def test_plus_stands_in_place_of_the_bias(linear: Callable[..., Linear]) -> None:
    weight, bias, x, plus = torch.randn(64, 32), torch.randn(64), torch.randn(8, 32), torch.randn(8, 64)
    expected = linear(weight)(x) + plus
    torch.testing.assert_close(linear(weight, bias)(x, plus.clone()), expected)
    assert torch.equal(linear(weight)(x, plus.clone()), linear(weight, bias)(x, plus.clone()))


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "steps"), [(4, 1), (4, 12), (16, 31), (33, 7)])
@pytest.mark.parametrize(("width", "hidden"), [(13, 7), (24, 32), (256, 256)])
def test_a_packed_lstm_gives_the_bits_of_the_plain_one(rows: int, steps: int, width: int, hidden: int) -> None:
    layer = nn.LSTM(width, hidden, batch_first=True)
    x, first = torch.randn(rows, steps, width), (torch.randn(1, rows, hidden), torch.randn(1, rows, hidden))
    (y, after), (expected, expected_after) = PackedLstm(layer)(x, first), layer(x, first)
    assert torch.equal(y, expected)
    assert all(torch.equal(one, two) for one, two in zip(after, expected_after, strict=True))


def test_packing_leaves_the_model_as_it_is() -> None:
    model = make_translator(0)
    before = [type(module) for module in model.modules()]
    twin = packed(model)
    assert [type(module) for module in model.modules()] == before
    assert PackedLstm in {type(module) for module in twin.modules()} and PackedLstm not in before


@torch.inference_mode()
@pytest.mark.parametrize(("inputs", "outputs"), [(37, 1), (64, 17), (13, 3)])
def test_rows_of_a_packed_layer_do_not_depend_on_their_number(inputs: int, outputs: int) -> None:
    layer, x = nn.Linear(inputs, outputs), torch.randn(16, 12, inputs)
    twin = packed(layer)
    together = twin(x)
    assert torch.allclose(together, layer(x), atol=1e-5)
    for first, count in ((0, 4), (3, 5), (1, 7)):
        assert torch.equal(twin(x[first : first + count]), together[first : first + count])
        assert torch.equal(twin(x[first : first + count, 0]), together[first : first + count, 0])


@torch.inference_mode()
@pytest.mark.parametrize("kind", RECURRENCES)
def test_what_the_first_layer_makes_of_tokens_may_be_looked_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_language_model(3, vocab_size=40, recurrent={**RECURRENCES[kind], "hidden_size": 8})
    looked_up = Stepper(model)
    monkeypatch.setattr(stepper, "LARGEST_TABLE", 0)
    computed = Stepper(model)
    assert looked_up._looks_up and not computed._looks_up
    tokens, state, groups = torch.arange(8), State(torch.randn(8, looked_up.state_width)), [Group(8, 1)]
    for one, two in zip(
        looked_up.step(tokens, state, groups)[:2], computed.step(tokens, state, groups)[:2], strict=True
    ):
        torch.testing.assert_close(_tensor(one), _tensor(two))


def _tensor(given: list[torch.Tensor] | State) -> torch.Tensor:
    return given.values if isinstance(given, State) else given[0]
