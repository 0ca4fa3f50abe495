"""Raw input to result: text, words, pictures and numbers in; labels, offsets and text out."""

import io
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from seqmodels.__main__ import main
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Finished, Progress, Request
from seqmodels.errors import InputError, TooLongError, UnsupportedError
from seqmodels.pipeline import Job, Pipeline
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import save_pretrained
from seqmodels.rendering import bio_spans, is_bio
from seqmodels.tokenizer import Tokenizer
from tests.seqmodels.builders import make_model

CORPUS = ["the quick brown fox jumps over the lazy dog", "Ein Hund läuft über die Straße 🙂", "0 1 2 3 4 5 6 7 8 9"]
TOKENIZER = Tokenizer.train(CORPUS * 3, "bpe", vocab_size=320)
STACK = {"hidden_size": 16}
TEXT = {"input": "text", "vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": STACK}
DECODER = {"vocab_size": TOKENIZER.vocab_size, "embedding_size": 8, "recurrent": STACK}
PICTURE = {"image_size": [8, 8], "channels": [4]}
MODELS: dict[str, dict[str, Any]] = {
    "classifier": {"architecture": "classifier", "encoder": TEXT, "labels": ["bad", "good"], "max_source_length": 50},
    "tagger": {"architecture": "tagger", "encoder": TEXT, "labels": ["O", "B-X", "I-X"]},
    "translator": {"architecture": "generator", "encoder": TEXT, "decoder": {**DECODER, "attention": "general"}},
    "language model": {"architecture": "generator", "decoder": DECODER, "max_source_length": 50},
    "captioner": {"architecture": "generator", "encoder": {"input": "image", "backbone": PICTURE}, "decoder": DECODER},
    "frames": {"architecture": "tagger", "encoder": {"input": "frames", "backbone": PICTURE}, "labels": ["l", "r"]},
    "series": {
        "architecture": "classifier",
        "encoder": {"input": "features", "feature_size": 2, "recurrent": STACK},
        "labels": ["up", "down"],
    },
}


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, fields in MODELS.items():
        save_pretrained(
            make_model(1, 2.0, **fields),
            root / name,
            source_tokenizer=TOKENIZER,
            target_tokenizer=TOKENIZER,
            preprocessor=Preprocessor(size=(8, 8)),
            generation=SearchParams(max_new_tokens=12),
        )
    return {name: root / name for name in MODELS}


@pytest.fixture(scope="module")
def pipelines(directories: dict[str, Path]) -> dict[str, Pipeline]:
    return {name: Pipeline.from_pretrained(path) for name, path in directories.items()}


def png(mode: str = "RGB", size: tuple[int, int] = (20, 10), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert(mode).save(buffer, kind)
    return buffer.getvalue()


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


def test_a_prompt_is_left_out_and_a_prefix_is_kept(pipelines: dict[str, Pipeline]) -> None:
    (answer,) = pipelines["language model"](["the quick"], prefix=" brown fox", max_new_tokens=4)
    assert answer["sequences"][0]["text"].startswith(" brown fox")
    (answer,) = pipelines["translator"](["the quick"], prefix="Ein Hund", max_new_tokens=4, num_beams=2)
    assert answer["sequences"][0]["text"].startswith("Ein Hund")


def stream(
    pipeline: Pipeline, item: Any, state: bytes | None = None, **params: Any
) -> tuple[list[str], dict[str, Any]]:
    job = pipeline.prepare(item, params, stream=True, state=state)
    streamed: dict[int, str] = {}
    text = pipeline.text_stream(job)
    pipeline.submit(job)
    while pipeline.has_work:
        for event in pipeline.step():
            if isinstance(event, Progress):
                deltas = text.push(event)
            else:
                assert isinstance(event, Finished)
                assert isinstance(event.result, list)
                deltas = text.finish(event.result)
                answer = pipeline.render(job, event.result)
            for index, delta in deltas:
                streamed[index] = streamed.get(index, "") + delta
    return [streamed.get(i, "") for i in range(max(streamed, default=-1) + 1)], answer


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
        ("frames", {"frames": [b"x"]}, {}, UnsupportedError, "inputs[0]", "not an image"),
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


def test_pictures_of_every_kind() -> None:
    preprocessor = Preprocessor(size=(8, 6), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    for mode, kind in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("RGB", "WEBP")):
        assert preprocessor.image(png(mode, kind=kind)).shape == (3, 8, 6)
    red = Image.new("RGB", (6, 8), (255, 0, 51))
    assert preprocessor.image(red)[:, 0, 0].tolist() == pytest.approx([2.0, -1.0, -0.3])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_check_finds_what_decoding_would(kind: str) -> None:
    whole, preprocessor = png(kind=kind, size=(64, 48)), Preprocessor(size=(8, 8))
    preprocessor.check(whole)
    for bad in (whole[: len(whole) // 2], whole[:10], b"", b"text"):
        with pytest.raises(InputError) as decoding:
            preprocessor.image(bad)
        with pytest.raises(InputError) as checking:
            preprocessor.check(bad)
        assert str(checking.value) == str(decoding.value)


def test_a_picture_turned_by_exif_stands_upright() -> None:
    picture = Image.new("RGB", (4, 8), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 4, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    upright = Preprocessor(size=(8, 4)).image(buffer.getvalue())
    assert upright[0, 0, 0] < upright[0, 7, 0]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_exif_block_says_nothing_about_the_pixels() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "JPEG", exif=exif)
    whole, choose = buffer.getvalue(), random.Random(0)
    start = whole.index(b"Exif")
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(start, start + 80)] = choose.randrange(256)
        try:
            assert Preprocessor(size=(8, 8)).image(bytes(damaged)).shape == (3, 8, 8)
        except InputError:  # UnsupportedError among them
            continue


def test_sixteen_bit_greys_keep_their_shades() -> None:
    picture = Image.new("I;16", (64, 1))
    picture.putdata([i * 1024 for i in range(64)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    shades = Preprocessor(size=(1, 64), channels=1).image(buffer.getvalue())[0, 0]
    assert len(set(shades.tolist())) == 64


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


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = bytearray(png())
    header[16:24] = (13000).to_bytes(4, "big") * 2  # claims 169 million pixels
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match=r"pixels|too large"):
        Preprocessor(size=(8, 8)).image(bytes(header))


def command_line(*arguments: str, lines: str = "") -> tuple[int, list[Any], str]:
    """Run `python -m seqmodels` as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "seqmodels", *arguments], input=lines, capture_output=True, text=True, timeout=120
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def test_command_line(directories: dict[str, Path], tmp_path: Path, pipelines: dict[str, Pipeline]) -> None:
    code, answers, _ = command_line("predict", str(directories["classifier"]), lines='the fox\n{"text": "a dog"}\n')
    assert code == 0
    assert [a["label"] for a in answers] == [a["label"] for a in pipelines["classifier"](["the fox", "a dog"])]
    (tmp_path / "in.txt").write_text("the fox\nthe dog\n")
    code, answers, _ = command_line(
        "generate",
        str(directories["translator"]),
        str(tmp_path / "in.txt"),
        "--num-beams",
        "3",
        "--max-new-tokens",
        "5",
    )
    assert code == 0
    assert [a["sequences"][0]["text"] for a in answers] == [
        a["sequences"][0]["text"]
        for a in pipelines["translator"](["the fox", "the dog"], num_beams=3, max_new_tokens=5)
    ]
    details = ("--top-logprobs", "2", "--output-attentions", "--num-beams", "2", "--coverage-penalty", "0.5")
    code, answers, _ = command_line("generate", str(directories["translator"]), *details, lines="the fox\n")
    assert (code, answers) == (
        0,
        pipelines["translator"](["the fox"], top_logprobs=2, output_attentions=True, num_beams=2, coverage_penalty=0.5),
    )


def test_command_line_in_process(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "score.jsonl").write_text('{"text": "the fox", "target": "Ein Hund"}\n')
    assert main(["score", str(directories["translator"]), str(tmp_path / "score.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][-1] == "<eos>"
    (tmp_path / "picture.png").write_bytes(png())
    (tmp_path / "captions.jsonl").write_text(json.dumps({"image": str(tmp_path / "picture.png")}) + "\n")
    assert main(["generate", str(directories["captioner"]), str(tmp_path / "captions.jsonl")]) == 0
    assert "sequences" in json.loads(capsys.readouterr().out)
    (tmp_path / "cut.jsonl").write_text('{"text": "the fox"\n')
    captions, beams = (str(directories["captioner"]), str(tmp_path / "captions.jsonl")), "--num-beams"
    mistakes = {
        ("predict", str(directories["translator"])): "use generate or score",
        ("generate", str(directories["tagger"])): "use predict",
        ("predict", str(tmp_path)): "is no model directory",
        ("predict", str(directories["tagger"]), str(tmp_path / "nothing")): "cannot read",
        ("generate", *captions, beams, "0"): "num_beams",
        ("generate", *captions, beams, "999"): "256 rows",
        ("generate", *captions, "--output-attentions"): "output_attentions needs attention",
        ("generate", *captions, "--coverage-penalty", "0.5"): "coverage_penalty needs num_beams > 1",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert error.count("\n") == 1


def test_a_line_that_cannot_be_answered_says_so_in_its_place(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: dict[bytes, str] = {
        b"the fox": "",
        b'{"text": "the fox"': "begins with a brace but is no JSON",
        b"": "the text is empty",
        b"\xff\xfe": "is not UTF-8",
        b'{"image": "none.png"}': "cannot read the image file 'none.png'",
        b'{"text": "a", "words": ["a"]}': "has text, words",
        b"fox " * 100: "the input has",
        b"a dog\r": "",
        rb'{"\ud800": 1}': "this model takes",
        rb'{"\ud800": 1, "text": "\udfff"}': "has \ud800, text",
        rb'{"text": "\udfff"}': "half of a surrogate pair",
    }
    (tmp_path / "lines.txt").write_bytes(b"\n".join(lines))
    assert main(["predict", str(directories["classifier"]), str(tmp_path / "lines.txt")]) == 1
    out, err = capsys.readouterr()
    answers = [json.loads(line) for line in out.splitlines()]
    assert len(answers) == len(lines) and "9 lines could not be answered" in err
    for answer, message in zip(answers, lines.values(), strict=True):
        assert message in answer["error"]["message"] if message else "label" in answer
    (tmp_path / "score.jsonl").write_text('{"text": "the fox"}\n{"text": "the fox", "target": 7}\nthe fox\n')
    assert main(["score", str(directories["translator"]), str(tmp_path / "score.jsonl")]) == 1
    messages = [json.loads(line)["error"]["message"] for line in capsys.readouterr().out.splitlines()]
    assert ["target" in message for message in messages] == [True] * 3


def test_what_a_line_must_hold_is_said_in_the_words_of_the_command_line(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(command: str, model: str, *lines: str) -> list[Any]:
        (tmp_path / "lines.txt").write_text("\n".join(lines))
        main([command, str(directories[model]), str(tmp_path / "lines.txt")])
        out, err = capsys.readouterr()
        assert "error: 1 line could not be answered" in err or all("error" not in line for line in out.splitlines())
        return [json.loads(line) for line in out.splitlines()]

    assert 'takes {"image": "FILE"}' in answers("generate", "captioner", "a fox")[0]["error"]["message"]
    assert 'takes {"frames": ["FILE", ...]}' in answers("predict", "frames", "{}")[0]["error"]["message"]
    assert "this model takes a string" in answers("predict", "classifier", "{}")[0]["error"]["message"]
    first, second = answers("generate", "language model", "{}", "\n")
    assert first == second and first["sequences"]


@pytest.mark.parametrize("threads", ["abc", "0", "1.5"])
def test_a_number_of_threads_that_is_none(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "x", "--threads", threads])
    assert f"argument --threads: '{threads}' is no whole number of at least 1" in capsys.readouterr().err


def test_load_tells_how_busy_it_is(pipelines: dict[str, Pipeline]) -> None:
    counts = {"prefill_tokens_read": 0, "prefill_tokens_saved": 0}
    idle = {"waiting": 0, "rows_live": 0, "rows_total": 256}
    assert Pipeline(pipelines["translator"]._pretrained).load() == idle | counts
    job = pipelines["translator"].prepare("the fox", {"num_beams": 3})
    pipelines["translator"].submit(job)
    assert pipelines["translator"].load()["waiting"] == 1
    pipelines["translator"].step()
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


# -- going on from a state


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
    for name, item, wrong in (("translator", "the fox", "a fox"), ("captioner", {"image": picture}, {"image": other})):
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
    for option in ({"state": b""}, {"return_state": True}):
        with pytest.raises(InputError, match="is an option of generators"):
            pipelines["classifier"].prepare("a", **option)  # type: ignore[arg-type]


def test_the_command_line_goes_on_from_a_state(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sequences(*lines: Any, options: Sequence[str] = ()) -> list[Any]:
        (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        main(["generate", str(directories["language model"]), str(tmp_path / "lines.jsonl"), *options])
        answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return [answer["sequences"][0] if "sequences" in answer else answer["error"]["message"] for answer in answers]

    line = {"text": "the quick"}
    (whole,) = sequences(line, options=["--max-new-tokens", "7"])
    assert "state" not in whole
    (first,) = sequences(line, options=["--max-new-tokens", "3", "--return-state"])
    second, more, damaged, no_base64, number = sequences(
        {"state": first["state"]},
        {"state": first["state"], "text": " fox"},
        {"state": first["state"][:40]},
        {"state": "?"},
        {"state": 7},
        options=["--max-new-tokens", "4"],
    )
    assert first["text"].rstrip("\N{REPLACEMENT CHARACTER}") + second["text"] == whole["text"]
    assert more["text"] != second["text"]
    assert "damaged" in damaged
    assert "state is no base64" in no_base64 and "state is no base64" in number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"force_words": ["quick fox"], "bad_words": ["fox"]}, "which bad_words forbids"),
        ({"force_words": [" "]}, "has no tokens for"),
    ],
)
def test_words_that_can_never_be_written_are_refused(
    pipelines: dict[str, Pipeline], options: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        pipelines["translator"].prepare("fox", {"num_beams": 2, **options})
    assert error.value.param == "force_words"
