"""Dropout of each kind: what is left out, at which steps, and that nothing is in evaluation mode."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.decoder import Decoder
from seqmodels.dropout import embed
from seqmodels.encoders import FeatureEncoder
from seqmodels.errors import ConfigError
from seqmodels.kernels import packed
from seqmodels.models import SequenceGenerator
from seqmodels.recurrent import Recurrent
from tests.seqmodels.builders import make_language_model, make_model
from tests.seqmodels.test_recurrent import equations

SIZE = 12
WHERE: dict[str, dict[str, Any]] = {
    "inputs": {"input_dropout": 0.5},
    "between layers": {"recurrent": {"dropout": 0.5}},
    "outputs": {"dropout": 0.5, "input_dropout": 0.0},
}


def pass_on(recurrent: Recurrent) -> None:
    """Let a stack of ReLU cells give what it reads, at each step, so that a mask shows in what comes out."""
    with torch.no_grad():
        for layer in recurrent.forward_layers:
            layer.get_parameter("weight_ih_l0").copy_(torch.eye(SIZE))
            layer.get_parameter("weight_hh_l0").zero_()


def stack(**options: Any) -> dict[str, Any]:
    recurrent = {"cell": "rnn_relu", "hidden_size": SIZE, "num_layers": 2, **options.pop("recurrent", {})}
    return {"recurrent": recurrent, **options}


def factors_of_encoder(options: dict[str, Any]) -> Tensor:
    """What a feature encoder multiplies each number by in training: (B, S, D)."""
    encoder = {"input": "features", "feature_size": SIZE, **stack(**options)}
    encoder = make_model(architecture="tagger", encoder=encoder, labels=["a", "b"]).encoder.train()  # type: ignore[union-attr, assignment]
    assert isinstance(encoder, FeatureEncoder)
    pass_on(encoder.recurrent)
    values: Tensor = encoder(torch.ones(20, 7, SIZE), torch.full((20,), 7))[0].values
    return values


def factors_of_decoder(options: dict[str, Any]) -> Tensor:
    """The same of a decoder, from its embeddings to what the output layer reads: (B, T, E)."""
    decoder = {"vocab_size": 9, "embedding_size": SIZE, **stack(**options)}
    decoder = make_model(architecture="generator", decoder=decoder).decoder.train()  # type: ignore[union-attr, assignment]
    assert isinstance(decoder, Decoder)
    pass_on(decoder.recurrent)
    torch.nn.init.ones_(decoder.embedding.weight)
    outputs, *_ = decoder.read(torch.randint(0, 9, (20, 7)), decoder.start(None, 20))
    return decoder.features(outputs, None)


@pytest.mark.parametrize("factors_of", [factors_of_encoder, factors_of_decoder])
@pytest.mark.parametrize("where", WHERE)
def test_a_locked_mask_is_the_same_at_all_steps_and_another_for_each_row(where: str, factors_of: Any) -> None:
    """Gal and Ghahramani 2016."""
    factors = factors_of({**WHERE[where], "locked_dropout": True})
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(factors, factors[:, :1].expand_as(factors))
    assert not torch.equal(factors[0], factors[1])
    assert float((factors == 0).float().mean()) == pytest.approx(0.5, abs=0.12)


def test_each_gap_between_layers_has_a_mask_of_its_own() -> None:
    """One for all would leave half of what comes out, two a quarter, four a sixteenth."""
    recurrent = {"dropout": 0.5, "num_layers": 5}
    factors = factors_of_decoder({"recurrent": recurrent, "locked_dropout": True})
    assert float((factors > 0).float().mean()) == pytest.approx(1 / 16, abs=0.06)


@pytest.mark.parametrize("factors_of", [factors_of_encoder, factors_of_decoder])
@pytest.mark.parametrize("where", WHERE)
def test_a_plain_mask_differs_from_step_to_step(where: str, factors_of: Any) -> None:
    factors = factors_of(WHERE[where])
    assert set(factors.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(factors[:, 0], factors[:, 1])


def test_the_rate_on_inputs_is_that_of_dropout_where_it_has_none_of_its_own() -> None:
    factors = factors_of_encoder({"dropout": 0.5, "locked_dropout": True})
    assert set(factors.unique().tolist()) == {0.0, 4.0}


def test_a_ragged_batch_that_is_read_in_pieces_has_one_mask() -> None:
    recurrent = Recurrent("rnn_relu", SIZE, SIZE, 2, dropout=0.5, locked_dropout=True)
    pass_on(recurrent)
    y, _ = recurrent(torch.ones(4, 7, SIZE), torch.tensor([2, 7, 3, 5]))
    assert torch.equal(y[1], y[1, :1].expand(7, SIZE))
    assert set(y[1].unique().tolist()) == {0.0, 2.0}


def test_embedding_dropout_drops_words_wherever_they_stand() -> None:
    """Gal and Ghahramani 2016: a word is there at all its places in a pass, scaled by 1 / (1 - p), or at none."""
    table = torch.nn.Embedding(500, 3)
    tokens = torch.randint(0, 500, (40, 50))
    factors = embed(tokens, table, 0.2, training=True) / table(tokens)
    assert torch.allclose(factors, factors.round(decimals=2), atol=1e-5)
    seen_words = tokens.unique().tolist()
    words = {word: {round(f, 2) for f in factors[tokens == word].flatten().tolist()} for word in seen_words}
    assert all(seen in ({0.0}, {1.25}) for seen in words.values())
    assert sum(seen == {0.0} for seen in words.values()) / len(words) == pytest.approx(0.2, abs=0.05)
    assert not torch.equal(embed(tokens, table, 0.2, training=True), embed(tokens, table, 0.2, training=True))
    assert torch.equal(embed(tokens, table, 0.2, training=False), table(tokens))


def test_a_dropped_word_learns_nothing_as_an_input_and_is_still_a_target() -> None:
    """Only the look-up drops words; a tied output layer has the whole table."""
    table = torch.nn.Embedding(50, 3)
    tokens = torch.arange(50)[None]
    embedded = embed(tokens, table, 0.5, training=True)
    embedded.sum().backward()
    assert table.weight.grad is not None
    assert torch.equal((table.weight.grad == 0).all(1), (embedded[0] == 0).all(1))
    model = make_language_model(vocab_size=9, tie_embeddings=True, embedding_dropout=0.9).train()
    model(torch.randint(0, 9, (4, 6)), torch.full((4,), 6)).loss.backward()
    gradient = model.decoder.embedding.weight.grad
    assert gradient is not None and bool((gradient != 0).any(1).all())


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_both_parts_that_read_words_drop_them(part: str) -> None:
    kinds = {"encoder": {"input": "text"}, "decoder": {}}
    section = {"vocab_size": 9, "embedding_size": SIZE, "embedding_dropout": 0.5, **stack(), **kinds[part]}
    made = {"architecture": "tagger", "labels": ["a", "b"]} if part == "encoder" else {"architecture": "generator"}
    module = getattr(make_model(**made, **{part: section}), part).train()  # type: ignore[arg-type]
    pass_on(module.recurrent)
    torch.nn.init.ones_(module.embedding.weight)
    tokens = torch.randint(0, 9, (20, 7))
    if part == "encoder":
        values = module(tokens, torch.full((20,), 7))[0].values
    else:
        values, *_ = module.read(tokens, module.start(None, 20))
    per_word = [set(values[tokens == word].flatten().tolist()) for word in range(9)]
    assert {0.0} in per_word and {2.0} in per_word and all(len(seen) == 1 for seen in per_word)


def test_masks_come_from_the_global_generator_alone() -> None:
    """A run that goes on restores it, and nothing else."""
    recurrent = Recurrent("lstm", SIZE, SIZE, 2, bidirectional=True, dropout=0.5, locked_dropout=True)
    x, state = torch.randn(4, 7, SIZE), torch.get_rng_state()
    first, second = recurrent(x)[0], recurrent(x)[0]
    torch.set_rng_state(state)
    assert torch.equal(recurrent(x)[0], first)
    assert not torch.equal(first, second)


def test_in_evaluation_nothing_is_dropped() -> None:
    recurrent = {"dropout": 0.4, "weight_dropout": 0.6}
    rates = {"dropout": 0.5, "input_dropout": 0.3, "embedding_dropout": 0.2}
    options = {**rates, "locked_dropout": True, "recurrent": recurrent}
    plain, dropping = (
        make_model(architecture="generator", decoder={"vocab_size": 9, **stack(**chosen)}) for chosen in ({}, options)
    )
    labels, lengths = torch.randint(0, 9, (6, 8)), torch.full((6,), 8)
    assert torch.equal(plain.logprobs(labels, lengths), dropping.logprobs(labels, lengths))  # type: ignore[operator]


@pytest.mark.parametrize("between", [{}, {"num_layers": 1, "dropout": 0.5}])
def test_locking_what_does_not_drop_is_refused(between: dict[str, Any]) -> None:
    options = {"locked_dropout": True, "recurrent": between}
    with pytest.raises(ConfigError, match="decoder: locked_dropout does nothing"):
        ModelConfig.parse({"architecture": "generator", "decoder": {"vocab_size": 9, **options}})
    with pytest.raises(ConfigError, match=r"encoder.*: locked_dropout does nothing"):
        encoder = {"input": "text", "vocab_size": 9, **options}
        ModelConfig.parse({"architecture": "tagger", "labels": ["a", "b"], "encoder": encoder})


@pytest.mark.parametrize("other_length", [9, 4])  # rows of two lengths are read in two pieces
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_weight_dropout_changes_the_recurrence_alike_at_all_steps(cell: str, other_length: int) -> None:
    """Merity et al. 2018. A weight that is left out gets no gradient, which tells the mask; the equations with the
    weights that are left, scaled, must then give the same outputs and gradients at all steps."""
    model = Recurrent(cell, SIZE, SIZE, weight_dropout=0.4).double()  # type: ignore[arg-type]
    raw = model.forward_layers[0].get_parameter("weight_hh_l0")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_().mul_(0.3)  # where no ReLU is at 0, each weight that is there has a gradient
    x = torch.rand(2, 9, SIZE, dtype=torch.double)
    y, _ = model(x, torch.tensor([9, other_length]))
    weight = torch.randn(9, SIZE, dtype=torch.double)
    (gradient,) = torch.autograd.grad((y[0] * weight).sum(), raw)
    kept = gradient != 0
    assert float(kept.double().mean()) == pytest.approx(0.6, abs=0.1)
    left = (raw.detach() * kept / 0.6).requires_grad_()
    whole, _ = equations(model, x[0], 9)
    twin = Recurrent(cell, SIZE, SIZE).double()  # type: ignore[arg-type]
    twin.load_state_dict(model.state_dict())
    twin.forward_layers[0].weight_hh_l0 = torch.nn.Parameter(left)
    want, _ = equations(twin, x[0], 9)
    assert torch.allclose(y[0], want, atol=1e-10) and not torch.allclose(y[0], whole, atol=1e-3)
    (expected,) = torch.autograd.grad((want * weight).sum(), twin.forward_layers[0].get_parameter("weight_hh_l0"))
    assert torch.allclose(gradient, expected * kept / 0.6, atol=1e-9)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_weight_dropout_reaches_every_layer_and_direction_anew_in_each_pass(cell: str, bidirectional: bool) -> None:
    model = Recurrent(cell, SIZE, SIZE, 3, bidirectional, weight_dropout=0.4)  # type: ignore[arg-type]
    names = [name for name, _ in model.named_parameters() if "weight_hh" in name]
    assert len(names) == (6 if bidirectional else 3)
    masks = []
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(8, 5, SIZE))[0].square().sum().backward()
        gradients = dict(model.named_parameters())
        masks.append([gradients[name].grad == 0 for name in names])
    for first, second in zip(*masks, strict=True):
        assert 0.25 < float(first.float().mean()) < 0.75 and not torch.equal(first, second)


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_weight_dropout_leaves_the_weights_themselves_alone(cell: str) -> None:
    """State dict, optimizer and evaluation know the raw weights, under the names that they have without it."""
    torch.manual_seed(0)
    plain = Recurrent(cell, SIZE, SIZE, 2)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Recurrent(cell, SIZE, SIZE, 2, weight_dropout=0.5)  # type: ignore[arg-type]
    x = torch.randn(8, 5, SIZE)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(x)[0].sum().backward()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    gradient = model.forward_layers[0].get_parameter("weight_hh_l0").grad
    assert gradient is not None
    expected = plain.forward_layers[0].get_parameter("weight_hh_l0") - 0.1 * gradient
    optimizer.step()
    assert torch.allclose(model.forward_layers[0].get_parameter("weight_hh_l0"), expected)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(x)[0], plain(x)[0])
    assert torch.equal(packed(model)(x)[0], packed(plain)(x)[0])


def test_weight_dropout_computes_on_the_same_fused_kernel() -> None:
    x = torch.randn(8, 5, SIZE)
    called = []
    for rate in (0.0, 0.5):
        model = Recurrent("lstm", SIZE, SIZE, weight_dropout=rate)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(x)
        called.append({event.key for event in profile.key_averages() if "rnn" in event.key or "lstm" in event.key})
    assert called[0] == called[1] and called[0]


def test_a_pictures_vector_is_dropped_by_a_rate_of_its_own() -> None:
    """And its grid by another."""
    encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [64]}, "summary_dropout": 0.5}
    model = make_model(architecture="generator", encoder=encoder, decoder={"vocab_size": 9, **stack()})
    assert isinstance(model, SequenceGenerator) and model.encoder is not None
    pictures = torch.randn(50, 3, 8, 8)
    plain, _ = model.encoder(pictures, None)
    model.encoder.train()
    model.encoder.backbone.eval()
    dropped, _ = model.encoder(pictures, None)
    kept = dropped.summary != 0
    assert torch.allclose(dropped.summary[kept], 2 * plain.summary[kept]) and 0.45 < float(kept.float().mean()) < 0.55
    assert torch.equal(dropped.values, plain.values)
