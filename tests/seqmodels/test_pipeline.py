"""Raw input to result: text, words, pictures and numbers in; labels, offsets and text out."""

import math
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from seqmodels.__main__ import main
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished
from seqmodels.errors import InputError, TooLongError, UnsupportedError
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import Pretrained, save_pretrained
from seqmodels.reading import word_spans
from seqmodels.rendering import bio_spans, is_bio
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model
from tests.seqmodels.conftest import CORPUS, DECODER, MODELS, TOKENIZER, png, stream


def test_classify(pipelines: dict[str, Pipeline]) -> None:
    for answer in pipelines["classifier"](["the fox", {"text": "a dog"}]):
        assert sum(answer["scores"].values()) == pytest.approx(1, abs=1e-6)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)
        assert answer["score"] == answer["scores"][answer["label"]]


def test_answers_do_not_depend_on_the_company(pipelines: dict[str, Pipeline]) -> None:
    texts = ["the fox", "jumps over the lazy dog " * 5, "a", "brown brown brown", "0 1 2 3 4 5 6 7 8 9 0 1 2 3"]
    for name in ("classifier", "tagger", "translator", "language model"):
        pipeline = pipelines[name]
        if pipeline.batch_invariant:
            assert pipeline(texts) == [pipeline([text])[0] for text in texts]
    assert pipelines["classifier"].batch_invariant


def test_tags_have_offsets_in_the_given_text(pipelines: dict[str, Pipeline]) -> None:
    text = "Ein Hund  läuft, über 🙂 die Straße."
    (answer,) = pipelines["tagger"]([text])
    assert answer["tags"]
    for tag in answer["tags"]:
        assert tag["text"] == text[tag["start"] : tag["end"]]
        assert tag["label"] == "X"
    words = ["Ein", "Hund", "läuft", ","]
    (answer,) = pipelines["tagger"]([{"words": words}])
    for tag in answer["tags"]:
        assert tag["text"] == " ".join(words)[tag["start"] : tag["end"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("नमस्ते दुनिया!", ["नमस्ते", "दुनिया", "!"]),
        ("cafe\u0301 noir", ["cafe\u0301", "noir"]),  # decomposed
        ("می\u200cخواهم", ["می\u200cخواهم"]),  # a zero-width non-joiner
        ("ok 👩\u200d💻, 👍", ["ok", "👩\u200d💻", ",", "👍"]),
        ("it's co-op_2 (new)", ["it", "'", "s", "co", "-", "op_2", "(", "new", ")"]),
        ("\u0301a", ["\u0301a"]),
        ("   ", []),
    ],
)
def test_a_taggers_words_are_whole_in_every_script(text: str, words: list[str]) -> None:
    assert [text[start:end] for start, end in word_spans(text)] == words


def test_bio_spans_as_conlleval_reads_them() -> None:
    labels = ["O", "I-A", "I-A", "B-A", "I-B", "O", "B-B", "I-B", "I-B", "B-B"]
    assert bio_spans(labels) == [("A", 1, 3), ("A", 3, 4), ("B", 4, 5), ("B", 6, 9), ("B", 9, 10)]
    assert is_bio(["O", "B-A", "I-A"])
    assert not is_bio(["NOUN", "VERB"])
    assert not is_bio(["O", "B-A", "C"])


def test_frames_series_and_captions(pipelines: dict[str, Pipeline]) -> None:
    tags = pipelines["frames"]([{"frames": [png()] * 3}])[0]["tags"]
    assert [(tag["start"], tag["end"]) for tag in tags] == [(0, 1), (1, 2), (2, 3)]
    assert set(pipelines["series"]([{"features": [[1, 2.5], [0, -1]]}])[0]["scores"]) == {"up", "down"}
    (answer,) = pipelines["captioner"]([{"image": png()}], num_beams=3, num_return_sequences=2)
    assert len(answer["sequences"]) == 2


def test_scores_are_the_models_log_probabilities(pipelines: dict[str, Pipeline]) -> None:
    source, target = TOKENIZER.encode_source("the fox"), TOKENIZER.encode("Ein Hund")
    translator, model = pipelines["translator"], pipelines["language model"]
    (score,) = translator.score(["the fox"], ["Ein Hund"])
    labels = torch.tensor([[2, *target, 3]])
    sizes = torch.tensor([labels.shape[1]])
    with torch.inference_mode():
        want = translator._pretrained.model.logprobs(labels, sizes, torch.tensor([source]), torch.tensor([len(source)]))  # type: ignore[union-attr, operator]
    assert score["logprobs"] == pytest.approx(want[0].tolist(), abs=1e-5)
    assert score["score"] == pytest.approx(float(want.sum()), abs=1e-4)
    assert score["tokens"] == [TOKENIZER.token(i) for i in [*target, 3]]
    for cut in range(len("the brown fox ") + 1):  # wherever the prompt ends, the target is scored, whole and alone
        prompt, rest = "the brown fox "[:cut], "the brown fox "[cut:]
        ids = TOKENIZER.encode_inside(rest) if prompt else TOKENIZER.encode(rest)
        labels = torch.tensor([[2, *TOKENIZER.encode(prompt), *ids, 3]])
        with torch.inference_mode():
            want = model._pretrained.model.logprobs(labels, torch.tensor([labels.shape[1]]))  # type: ignore[union-attr, operator]
        (score,) = model.score([prompt], [rest])
        assert score["logprobs"] == pytest.approx(want[0, -len(ids) - 1 :].tolist(), abs=1e-5)
        assert "".join(score["tokens"][:-1]).replace("Ġ", " ").strip() == rest.strip()
    (best,) = translator(["the fox"], num_beams=4, logprobs=True, length_penalty=0.0)[0]["sequences"]
    assert best["score"] == pytest.approx(math.fsum(best["logprobs"]), rel=1e-5)


def test_the_likeliest_tokens_of_a_scored_text(pipelines: dict[str, Pipeline]) -> None:
    model = pipelines["language model"]
    (whole,) = model.run([model.prepare_score(None, "the brown fox", top_logprobs=4)])
    (plain,) = model.score([None], ["the brown fox"])
    assert {name: value for name, value in whole.items() if name != "top_logprobs"} == plain
    labels = torch.tensor([[2, *TOKENIZER.encode("the brown fox"), 3]])
    with torch.inference_mode():
        want = model._pretrained.model.predict(labels)[0].log_softmax(-1)  # type: ignore[union-attr, operator]
    for step, values in zip(whole["top_logprobs"], want, strict=True):
        nats, tokens = values.sort(descending=True)
        assert [one["token"] for one in step] == [TOKENIZER.token(i) for i in tokens[:4].tolist()]
        assert [one["logprob"] for one in step] == pytest.approx(nats[:4].tolist(), abs=1e-5)
    (rest,) = model.run([model.prepare_score("the brown", " fox", top_logprobs=4)])
    assert rest["top_logprobs"] == whole["top_logprobs"][-len(rest["tokens"]) :]
    assert rest["offsets"][-1] == len(" fox") and plain["offsets"][-1] == len("the brown fox")


@pytest.mark.parametrize("name", ["translator", "language model"])
def test_streamed_tokens_are_the_final_ones(name: str, pipelines: dict[str, Pipeline]) -> None:
    """To the bit, whatever is held back; with beams they come all at the end."""
    pipeline = pipelines[name]
    sampled = {"do_sample": True, "num_return_sequences": 3, "seed": 3, "stop": ["e", "the f"], "temperature": 1.5}
    for params in (sampled, {"max_new_tokens": 9, "top_logprobs": 3}, {"num_beams": 3, "max_new_tokens": 9}):
        job = pipeline.prepare("the fox", {**params, "logprobs": True}, stream=True)
        texts, told = pipeline.text_stream(job), dict[int, dict[str, list[Any]]]()
        pipeline.submit(job)
        while pipeline.has_work:
            for event in pipeline.step():
                ended = isinstance(event, Finished)
                for piece in texts.finish(event.result) if ended else texts.push(event):  # type: ignore[union-attr, arg-type]
                    for key, values in (piece.told or {}).items():
                        told.setdefault(piece.output, {}).setdefault(key, []).extend(values)
                        assert ended or "num_beams" not in params
                if ended:
                    sequences = pipeline.render(job, event.result)["sequences"]  # type: ignore[union-attr]
        for index, sequence in enumerate(sequences):
            assert told[index] == {key: sequence[key] for key in told[index]}
            assert {"tokens", "offsets", "logprobs"} <= set(told[index])


def test_a_prompt_is_left_out_and_a_prefix_is_kept(pipelines: dict[str, Pipeline]) -> None:
    (answer,) = pipelines["language model"](["the quick"], prefix=" brown fox", max_new_tokens=4)
    assert answer["sequences"][0]["text"].startswith(" brown fox")
    (answer,) = pipelines["translator"](["the quick"], prefix="Ein Hund", max_new_tokens=4, num_beams=2)
    assert answer["sequences"][0]["text"].startswith("Ein Hund")


@pytest.mark.parametrize("name", ["translator", "language model"])
def test_streamed_text_is_the_final_text(name: str, pipelines: dict[str, Pipeline]) -> None:
    for seed in range(12):
        streamed, answer = stream(
            pipelines[name], "the fox", do_sample=True, num_return_sequences=3, seed=seed, stop=["e", "the f"]
        )
        texts = [sequence["text"] for sequence in answer["sequences"]]
        assert streamed + [""] * (3 - len(streamed)) == texts
        assert all("e" not in text for text in texts)
        assert answer["seed"] == seed
        streamed, answer = stream(pipelines[name], "the fox", num_beams=3, length_penalty=-1.0 + seed / 4)
        assert ("".join(streamed)) == answer["sequences"][0]["text"]


def test_stop_ends_before_the_string(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["language model"]
    (free,) = pipeline(["the"], do_sample=True, seed=5, max_new_tokens=40)
    text = free["sequences"][0]["text"]
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    (stopped,) = pipeline(["the"], do_sample=True, seed=5, max_new_tokens=40, stop=[stop])
    assert stopped["sequences"][0]["text"] == text[: text.index(stop)]
    assert stopped["sequences"][0]["finish_reason"] == "stop"


def test_a_stream_holds_back_what_may_begin_a_stop_string(pipelines: dict[str, Pipeline]) -> None:
    pipeline, tried = pipelines["language model"], 0
    for seed in range(40):
        params = {"do_sample": True, "seed": seed, "max_new_tokens": 30}
        text = pipeline(["the"], **params)[0]["sequences"][0]["text"]
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        if len(stop) < 3 or "\N{REPLACEMENT CHARACTER}" in stop:
            continue
        tried += 1
        streamed, answer = stream(pipeline, "the", **params, stop=[stop])
        assert "".join(streamed) == answer["sequences"][0]["text"] == text[: text.index(stop)]
    assert tried > 5


def test_bad_words_never_appear(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["language model"]
    seen: set[str] = set()
    for seed in range(40):
        params = {"do_sample": True, "seed": seed, "max_new_tokens": 20, "logprobs": True}
        seen.update(pipeline(["the"], **params)[0]["sequences"][0]["tokens"])
        tokens = pipeline(["the"], **params, bad_words=["e", "a"])[0]["sequences"][0]["tokens"]
        assert not {"e", "a", "Ġe", "Ġa"} & set(tokens)
    assert {"e", "a"} <= seen


def test_a_text_is_no_list_of_its_letters(pipelines: dict[str, Pipeline]) -> None:
    for inputs in ("the fox", {"text": "the fox"}):
        with pytest.raises(InputError, match="inputs must be a list") as error:
            pipelines["classifier"](inputs)  # type: ignore[arg-type]
        assert error.value.param == "inputs"
    with pytest.raises(InputError, match="targets must be a list"):
        pipelines["translator"].score(["the fox"], "fox")
    with pytest.raises(InputError, match="targets holds 2 texts for 1 inputs"):
        pipelines["translator"].score(["the fox"], ["a", "b"])


def test_steps_of_one_number_may_stand_without_brackets() -> None:
    encoder = {"input": "features", "feature_size": 1, "recurrent": {"hidden_size": 4}}
    model = make_model(architecture="classifier", encoder=encoder, labels=["up", "down"])
    pipeline = Pipeline(Pretrained(model, model.config, ""))
    plain, wrapped = pipeline([{"features": [0.1, 2, 0.3]}, {"features": [[0.1], [2], [0.3]]}])
    assert plain == wrapped


def test_a_ban_on_what_a_model_has_no_token_for_changes_nothing() -> None:
    tokenizer = Tokenizer.train(["the cat sat"], "word", 50)
    decoder = {"vocab_size": tokenizer.vocab_size, "embedding_size": 8, "recurrent": {"hidden_size": 8}}
    model = make_model(scale=3.0, architecture="generator", decoder=decoder)
    pipeline = Pipeline(Pretrained(model, model.config, "", target_tokenizer=tokenizer))
    sampled = {"do_sample": True, "max_new_tokens": 20, "logprobs": True}
    for seed in range(20):
        answers = [pipeline([None], **sampled, seed=seed, **ban) for ban in ({}, {"bad_words": ["zebra"]})]
        assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["language model", "translator", "captioner"])
def test_forced_words_stand_in_the_text_as_whole_words(pipelines: dict[str, Pipeline], name: str) -> None:
    item = {"image": png()} if name == "captioner" else "the"
    words = ["Straße", "quick brown", "do"]
    params = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 60, "force_words": words}
    sequences = pipelines[name]([item], **params)[0]["sequences"]
    assert sequences
    for sequence in sequences:
        assert all(re.search(rf"\b{word}\b", sequence["text"]) for word in words), sequence
        assert sequence["missing_words"] == []
    (short,) = pipelines[name]([item], num_beams=2, max_new_tokens=1, force_words=words)[0]["sequences"]
    assert short["missing_words"] and short["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("name", "item", "params", "kind", "param", "message"),
    [
        ("classifier", "", {}, InputError, "inputs", "empty"),
        ("classifier", "   ", {}, InputError, "inputs", "empty"),
        ("classifier", 5, {}, UnsupportedError, "inputs", "this model takes a string"),
        ("classifier", {"image": b""}, {}, UnsupportedError, "inputs", "this model takes a string"),
        ("classifier", {"text": 5}, {}, UnsupportedError, "inputs", "must be a string"),
        ("classifier", "a \ud800 b", {}, InputError, "inputs", "surrogate"),
        ("classifier", "fox " * 100, {}, TooLongError, "inputs", "takes at most 50"),
        ("classifier", "fox", {"num_beams": 2}, InputError, "num_beams", "option of generators"),
        ("translator", "fox", {"force_words": ["fox"]}, InputError, "force_words", "needs num_beams > 1"),
        ("tagger", {"words": ["a", ""]}, {}, InputError, "inputs", "none of them empty"),
        ("tagger", {"words": ["a"], "text": "a"}, {}, InputError, "inputs", "has words, text; an input is exactly one"),
        ("language model", {"text": "a", "id": 7}, {}, InputError, "inputs", "has text, id"),
        ("tagger", {"words": []}, {}, InputError, "inputs", "empty"),
        ("tagger", " \n ", {}, InputError, "inputs", "empty"),
        ("series", {"features": [[1]]}, {}, InputError, "inputs", "list of 2 numbers"),
        ("series", {"features": [[1, math.nan]]}, {}, InputError, "inputs", "no number within"),
        ("series", {"features": [[1, 1e300]]}, {}, InputError, "inputs", "no number within"),
        ("series", {"features": [[True, "x"]]}, {}, InputError, "inputs", "no number within"),
        ("series", {"features": []}, {}, InputError, "inputs", "empty"),
        ("captioner", "fox", {}, UnsupportedError, "inputs", "this model takes {'image'"),
        ("captioner", {"image": b"no image"}, {}, UnsupportedError, "inputs", "not an image"),
        ("captioner", {"image": png()[:60]}, {}, InputError, "inputs", "broken"),
        ("captioner", {"image": "text"}, {}, InputError, "inputs", "must be bytes"),
        ("frames", {"frames": [b"x"]}, {}, UnsupportedError, "inputs.frames[0]", "not an image"),
        ("translator", "fox", {"num_beams": 0}, InputError, "num_beams", "greater than 0"),
        ("translator", "fox", {"num_beams": "2"}, InputError, "num_beams", "valid integer"),
        ("translator", "fox", {"temperature": 0.5}, InputError, "temperature", "temperature is 0.5, which needs"),
        ("translator", "fox", {"stop": ["x"], "num_beams": 2}, InputError, "stop", "stop needs num_beams=1"),
        ("translator", "fox", {"beams": 2}, InputError, "beams", "Extra inputs"),
        ("translator", "fox", {"length_penalty": math.inf}, InputError, "length_penalty", "length_penalty"),
        ("language model", 5, {}, UnsupportedError, "inputs", "a prompt string"),
        ("language model", {"words": ["a"]}, {}, UnsupportedError, "inputs", "a prompt string"),
        ("language model", "fox", {"prefix": "dog " * 60}, TooLongError, "prefix", "takes at most 50"),
        ("translator", "fox", {"length_penalty": 300.0}, InputError, "length_penalty", "less than or equal to 10"),
    ],
)  # fmt: skip
def test_bad_input_names_field_value_and_fix(
    name: str, item: Any, params: dict[str, Any], kind: type, param: str | None, message: str,
    pipelines: dict[str, Pipeline],
) -> None:  # fmt: skip
    with pytest.raises(kind) as caught:
        pipelines[name].prepare(item, params)
    assert message in str(caught.value)
    if param:
        assert caught.value.param == param


@pytest.mark.parametrize(
    ("kind", "prefix", "named"),
    [("word", "the zebra <eos> fox <unk>", "'zebra', '<eos>', '<unk>'"), ("character", "fox Ω", "'Ω'")],
)
def test_a_prefix_that_cannot_be_written_is_refused(
    kind: Any, prefix: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer.train(CORPUS, kind, 320)
    model = make_model(1, 2.0, architecture="generator", decoder={**DECODER, "vocab_size": tokenizer.vocab_size})
    save_pretrained(model, tmp_path, target_tokenizer=tokenizer)
    with pytest.raises(InputError) as caught:
        Pipeline.from_pretrained(tmp_path).prepare("unseen words of a prompt are fine", {"prefix": prefix})
    assert f"what this model cannot write: {named}; choose" in str(caught.value)
    assert (caught.value.param, caught.value.code) == ("prefix", "invalid_value")
    (tmp_path / "lines.txt").write_text("the\nthe\n")
    assert main(["generate", str(tmp_path), str(tmp_path / "lines.txt"), "--prefix", prefix]) == 2
    assert named in capsys.readouterr().err
    assert Pipeline.from_pretrained(tmp_path)(["the"], prefix="the fox")[0]["sequences"][0]["text"]


def test_truncate_shortens(pipelines: dict[str, Pipeline]) -> None:
    job = pipelines["classifier"].prepare("fox " * 100, truncate=True)
    assert job.num_input_tokens == 50
    job = pipelines["language model"].prepare("fox " * 100 + "dog", truncate=True)
    assert job.reading.prompt[-3:] == tuple(TOKENIZER.encode("fox dog"))[-3:]
    assert len(job.reading.prompt) == 50


def test_defaults_of_a_search_do_not_reach_a_sampling_request(tmp_path: Path) -> None:
    save_pretrained(
        make_model(1, **MODELS["translator"]), tmp_path, source_tokenizer=TOKENIZER, target_tokenizer=TOKENIZER,
        generation=SearchParams(num_beams=5, length_penalty=0.6),
    )  # fmt: skip
    pipeline = Pipeline.from_pretrained(tmp_path)
    assert pipeline.prepare("fox").request.params.num_beams == 5
    assert pipeline.prepare("fox", {"do_sample": True}).request.params.num_beams == 1
    assert pipeline.prepare("fox", {"stop": ["x"]}).request.params.num_beams == 1
    assert pipeline.prepare("fox", {"num_beams": 2}).request.params.length_penalty == 0.6
    with pytest.raises(InputError, match="stop needs"):
        pipeline.prepare("fox", {"stop": ["x"], "num_beams": 2})


def test_details_of_an_answer(pipelines: dict[str, Pipeline]) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "coverage_penalty": 0.2}
    options |= {"top_logprobs": 4, "output_attentions": True}
    (answer,) = pipelines["translator"](["the quick fox"], **options)
    assert "".join(answer["source_tokens"]) == "ĠtheĠquickĠfox<eos>"
    for sequence in answer["sequences"]:
        assert "logprobs" not in sequence
        assert len(sequence["tokens"]) == len(sequence["top_logprobs"]) == len(sequence["attentions"])
        assert {len(step) for step in sequence["top_logprobs"]} == {4}
        assert {len(weights) for weights in sequence["attentions"]} == {len(answer["source_tokens"])}
        for likeliest in sequence["top_logprobs"]:
            assert all(set(one) == {"token", "logprob"} for one in likeliest)
            assert likeliest == sorted(likeliest, key=lambda one: -one["logprob"])
    (greedy,) = pipelines["translator"](["the quick fox"], logprobs=True, top_logprobs=1)
    (sequence,) = greedy["sequences"]
    assert [step[0]["token"] for step in sequence["top_logprobs"]] == sequence["tokens"]
    assert [step[0]["logprob"] for step in sequence["top_logprobs"]] == sequence["logprobs"]
    assert "attentions" not in sequence and "source_tokens" not in greedy


@pytest.mark.parametrize(
    ("name", "options", "param", "message"),
    [
        ("captioner", {"output_attentions": True}, "output_attentions", "needs attention, which this model has not"),
        ("language model", {"num_beams": 2, "coverage_penalty": 1.0}, "coverage_penalty", "needs attention"),
        ("translator", {"coverage_penalty": 1.0}, "coverage_penalty", "needs num_beams > 1"),
        ("translator", {"coverage_penalty": -1.0}, "coverage_penalty", "coverage_penalty"),
        ("translator", {"top_logprobs": 21}, "top_logprobs", "top_logprobs"),
        ("classifier", {"top_logprobs": 1}, "top_logprobs", "is an option of generators"),
    ],
)
def test_details_that_cannot_be_given(
    pipelines: dict[str, Pipeline], name: str, options: dict[str, Any], param: str, message: str
) -> None:
    item = {"image": png()} if name == "captioner" else "the fox"
    with pytest.raises(InputError, match=message) as error:
        pipelines[name].prepare(item, options)
    assert error.value.param == param


def test_an_error_leaves_nobody_behind(pipelines: dict[str, Pipeline], directories: dict[str, Path]) -> None:
    pipeline = pipelines["language model"]
    wider = Pipeline.from_pretrained(directories["language model"], max_rows=512)
    with pytest.raises(InputError, match="256 rows"):
        pipeline.run([pipeline.prepare("a"), wider.prepare("b", {"num_beams": 300})])
    assert not pipeline.has_work
    assert len(pipeline(["x"])) == 1


def test_load_tells_how_busy_it_is(pipelines: dict[str, Pipeline]) -> None:
    counts = {"prefill_tokens_read": 0, "prefill_tokens_saved": 0}
    idle = {"waiting": 0, "rows_live": 0, "rows_waiting": 0, "rows_total": 256}
    assert Pipeline(pipelines["translator"]._pretrained).load() == idle | counts
    job = pipelines["translator"].prepare("the fox", {"num_beams": 3})
    pipelines["translator"].submit(job)
    load = pipelines["translator"].load()
    assert (load["waiting"], load["rows_waiting"]) == (1, 3)
    late, gone = (pipelines["translator"].prepare("the dog", {"num_beams": 2}, deadline=at) for at in (0.0, None))
    pipelines["translator"].submit(late)
    pipelines["translator"].submit(gone)
    pipelines["translator"].cancel(gone.id)
    pipelines["translator"].step()
    assert pipelines["translator"].load()["rows_waiting"] == 0
    assert pipelines["translator"].load()["rows_live"] == 3
    pipelines["translator"].cancel(job.id)
    assert pipelines["translator"].load()["rows_live"] == 0
    prompt = "the quick brown fox"
    read = len(TOKENIZER.encode(prompt))
    for states, counted in ((1024, (read, read)), (0, (2 * read, 0))):
        pipeline = Pipeline(pipelines["language model"]._pretrained, prefix_cache_states=states)
        for _ in range(2):
            pipeline([prompt])
        load = pipeline.load()
        assert (load["prefill_tokens_read"], load["prefill_tokens_saved"]) == counted
    assert torch.is_inference_mode_enabled() is False


def test_times_are_those_of_the_steps(pipelines: dict[str, Pipeline]) -> None:
    pipeline = pipelines["translator"]
    first, second = (pipeline.prepare("the fox", {"num_beams": 200, "max_new_tokens": 4}) for _ in range(2))
    moments = [time.monotonic()]
    for job in (first, second):  # the second waits for the rows of the first
        pipeline.submit(job)
    while pipeline.has_work:
        pipeline.step()
        moments.append(time.monotonic())

    def step_of(moment: float | None) -> int:
        assert moment is not None
        return next(number for number, end in enumerate(moments) if moment <= end)

    one, two = first.request.times, second.request.times
    assert step_of(one.admitted) == step_of(one.first_token) == 1 and step_of(one.finished) <= 4
    assert step_of(two.admitted) == step_of(two.first_token) == step_of(one.finished) + 1
    assert one.submitted and two.submitted and one.submitted < two.submitted <= moments[1]
    labelled = pipelines["classifier"].prepare("the fox")
    assert labelled.request.times.submitted is None
    pipelines["classifier"].run([labelled])
    times = labelled.request.times
    assert times.submitted and times.admitted and times.finished
    assert times.submitted <= times.admitted < times.finished == times.first_token


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"force_words": ["quick fox"], "bad_words": ["fox"]}, "force_words\\[0\\] is what bad_words forbids"),
        ({"force_words": [" "]}, "has no tokens for"),
    ],
)
def test_words_that_can_never_be_written_are_refused(
    pipelines: dict[str, Pipeline], options: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        pipelines["translator"].prepare("fox", {"num_beams": 2, **options})
    assert error.value.param == "force_words"
