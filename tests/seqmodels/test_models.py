"""The three models: what they compute, and that a row's output depends on nothing but the row."""

from typing import Any

import pytest
import torch
from torch import Tensor

from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError
from seqmodels.losses import IGNORE
from seqmodels.models import SequenceGenerator, _mean_square
from seqmodels.recurrent import Recurrent
from seqmodels.state import State
from seqmodels.stepper import Group, Stepper
from tests.seqmodels.builders import RECURRENCES, make_language_model, make_model, make_translator

STACK = {"hidden_size": 16, "num_layers": 2}
BOTH_WAYS = {**STACK, "bidirectional": True, "residual": True}
PICTURE = {"image_size": [12, 10], "channels": [4, 8]}
ENCODERS: dict[str, dict[str, Any]] = {
    "text": {"input": "text", "vocab_size": 30, "embedding_size": 8, "recurrent": BOTH_WAYS},
    "one-way text": {"input": "text", "vocab_size": 30, "embedding_size": 8, "recurrent": {**STACK, "cell": "gru"}},
    "features": {"input": "features", "feature_size": 3, "recurrent": {**STACK, "cell": "rnn_tanh"}},
    "frames": {"input": "frames", "backbone": PICTURE, "recurrent": BOTH_WAYS},
    "image": {"input": "image", "backbone": PICTURE},
}
LENGTHS = torch.tensor([9, 4, 1, 7, 9, 2])


def make_inputs(kind: str) -> Tensor:
    """Six rows, padded to nine steps."""
    if "text" in kind:
        return torch.randint(0, 30, (6, 9))
    shape = {"features": (9, 3), "frames": (9, 3, 12, 10), "image": (3, 12, 10)}[kind]
    return torch.randn(6, *shape)


def spoil(inputs: Tensor, kind: str, keep: int) -> Tensor:
    """Other values in every row but one, and in that row's padding."""
    other = make_inputs(kind)
    if kind == "image":
        other[keep] = inputs[keep]
    else:
        other[keep, : LENGTHS[keep]] = inputs[keep, : LENGTHS[keep]]
    return other


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_classified_row_depends_on_itself_alone(kind: str, pooling: str) -> None:
    model = make_model(architecture="classifier", encoder=ENCODERS[kind], labels=["a", "b", "c"], pooling=pooling)
    inputs = make_inputs(kind)
    lengths = None if kind == "image" else LENGTHS
    logits, _ = model.predict(inputs, lengths)  # type: ignore[operator, union-attr]
    for keep in (1, 2):
        other, _ = model.predict(spoil(inputs, kind, keep), lengths)  # type: ignore[operator, union-attr]
        assert torch.equal(logits[keep], other[keep])


@pytest.mark.parametrize("kind", [kind for kind in ENCODERS if kind != "image"])
def test_a_tagged_row_depends_on_itself_alone(kind: str) -> None:
    model = make_model(architecture="tagger", encoder=ENCODERS[kind], labels=["a", "b", "c"])
    inputs = make_inputs(kind)
    logits, _ = model.predict(inputs, LENGTHS)  # type: ignore[operator, union-attr]
    for keep in (1, 2):
        other, _ = model.predict(spoil(inputs, kind, keep), LENGTHS)  # type: ignore[operator, union-attr]
        assert torch.equal(logits[keep, : LENGTHS[keep]], other[keep, : LENGTHS[keep]])


@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_generated_row_depends_on_itself_alone(kind: str, attention: str) -> None:
    hidden = 8 if kind == "image" else 32 if kind in ("text", "frames") else 16
    decoder = {"vocab_size": 20, "embedding_size": 8, "recurrent": {"hidden_size": hidden}, "attention": attention}
    model = make_model(architecture="generator", encoder=ENCODERS[kind], decoder=decoder)
    assert isinstance(model, SequenceGenerator)
    inputs, labels = make_inputs(kind), torch.randint(0, 20, (6, 5))
    label_lengths = torch.tensor([5, 4, 2, 3, 5, 5])
    lengths = None if kind == "image" else LENGTHS
    logprobs = model.logprobs(labels, label_lengths, inputs, lengths)
    for keep in (1, 2):
        other_labels = torch.randint(0, 20, (6, 5))
        other_labels[keep, : label_lengths[keep]] = labels[keep, : label_lengths[keep]]
        other = model.logprobs(other_labels, label_lengths, spoil(inputs, kind, keep), lengths)
        assert torch.equal(logprobs[keep], other[keep])


LOOKS_FIRST = {"attention_from": "first", "attention_gate": True}


@torch.inference_mode()
@pytest.mark.parametrize("variant", [{}, {"residual": True, "tie_embeddings": True}, {"residual": True, **LOOKS_FIRST}])
@pytest.mark.parametrize("kind", RECURRENCES)
@pytest.mark.parametrize("attention", ["none", "dot", "general", "additive"])
def test_steps_equal_the_whole(attention: str, kind: str, variant: dict[str, Any]) -> None:
    """The search's `step`, one token and lanes of beams at a time, against teacher forcing over all T."""
    if attention == "none":
        variant = {name: value for name, value in variant.items() if name not in LOOKS_FIRST}
    model = make_translator(1, attention=attention, num_layers=3, scale=1.0, **RECURRENCES[kind], **variant)
    inputs, lengths = torch.randint(0, 40, (4, 9)), torch.tensor([9, 3, 5, 1])
    tokens = torch.randint(0, 40, (8, 6))  # two beams a row
    memory = model.encode(inputs, lengths)
    rows = torch.arange(4).repeat_interleave(2)
    stepper = Stepper(model)
    state = stepper.start(memory, 4).select(rows)
    stepped = []
    for t in range(5):
        (logits,), state, _ = stepper.step(tokens[:, t], state, [Group(4, 2, memory)])
        stepped.append(logits.flatten(0, 1).log_softmax(-1).gather(1, tokens[:, t + 1 : t + 2])[:, 0])
    whole = model.logprobs(tokens, torch.full((8,), 6), inputs[rows], lengths[rows])
    assert torch.allclose(torch.stack(stepped, 1), whole, atol=1e-5)


@torch.inference_mode()
def test_prefixes_of_all_lengths_are_read_together() -> None:
    """Each row's state is that of its own prefix read alone, none at all for length 0."""
    stepper = Stepper(make_language_model(3, vocab_size=20, hidden_size=16))
    tokens, lengths = torch.randint(0, 20, (6, 5)), torch.tensor([0, 1, 5, 3, 2, 4])
    start = State(torch.randn(6, stepper.state_width))
    together = stepper.read(tokens, lengths, start)
    assert torch.equal(together.values[0], start.values[0])
    for row, length in enumerate(lengths.tolist()):
        alone = stepper.read(tokens[row : row + 1, :length], lengths[row : row + 1], start.select(torch.tensor([row])))
        assert torch.allclose(together.values[row], alone.values[0], atol=1e-6)


def test_loss_is_the_mean_per_target_by_hand() -> None:
    model = make_language_model(0, vocab_size=6)
    labels = torch.tensor([[2, 4, 5, 3], [2, 4, 3, 0]])
    out = model(labels, torch.tensor([4, 3]))
    logprobs = model.logprobs(labels, torch.tensor([4, 3]))
    assert int(out.num_targets) == 5
    assert float(out.nll) == pytest.approx(float(-logprobs.detach().sum() / 5), rel=1e-5)
    assert float(out.loss) == float(out.nll)


def test_label_smoothing_by_hand() -> None:
    """loss = -(1 - e) log p(target) - e * mean over classes of log p; nll stays plain."""
    model = make_model(architecture="tagger", encoder=ENCODERS["text"], labels=["a", "b", "c"], label_smoothing=0.3)
    inputs, labels = make_inputs("text"), torch.randint(0, 3, (6, 9))
    labels[torch.arange(9) >= LENGTHS[:, None]] = IGNORE
    out = model(inputs, labels, LENGTHS)
    logprobs = out.logits.log_softmax(-1)
    total = plain = 0.0
    for b, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            plain -= float(logprobs[b, t, labels[b, t]])
            total -= 0.7 * float(logprobs[b, t, labels[b, t]]) + 0.3 * float(logprobs[b, t].mean())
    assert int(out.num_targets) == int(LENGTHS.sum())
    assert float(out.nll) == pytest.approx(plain / int(LENGTHS.sum()), rel=1e-5)
    assert float(out.loss) == pytest.approx(total / int(LENGTHS.sum()), rel=1e-5)


def test_activation_penalties_by_hand() -> None:
    """Merity et al. 2017: alpha times the mean square of dropped outputs, beta times that of the raw ones' change."""
    options = {"dropout": 0.5, "activation_penalty": 2.0, "temporal_activation_penalty": 3.0}
    model = make_language_model(0, vocab_size=6, **options).train()
    labels, lengths = torch.tensor([[2, 4, 5, 4, 3], [2, 4, 3, 0, 0]]), torch.tensor([5, 3])
    random = torch.get_rng_state()
    out = model(labels, lengths)
    torch.set_rng_state(random)
    raw, *_ = model.decoder.read(labels[:, :-1], model.start(None, 2))
    dropped = model.decoder.features(raw, None)
    squares = torch.cat([dropped[0, :4], dropped[1, :2]]).square()
    changes = torch.stack([raw[b, t + 1] - raw[b, t] for b, t in ((0, 0), (0, 1), (0, 2), (1, 0))]).square()
    assert (squares == 0).any() and squares.shape == (6, 8) and changes.shape == (4, 8)
    penalty = 2 * float(squares.detach().mean()) + 3 * float(changes.detach().mean())
    assert float(out.loss.detach() - out.nll) == pytest.approx(penalty, rel=1e-5)


@torch.inference_mode()
def test_layers_above_read_what_the_first_one_saw() -> None:
    """By hand, a step at a time: the first layer, its attention with the gate, the two layers above, the output."""
    model = make_translator(2, attention="additive", num_layers=3, **LOOKS_FIRST)
    decoder, memory = model.decoder, model.encode(torch.randint(0, 40, (4, 7)), torch.tensor([7, 2, 5, 1]))
    assert decoder.above is not None and decoder.gate is not None and decoder.attention is not None
    tokens, start = torch.randint(0, 40, (4, 5)), model.start(memory, 4)
    expected, (first, rest) = [], torch.split(start.values, [32, 64], dim=1)  # hidden and cell, of one and of two
    for t in range(5):
        outputs, first = _stepped(decoder.recurrent, decoder.embedding(tokens[:, t : t + 1]), first)
        keys = decoder.attention.project_keys(memory.values)
        energies = torch.tanh(decoder.attention.project_query(outputs) + keys) @ decoder.attention.energy
        weights = energies.masked_fill(~memory.mask, -torch.inf).softmax(-1)
        seen = (weights[:, :, None] * memory.values).sum(1, keepdim=True) * torch.sigmoid(decoder.gate(outputs))
        outputs, rest = _stepped(decoder.above, torch.cat([outputs, seen], -1), rest)
        expected.append(decoder.project(torch.tanh(decoder.combine(torch.cat([outputs, seen], -1)))))
    logits, after = decoder(tokens, start, memory)
    assert torch.allclose(logits, torch.cat(expected, 1), atol=1e-5)
    assert torch.allclose(after.values, torch.cat([first, rest], 1), atol=1e-6)


def _stepped(recurrent: Recurrent, x: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, state = recurrent(x, None, State(columns.contiguous()))
    return outputs, state.values


def test_the_penalty_of_attention_by_hand() -> None:
    """Xu et al. 2015: what each place lacks of being looked at once, in all real steps: the mean of its square for each
    row, which counts by the row's targets."""
    encoder = {"input": "text", "vocab_size": 9, "recurrent": {"hidden_size": 8}}
    decoder = {"vocab_size": 9, "recurrent": {"hidden_size": 8}, "attention": "general", "attention_penalty": 2.0}
    model = make_model(architecture="generator", encoder=encoder, decoder=decoder)
    assert isinstance(model, SequenceGenerator)
    inputs, lengths = torch.randint(4, 9, (2, 5)), torch.tensor([5, 3])
    labels, label_lengths = torch.tensor([[2, 4, 5, 4, 3], [2, 4, 3, 0, 0]]), torch.tensor([5, 3])
    memory = model.encode(inputs, lengths)
    weights = model.decoder.read(labels[:, :-1], model.start(memory, 2), memory).weights
    assert weights is not None
    looks = [weights[0, :4, :5].sum(0), weights[1, :2, :3].sum(0)]  # of 4 and 2 targets
    first, second = (float(((1 - each) ** 2).mean().detach()) for each in looks)
    expected = 2 * (4 * first + 2 * second) / 6
    out = model(labels, label_lengths, inputs, lengths)
    assert float((out.loss - out.nll).detach()) == pytest.approx(expected, rel=1e-4)
    out.loss.backward()
    assert model.decoder.attention is not None
    assert bool((model.decoder.attention.project_keys.weight.grad != 0).any())
    one, two = (
        model(labels[i : i + 1], label_lengths[i : i + 1], inputs[i : i + 1], lengths[i : i + 1]) for i in (0, 1)
    )
    assert float((4 * one.loss + 2 * two.loss).detach() / 6) == pytest.approx(float(out.loss.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attention_gate": True}, "decoder.attention_gate is True, but decoder.attention is 'none'"),
        ({"attention_penalty": 0.5}, "decoder.attention_penalty is 0.5, but decoder.attention is 'none'"),
        ({"attention_from": "first"}, "decoder.attention_from is 'first', but decoder.attention is 'none'"),
        ({"attention": "dot", "attention_from": "first"}, "num_layers is 1, so that no layer would read"),
    ],
)
def test_settings_of_attention_that_would_do_nothing_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_translator_with(fields)


def make_translator_with(decoder: dict[str, Any]) -> None:
    encoder = {"input": "text", "vocab_size": 9, "recurrent": {"hidden_size": 8}}
    fields = {"vocab_size": 9, "recurrent": {"hidden_size": 8}, **decoder}
    make_model(architecture="generator", encoder=encoder, decoder=fields)


@pytest.mark.parametrize("name", ["activation_penalty", "temporal_activation_penalty"])
def test_activation_penalties_do_not_see_padding(name: str) -> None:
    model = make_language_model(0, vocab_size=6, **{name: 1.0})
    labels, lengths = torch.tensor([[2, 4, 5, 4, 3], [2, 4, 3, 0, 0]]), torch.tensor([5, 3])
    other = labels.clone()
    other[1, 3:] = 5
    assert torch.equal(model(labels, lengths).loss, model(other, lengths).loss)
    assert float(model(labels[:, :2], torch.tensor([0, 0])).loss.detach()) == 0.0


def test_activation_penalties_make_activations_smaller_and_slower() -> None:
    """What they are for: the same steps of training with each, and without."""
    sizes = {}
    for name in ("neither", "activation_penalty", "temporal_activation_penalty"):
        model = make_language_model(0, vocab_size=9, **({} if name == "neither" else {name: 1.0}))
        labels, lengths = torch.randint(4, 9, (16, 12)), torch.full((16,), 12)  # the model's seed is this text's too
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(60):
            optimizer.zero_grad()
            model(labels, lengths).loss.backward()
            optimizer.step()
        raw = model.decoder.read(labels[:, :-1], model.start(None, 16))[0].detach()
        sizes[name] = float(raw.square().mean()), float(raw.diff(dim=1).square().mean())
    assert sizes["activation_penalty"][0] < 0.8 * sizes["neither"][0]
    assert sizes["temporal_activation_penalty"][1] < 0.8 * sizes["neither"][1]


def test_a_carried_state_makes_chunks_equal_the_whole() -> None:
    """Truncated back-propagation: the loss over two chunks with carried state is the loss over the whole."""
    model = make_language_model(0, vocab_size=9)
    stream = torch.randint(4, 9, (4, 13))
    full = torch.full((4,), 13)
    whole = model(stream, full)
    first = model(stream[:, :7], torch.full((4,), 7), state=model.start(None, 4))
    second = model(stream[:, 6:], torch.full((4,), 7), state=first.state.detach())
    assert float(first.loss + second.loss) / 2 == pytest.approx(float(whole.loss), rel=1e-5)
    assert torch.allclose(second.state.values, whole.state.values, atol=1e-6)


def test_a_one_directional_tagger_reads_in_pieces() -> None:
    model = make_model(architecture="tagger", encoder=ENCODERS["one-way text"], labels=["a", "b"])
    inputs = make_inputs("one-way text").repeat(3, 1)  # 18 rows: with fewer, some CPUs' linear layers give other bits
    whole, _ = model.predict(inputs, torch.full((18,), 9))  # type: ignore[operator, union-attr]
    state = model.encoder.recurrent.initial_state(18)  # type: ignore[union-attr, operator]
    pieces = []
    for start in (0, 4, 5):
        end = {0: 4, 4: 5, 5: 9}[start]
        logits, state = model.predict(inputs[:, start:end], torch.full((18,), end - start), state)  # type: ignore[operator, union-attr]
        pieces.append(logits)
    assert torch.equal(torch.cat(pieces, 1), whole)


def test_tied_embeddings_share_one_matrix() -> None:
    model = make_language_model(0, vocab_size=9, tie_embeddings=True)
    assert "decoder.output_weight" not in model.state_dict()
    before = model.logprobs(torch.tensor([[2, 4, 5, 3]]), torch.tensor([4]))
    with torch.no_grad():
        model.decoder.embedding.weight[7] += 1.0  # not among the inputs, so only the output layer can tell
    after = model.logprobs(torch.tensor([[2, 4, 5, 3]]), torch.tensor([4]))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "hiden_size: Extra inputs are not permitted"),
        ({"architecture": "generator"}, "needs a `decoder` section"),
        ({"labels": ["a"]}, "at least two"),
        ({"labels": ["a", "a"]}, "holds a name twice"),
        ({"encoder": {"input": "sound"}}, "encoder"),
        ({"encoder": {"input": "text", "vocab_size": "30"}}, "encoder.vocab_size: Input should be"),
        ({"dropout": 1.0}, "dropout: Input should be less than 1"),
        ({"architecture": "tagger", "encoder": {"input": "image"}}, "an image has no steps to label"),
    ],
)
def test_a_wrong_config_names_field_and_fix(change: dict[str, Any], message: str) -> None:
    fields = {"architecture": "classifier", "encoder": ENCODERS["text"], "labels": ["a", "b"]}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.parse({**fields, **change})
    assert message in str(caught.value)


def test_tasks_follow_from_what_goes_in_and_out() -> None:
    decoder = {"vocab_size": 9}
    tasks = {
        ("classifier", "image"): "classify",
        ("tagger", "frames"): "tag",
        ("generator", "text"): "translate",
        ("generator", "image"): "caption",
        ("generator", "frames"): "caption",
    }
    for (architecture, kind), task in tasks.items():
        parts = {"decoder": decoder} if architecture == "generator" else {"labels": ["a", "b"]}
        config = ModelConfig.parse({"architecture": architecture, "encoder": ENCODERS[kind], **parts})
        assert config.task == task
    assert ModelConfig.parse({"architecture": "generator", "decoder": decoder}).task == "generate"


def test_memories_of_unequal_length_stay_masked_when_they_meet() -> None:
    model = make_translator(1)
    with torch.inference_mode():
        short, long = (model.encode(torch.randint(4, 40, (2, n)), torch.full((2,), n)) for n in (2, 4))
    for together in (
        short.concat(long),
        long.concat(short),
        long.select(torch.tensor([0, 1, 0, 1])).put(torch.tensor([0, 1]), short),
    ):
        assert together.bias is not None
        assert torch.equal(together.bias[:, 0] == 0, together.mask)
        assert torch.equal(together.mask.sum(1).sort().values, torch.tensor([2, 2, 4, 4]))


def test_penalties_are_sums_of_float32_under_autocast() -> None:
    few = torch.full((2, 5, 100), 1e-4, dtype=torch.float16)  # whose squares float16 does not have
    penalty = _mean_square(few, torch.ones(2, 5, dtype=torch.bool))
    assert penalty.dtype == torch.float32 and float(penalty) == pytest.approx(1e-8, rel=1e-2)
