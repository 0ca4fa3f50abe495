"""python -m seqmodels: one line in, one answer out, and what is said of a line that cannot be answered."""

import json
import select
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from seqmodels.__main__ import CHUNK, main
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import save_pretrained
from tests.seqmodels.builders import make_model
from tests.seqmodels.conftest import MODELS, STACK, TEXT, TOKENIZER, png


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


def test_a_byte_order_mark_is_no_text(
    directories: dict[str, Path], tmp_path: Path, pipelines: dict[str, Pipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("the fox", '{"text": "the fox"}'):
        (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n".encode())
        assert main(["predict", str(directories["classifier"]), str(tmp_path / "lines.txt")]) == 0
        assert json.loads(capsys.readouterr().out) == pipelines["classifier"](["the fox"])[0]


def test_what_cannot_be_written_is_told_without_a_traceback(directories: dict[str, Path]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "seqmodels", "predict", str(directories["classifier"])]
        done = subprocess.run(command, input="the fox\n", stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 2 and "No space left on device" in done.stderr and "Traceback" not in done.stderr


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
    (tmp_path / "fox.txt").write_text("the fox\n")
    classify = ["predict", str(directories["classifier"]), str(tmp_path / "fox.txt")]
    for threshold, told in (("0", True), ("1", False)):
        assert main([*classify, "--threshold", threshold]) == 0
        assert (json.loads(capsys.readouterr().out)["label"] is not None) is told
    both_ways = {**TEXT, "recurrent": {**STACK, "bidirectional": True}}
    made = make_model(1, 2.0, **{**MODELS["classifier"], "encoder": both_ways})
    save_pretrained(made, tmp_path / "both", source_tokenizer=TOKENIZER)
    (tmp_path / "cut.jsonl").write_text('{"text": "the fox"\n')
    captions, beams = (str(directories["captioner"]), str(tmp_path / "captions.jsonl")), "--num-beams"
    mistakes = {
        (*classify, "--threshold", "1.5"): "threshold is 1.5, but a probability is between 0 and 1",
        ("generate", *captions, "--max-rows", "1", beams, "2"): "num_beams is 2, but this engine has 1 rows",
        ("predict", str(tmp_path / "both"), str(tmp_path / "fox.txt"), "--return-state"): "return_state is for input",
        ("predict", str(directories["translator"])): "use generate or score",
        ("generate", str(directories["tagger"])): "use predict",
        ("predict", str(tmp_path)): "is no model directory",
        ("predict", str(directories["tagger"]), str(tmp_path / "nothing")): "cannot read",
        ("generate", *captions, beams, "0"): "num_beams",
        ("generate", *captions, beams, "999"): "256 rows",
        ("generate", str(directories["captioner"]), str(tmp_path / "picture.png")): "the input is a picture, not lines",
        ("generate", *captions, "--output-attentions"): "output_attentions needs attention",
        ("generate", *captions, "--coverage-penalty", "0.5"): "coverage_penalty needs num_beams > 1",
    }
    for arguments, message in mistakes.items():
        assert main(list(arguments)) == 2, arguments
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert error.count("\n") == 1


def test_a_line_is_answered_before_the_next_one_comes(directories: dict[str, Path]) -> None:
    """A program that asks, waits for the answer and asks on would wait for ever."""
    command = [sys.executable, "-m", "seqmodels", "predict", str(directories["classifier"])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin and process.stdout
        try:
            for text in ("the fox", "the dog"):
                process.stdin.write(f"{text}\n")
                process.stdin.flush()
                assert select.select([process.stdout], [], [], 60)[0]
                assert "label" in json.loads(process.stdout.readline())
            process.stdin.write("no end of line")
            process.stdin.close()
            assert "label" in json.loads(process.stdout.readline())
        finally:
            process.kill()


def test_many_lines_are_answered_in_their_order(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In several chunks, and in blocks that end inside a line."""
    lines = [f'{{"image": "none-{number}.png"}}' for number in range(2 * CHUNK + 3)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("seqmodels.__main__.BLOCK", 1000)
        main(["predict", str(directories["classifier"]), str(tmp_path / "lines.txt")])
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == len(lines)
    assert all(f"'none-{number}.png'" in answer for number, answer in enumerate(answers))


def test_a_closed_standard_input_is_said(directories: dict[str, Path]) -> None:
    command = f"{sys.executable} -m seqmodels predict {directories['classifier']} <&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "error: standard input is closed; give a file of input lines\n")


def test_a_closed_standard_output_is_said(directories: dict[str, Path]) -> None:
    command = f"echo a fox | {sys.executable} -m seqmodels predict {directories['classifier']} >&-"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "error: standard output is closed, and answers have nowhere to go\n")


def test_an_option_that_one_line_alone_has_no_room_for(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seqmodels.decoding.engine.MAX_DETAILS", 500 * 64 * 256)
    (tmp_path / "lines.txt").write_text("the fox\n" + "the fox " * 30 + "\nthe fox\n")
    options = ["--output-attentions", "--max-new-tokens", "500"]
    assert main(["generate", str(directories["translator"]), str(tmp_path / "lines.txt"), *options]) == 1
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["sequences" in answer for answer in answers] == [True, False, True]
    assert "max_new_tokens is 500" in answers[1]["error"]["message"]


def test_a_line_that_cannot_be_answered_says_so_in_its_place(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines: dict[bytes, str] = {
        b"the fox": "",
        b'{"text": "the fox"': "begins with a brace but is no JSON",
        b"": "the text is empty",
        b"\xff\xfe": "is not UTF-8",
        b'{"image": "none.png"}': "cannot read the image file 'none.png': No such file or directory",
        b'{"image": "."}': "cannot read the image file '.': Is a directory",
        b'{"image": 3}': "3 is no name of a file",
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
    assert len(answers) == len(lines) and "11 lines could not be answered" in err
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


def test_a_clip_is_a_list_of_files_or_a_directory_or_one_file(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shades = [Image.new("L", (8, 8), 20 * number) for number in range(11)]
    shades[0].save(tmp_path / "clip.gif", save_all=True, append_images=shades[1:])
    (tmp_path / "clip").mkdir()
    files = [tmp_path / "clip" / f"frame{number}.png" for number in range(11)]
    for file, shade in zip(files, shades, strict=True):
        shade.save(file)
    (tmp_path / "clip" / "notes.txt").touch()
    clips = [[*map(str, files)], str(tmp_path / "clip"), str(tmp_path / "clip.gif"), "", "x" * 5000, "\0", 7]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps({"frames": clip}) + "\n" for clip in clips))
    assert main(["predict", str(directories["frames"]), str(tmp_path / "clips.jsonl")]) == 1
    listed, directory, moving, *wrong = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(listed["tags"]) == 11 and listed == directory == moving
    words = ("cannot read the image file ''", "File name too long", "is no name of a file", "7 is no name of a file")
    for answer, word in zip(wrong, words, strict=True):
        assert word in answer["error"]["message"]


@pytest.mark.parametrize("threads", ["abc", "0", "1.5"])
def test_a_number_of_threads_that_is_none(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "x", "--threads", threads])
    assert f"argument --threads: '{threads}' is no whole number of at least 1" in capsys.readouterr().err


def test_more_threads_than_the_libraries_survive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["predict", "x", "--threads", "100000"])
    assert "argument --threads: 100000 threads are too many; give at most 1024" in capsys.readouterr().err


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


def test_the_command_line_reads_an_input_in_pieces(
    directories: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], pipelines: dict[str, Pipeline]
) -> None:
    def predict(model: str, line: dict[str, Any], *options: str) -> Any:
        (tmp_path / "lines.jsonl").write_text(json.dumps(line) + "\n")
        main(["predict", str(directories[model]), str(tmp_path / "lines.jsonl"), *options])
        return json.loads(capsys.readouterr().out)

    first = predict("classifier", {"text": "the quick"}, "--return-state")
    second = predict("classifier", {"state": first["state"], "text": " fox"})
    assert "state" not in second and second == pipelines["classifier"](["the quick fox"])[0]
    first = predict("tagger", {"words": ["the", "quick"]}, "--return-state")
    assert "state" in predict("tagger", {"state": first["state"], "words": ["fox"]}, "--return-state")
    other = predict("classifier", {"state": first["state"], "text": "fox"})
    assert "was made by a model" in other["error"]["message"]
