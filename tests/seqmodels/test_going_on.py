"""Texts that go on from a state are what one uninterrupted call would have written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from seqmodels.decoding.request import Request
from seqmodels.errors import InputError
from seqmodels.pipeline import Job, Pipeline
from seqmodels.pretrained import save_pretrained
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model
from tests.seqmodels.conftest import CORPUS, DECODER, TOKENIZER, png, stream


def ask(pipeline: Pipeline, item: Any, state: bytes | None = None, **params: Any) -> dict[str, Any]:
    """The first sequence, which has its state with it."""
    job = pipeline.prepare(item, params, state=state, return_state=True)
    sequence: dict[str, Any] = pipeline.run([job])[0]["sequences"][0]
    return sequence


@pytest.mark.parametrize("item", ["the quick", None])
def test_texts_in_two_calls_are_the_text_of_one(pipelines: dict[str, Pipeline], item: str | None) -> None:
    """Characters cut in half too, of which a model with random weights writes many; streamed as well."""
    pipeline, halves = pipelines["language model"], 0
    for seed in range(30):
        whole = ask(pipeline, item, do_sample=True, max_new_tokens=12, seed=seed)
        for cut in range(1, 12, 3):
            first = ask(pipeline, item, do_sample=True, max_new_tokens=cut, seed=seed)
            if first["finish_reason"] == "eos":
                continue
            halves += first["text"].endswith("\N{REPLACEMENT CHARACTER}")
            rest = {"do_sample": True, "max_new_tokens": 12 - cut}  # the seed comes with the state
            second = ask(pipeline, None, first["state"], **rest)
            assert first["text"].rstrip("\N{REPLACEMENT CHARACTER}") + second["text"] == whole["text"]
            assert second["state"] == whole["state"]
            assert "".join(stream(pipeline, None, first["state"], **rest)[0]) == second["text"]
    assert halves > 5


def test_a_stop_string_is_found_across_the_cut(tmp_path: Path) -> None:
    """The first call may have written its beginning already; no token after its end is written."""
    characters = Tokenizer.train(CORPUS, "character")
    model = make_model(1, 2.0, architecture="generator", decoder={**DECODER, "vocab_size": characters.vocab_size})
    save_pretrained(model, tmp_path / "model", target_tokenizer=characters)
    pipeline, found = Pipeline.from_pretrained(tmp_path / "model"), 0
    for seed in range(4):
        options = {"do_sample": True, "seed": seed}
        free = ask(pipeline, "the", **options, max_new_tokens=12)
        for start in range(1, min(8, len(free["text"]) - 5)):
            stop = [free["text"][start : start + 5], "no such text"]
            whole = ask(pipeline, "the", **options, max_new_tokens=12, stop=stop)
            for cut in range(1, 6):
                first = ask(pipeline, "the", **options, max_new_tokens=cut, stop=stop)
                if first["finish_reason"] != "length":
                    continue
                second = ask(pipeline, None, first["state"], do_sample=True, max_new_tokens=12 - cut, stop=stop)
                streamed, _ = stream(pipeline, None, first["state"], do_sample=True, max_new_tokens=12 - cut, stop=stop)
                assert "".join(streamed) == second["text"]
                assert (second["finish_reason"], second["state"]) == (whole["finish_reason"], whole["state"])
                if whole["finish_reason"] == "stop" and len(first["text"]) > len(whole["text"]):
                    assert second["text"] == "" and first["text"].startswith(whole["text"])
                    found += 1
                else:
                    assert first["text"] + second["text"] == whole["text"]
            # From a stop string on: it was met before, and is not met again.
            again = ask(pipeline, None, whole["state"], bad_words=stop, max_new_tokens=1, stop=[*stop, "a longer one"])
            assert again["finish_reason"] == "length"
    assert found > 5


def test_more_text_after_a_state_is_read_as_if_all_had_been_one_prompt(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["language model"]
    first = ask(pipeline, "the quick", max_new_tokens=5, bad_words=["\N{REPLACEMENT CHARACTER}"])
    more = pipeline.prepare(" fox", {"prefix": " jumps", "max_new_tokens": 6}, state=first["state"])
    assert isinstance(more.request, Request) and more.request.state
    assert more.request.prefix[len(more.request.state.tokens) :] == tuple(TOKENIZER.encode_inside(" fox")) + tuple(
        TOKENIZER.encode_inside(" jumps")
    )
    assert more.num_input_tokens == len(TOKENIZER.encode_inside(" fox"))
    afresh = Job(
        replace(more.request, state=None), replace(more.reading, prompt=more.request.state.tokens + more.reading.prompt)
    )
    assert pipeline.run([more]) == pipeline.run([afresh])
    assert pipeline.run([more])[0]["sequences"][0]["text"].startswith(" jumps")


def test_a_model_with_inputs_goes_on_with_the_same_ones(pipelines: dict[str, Pipeline]) -> None:
    picture, other = png(), png(size=(40, 40))
    inputs = {"translator": ("the fox", "a fox")} | dict.fromkeys(
        ("captioner", "attending captioner"), ({"image": picture}, {"image": other})
    )
    for name, (item, wrong) in inputs.items():
        pipeline = pipelines[name]
        whole = ask(pipeline, item, max_new_tokens=10, seed=5)
        first = ask(pipeline, item, max_new_tokens=4, seed=5)
        second = ask(pipeline, item, first["state"], max_new_tokens=6)
        assert first["text"].rstrip("\N{REPLACEMENT CHARACTER}") + second["text"] == whole["text"]
        assert second["state"] == whole["state"]
        with pytest.raises(InputError, match="made with other inputs") as error:
            pipeline.prepare(wrong, state=first["state"])
        assert error.value.param == "state"
    with pytest.raises(InputError, match="made by a model"):
        pipelines["language model"].prepare("a", state=first["state"])
    with pytest.raises(InputError, match="damaged or no state"):
        pipelines["language model"].prepare("a", state=b"")
