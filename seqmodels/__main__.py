"""python -m seqmodels predict | generate | score MODEL_DIR [MODEL_DIR ...] [FILE]: offline use of a saved model, or of
several that answer as one.

One JSON object or one plain text per input line; one JSON object per output line, in the same order, as soon as there
is one. A line that cannot be answered gets {"error": ...} in the place of its answer, and the exit status is 1 in the
end.
"""

import argparse
import base64
import codecs
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch

from seqmodels.clips import frame_files, is_directory
from seqmodels.config import Average, Weights
from seqmodels.decoding.params import SearchParams
from seqmodels.errors import ConfigError, InputError, SeqModelsError
from seqmodels.pipeline import Job, Pipeline

PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")  # how files of them begin, and no line of text is likely to
CHUNK = 256  # lines read, answered and written together, where so many are there
BLOCK = 1 << 16  # bytes read at a time; a pipe holds no more
# Options that are wrong for every line, where they are for one.
OPTIONS = {*SearchParams.model_fields, "threshold", "return_state"}
MAX_THREADS = 1024
SEARCHES_WITH = ("decoder_weights", "shortlist", "max_rows")  # options of generate alone
# A line names files, not bytes.
TAKES_FILES = {"image": '{"image": "FILE"}', "frames": '{"frames": ["FILE", ...]}, or {"frames": "FILE OR DIRECTORY"}'}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where some lines could not be answered, 2 for a mistake in the command."""
    options = _options(arguments)
    if sys.stdout is None:
        print("error: standard output is closed, and answers have nowhere to go", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        directories, file = _directories_and_file(options.paths)
        given = {name: getattr(options, name) for name in SEARCHES_WITH if hasattr(options, name)}
        average = _average(options.average, directories)
        pipeline = Pipeline.from_pretrained(directories, options.device, average=average, **given)
        _check_command(options.command, pipeline)
        with _opened(file) as lines:
            failed = _answer_all(pipeline, options, lines.fileno())
    except SeqModelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: a file cannot be read or written: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if failed:
        several = "1 line" if failed == 1 else f"{failed} lines"
        print(f"error: {several} could not be answered; each says why in its place", file=sys.stderr)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line. argparse takes paths up to the first option; those that stand after it come here."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if unknown := [text for text in rest if text.startswith("-") and text != "-"]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    options.paths += rest
    return options


def _directories_and_file(paths: Sequence[str]) -> tuple[list[str], str]:
    """The models, and the file of input lines, which is the one path beyond the first that is no directory."""
    first, *others = paths
    files = [path for path in others if path == "-" or not Path(path).is_dir()]
    if files and (len(files) > 1 or others[-1] != files[0]):
        raise ConfigError(f"{files[0]} is no directory; give model directories, then at most one file of input lines")
    return [first, *others[: len(others) - len(files)]], files[0] if files else "-"


def _average(given: Average | None, directories: Sequence[str]) -> Average:
    if given and len(directories) == 1:
        raise ConfigError(f"--average is {given!r}, but one model has nothing to average; name several or leave it out")
    return given or "probability"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqmodels", description="Use a saved model on lines of input.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="predict | generate | score")
    predict = commands.add_parser("predict", help="labels, from a classifier or a tagger")
    generate = commands.add_parser("generate", help="text, from a generator: greedy, beam search or sampling")
    score = commands.add_parser("score", help="log-probabilities of given texts, from a generator")
    for command in (predict, generate, score):
        command.usage = f"python -m seqmodels {command.prog.split()[-1]} [options] MODEL_DIR [MODEL_DIR ...] [FILE]"
        command.add_argument(
            "paths",
            nargs="+",
            metavar="PATH",
            help="one or more directories that training saved, of which several answer as one model; then the file of "
            "input lines, without which (or as -) standard input is read",
        )
        command.add_argument(
            "--average",
            choices=get_args(Average),
            help="of what several models predict: their probabilities (default), or their log-probabilities",
        )
        command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        command.add_argument("--threads", type=_threads, help="CPU threads (default: torch's own choice)")
        command.add_argument("--truncate", action="store_true", help="shorten inputs that are too long")
    for command, comes_with in ((predict, "with each answer"), (generate, "with each sequence")):
        command.add_argument(
            "--return-state",
            action="store_true",
            help=f'{comes_with} a "state" in base64; a line {{"state": ..., "text": ...}} goes on from it',
        )
    predict.add_argument(
        "--threshold", type=float, metavar="P", help="a label less likely than this, from 0 to 1, is null"
    )
    generate.add_argument("--max-rows", type=_positive, default=256, help="decoder rows at once (default: %(default)s)")
    generate.add_argument(
        "--decoder-weights",
        choices=get_args(Weights),
        default="float32",
        help="what the search computes in: int8 is faster on a CPU, float16 and bfloat16 on a GPU, at a small loss "
        "(default: %(default)s)",
    )
    generate.add_argument(
        "--shortlist",
        action="store_true",
        help="choose tokens from the model's shortlist: faster, at a small loss (see python -m training shortlist); "
        "its logits are float32 whatever --decoder-weights is",
    )
    predict.epilog = score.epilog = generate.epilog = (
        'A line is a plain text, or JSON: {"text": ...}, {"words": [...]}, {"image": "FILE"}, '
        '{"frames": ["FILE", ...]}, {"frames": "an animated FILE, or a DIRECTORY of pictures"} or {"features": [[...], '
        "...]}. A language model takes the prompt as its line."
    )
    score.description = 'Each line is JSON with the input as for generate, and a "target": the text to score.'
    for name, field in SearchParams.model_fields.items():
        _add_option(generate, name, field.annotation, field.default)
    return parser


def _add_option(command: argparse.ArgumentParser, name: str, kind: Any, default: Any) -> None:
    flag = "--" + name.replace("_", "-")
    shown = f"default: the model's own, else {default!r}"
    if kind is bool:
        command.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, help=shown)
    elif isinstance(default, tuple):
        command.add_argument(flag, dest=name, action="append", metavar="TEXT", help="may be given several times")
    else:
        value_type = {str: str, float: float}.get(type(default), int)
        command.add_argument(flag, dest=name, type=value_type, metavar=value_type.__name__.upper(), help=shown)


def _positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return number


def _threads(text: str) -> int:
    """For argparse: with tens of thousands the libraries below torch end the process, without a word."""
    if (number := _positive(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{number} threads are too many; give at most {MAX_THREADS}")
    return number


def _check_command(command: str, pipeline: Pipeline) -> None:
    generator = pipeline.config.architecture == "generator"
    if generator == (command == "predict"):
        fitting = "generate or score" if generator else "predict"
        raise InputError(f"{command} does not fit this model, which is a {pipeline.config.architecture}: use {fitting}")


def _opened(name: str) -> AbstractContextManager[BinaryIO]:
    if name == "-" and sys.stdin is None:
        raise InputError("standard input is closed; give a file of input lines")
    if name == "-":
        return nullcontext(sys.stdin.buffer)
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def _answer_all(pipeline: Pipeline, options: argparse.Namespace, file: int) -> int:
    """Print an answer or an error for each line; returns the number of errors. Raises InputError for a bad option."""
    params = {name: getattr(options, name, None) for name in SearchParams.model_fields}
    params = {name: value for name, value in params.items() if value is not None}
    failed = 0
    for chunk in _chunks(file):
        prepared = [_prepared(pipeline, options, params, line) for line in chunk]
        answers = iter(pipeline.outcomes([job for job in prepared if isinstance(job, Job)]))
        for job in prepared:
            answer = next(answers) if isinstance(job, Job) else job
            if isinstance(answer, SeqModelsError):
                failed += 1
                answer = {"error": {"message": str(answer), "code": getattr(answer, "code", "invalid_value")}}
            print(_as_json(answer))
        sys.stdout.flush()
    return failed


def _chunks(file: int) -> Iterator[list[bytes]]:
    """Its lines, less a byte order mark, some at a time. Raises InputError where they are the bytes of a picture, which
    is what one gives first."""
    for number, lines in enumerate(_lines_ready(file)):
        if number == 0:
            lines[0] = lines[0].removeprefix(codecs.BOM_UTF8)
        if number == 0 and lines[0].startswith(PICTURES):
            raise InputError(
                'the input is a picture, not lines that name some; write a line such as {"image": "FILE"}, or '
                '{"frames": "FILE"} of an animated one'
            )
        yield lines


def _lines_ready(file: int) -> Iterator[list[bytes]]:
    """At most CHUNK lines at a time: of a person or a pipe those that have come, for what comes next may wait for their
    answers."""
    lines: list[bytes] = []
    begun: list[bytes] = []  # parts of a line whose end has not come
    while block := os.read(file, BLOCK):
        end, *others = block.split(b"\n")
        begun.append(end)
        for other in others:
            lines.append(b"".join(begun))
            begun = [other]
        while lines and (len(lines) >= CHUNK or not select.select([file], [], [], 0)[0]):
            yield lines[:CHUNK]
            lines = lines[CHUNK:]
    lines += [last] if (last := b"".join(begun)) else []
    while lines:
        yield lines[:CHUNK]
        lines = lines[CHUNK:]


def _as_json(answer: Any) -> str:
    """One line, bytes in base64. Half of a surrogate pair, which no UTF-8 can hold, is written as JSON's own escape."""
    text = json.dumps(answer, ensure_ascii=False, default=lambda data: base64.b64encode(data).decode())
    return text.encode("utf-8", "backslashreplace").decode()


def _prepared(
    pipeline: Pipeline, options: argparse.Namespace, params: dict[str, Any], line: bytes
) -> Job | SeqModelsError:
    try:
        item, target, state = _item(line), None, None
        if options.command == "score":
            item, target = _with_target(item)
        else:
            item, state = _with_state(item)
        kind = pipeline.config.input
        if kind in TAKES_FILES and not (isinstance(item, dict) and kind in item):
            raise InputError(f"this model takes {TAKES_FILES[kind]}", code="unsupported_input")
        if options.command == "score":
            return pipeline.prepare_score(
                item, target, truncate=options.truncate, field="the input", target_field="the target"
            )
        return pipeline.prepare(
            item,
            params,
            truncate=options.truncate,
            field="the input",
            state=state,
            return_state=options.return_state,
            threshold=getattr(options, "threshold", None),
        )
    except InputError as error:
        # How many new tokens an engine has room for depends on what a line gives.
        if error.param in OPTIONS and (error.param, error.code) != ("max_new_tokens", "limit_exceeded"):
            raise
        return error


def _item(line: bytes) -> Any:
    """A line as `Pipeline.prepare` takes it; the files that it names are read. {} is nothing, such as no prompt."""
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        raise InputError("the line is not UTF-8; convert the file first") from None
    if not text.lstrip().startswith("{"):
        return text
    try:
        item = json.loads(text)
    except (ValueError, RecursionError):  # more likely a damaged file than a text that begins with a brace
        raise InputError(
            'the line begins with a brace but is no JSON; mend it, or write the text as {"text": "..."}'
        ) from None
    if "image" in item:
        item["image"] = _read(item["image"])
    if "frames" in item:
        item["frames"] = _read_frames(item["frames"])
    return item or None


def _with_target(item: Any) -> tuple[Any, Any]:
    """The input and the target; for a language model, which may have no prompt, the input may be left out."""
    if not isinstance(item, dict) or "target" not in item:
        raise InputError('the line must be JSON with a "target", such as {"text": "A dog.", "target": "Ein Hund."}')
    target = item.pop("target")
    return item or None, target


def _with_state(item: Any) -> tuple[Any, bytes | None]:
    """The input and the state to go on from; for a language model, which may get no more text, that may be all."""
    if not isinstance(item, dict) or "state" not in item:
        return item, None
    try:
        state = base64.b64decode(item.pop("state"), validate=True)
    except (TypeError, ValueError):
        raise InputError("state is no base64; send what --return-state gave", param="state") from None
    return item or None, state


def _read_frames(named: Any) -> bytes | list[bytes]:
    """Of a list of files, of a directory of them, or one animated file."""
    if isinstance(named, list):
        return [_read(name) for name in named]
    if is_directory(named):
        return [_read(path) for path in frame_files(Path(named))]
    return _read(named)


def _read(name: Any) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the image file {str(name)!r}: {error.strerror}") from None
    except (TypeError, ValueError):
        raise InputError(f"{name!r} is no name of a file") from None


if __name__ == "__main__":
    sys.exit(main())
