"""python -m seqmodels predict | generate | score MODEL_DIR: offline use of a saved model.

One JSON object or one plain text per input line; one JSON object per output line, in the same order.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from seqmodels.decoding.params import SearchParams
from seqmodels.errors import InputError, SeqModelsError
from seqmodels.pipeline import Pipeline

CHUNK = 256  # lines read, answered and written together


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        pipeline = Pipeline.from_pretrained(options.model, options.device, options.max_rows)
        _check_command(options.command, pipeline)
        with _opened(options.input) as lines:
            _answer_all(pipeline, options, lines)
    except SeqModelsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        sys.stderr.close()
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m seqmodels", description="Use a saved model on lines of input.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="predict | generate | score")
    predict = commands.add_parser("predict", help="labels, from a classifier or a tagger")
    generate = commands.add_parser("generate", help="text, from a generator: greedy, beam search or sampling")
    score = commands.add_parser("score", help="log-probabilities of given texts, from a generator")
    for command in (predict, generate, score):
        command.add_argument("model", metavar="MODEL_DIR", help="a directory that training saved")
        command.add_argument("input", nargs="?", default="-", metavar="FILE", help="input lines; - is standard input")
        command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
        command.add_argument("--threads", type=_positive, help="CPU threads (default: torch's own choice)")
        command.add_argument(
            "--max-rows", type=_positive, default=256, help="decoder rows at once (default: %(default)s)"
        )
        command.add_argument("--truncate", action="store_true", help="shorten inputs that are too long")
    predict.epilog = score.epilog = generate.epilog = (
        'A line is a plain text, or JSON: {"text": ...}, {"words": [...]}, {"image": "FILE"}, '
        '{"frames": ["FILE", ...]} or {"features": [[...], ...]}. A language model takes the prompt as its line.'
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
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _check_command(command: str, pipeline: Pipeline) -> None:
    generator = pipeline.config.architecture == "generator"
    if generator == (command == "predict"):
        fitting = "generate or score" if generator else "predict"
        raise InputError(f"{command} does not fit this model, which is a {pipeline.config.architecture}: use {fitting}")


def _opened(name: str) -> Any:
    if name == "-":
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # by default it lets broken bytes pass
        return sys.stdin
    try:
        return Path(name).open(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def _answer_all(pipeline: Pipeline, options: argparse.Namespace, lines: Iterable[str]) -> None:
    params = {name: getattr(options, name, None) for name in SearchParams.model_fields}
    params = {name: value for name, value in params.items() if value is not None}
    numbered = enumerate(_decoded(lines), start=1)
    while chunk := list(islice(numbered, CHUNK)):
        jobs = []
        for number, line in chunk:
            item = _item(line, number)
            where = f"line {number}"
            try:
                if options.command == "score":
                    jobs.append(
                        pipeline.prepare_score(*_with_target(item, where), truncate=options.truncate, field=where)
                    )
                else:
                    jobs.append(pipeline.prepare(item, params, truncate=options.truncate, field=where))
            except InputError as error:
                place = "" if error.param in params else f"{where}: "
                raise InputError(f"{place}{error}") from None
        for answer in pipeline.run(jobs):
            print(json.dumps(answer, ensure_ascii=False))


def _decoded(lines: Iterable[str]) -> Iterator[str]:
    try:
        for line in lines:
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the input is not UTF-8: {error.reason}") from None


def _item(line: str, number: int) -> Any:
    """A line as `Pipeline.prepare` takes it; the files that it names are read."""
    if not line.lstrip().startswith("{"):
        return line
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):  # more likely a damaged file than a text that begins with a brace
        raise InputError(
            f'line {number}: begins with a brace but is no JSON; mend it, or write the text as {{"text": "..."}}'
        ) from None
    if "image" in item:
        item["image"] = _read(item["image"], number)
    if isinstance(item.get("frames"), list):
        item["frames"] = [_read(frame, number) for frame in item["frames"]]
    return item


def _with_target(item: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(item, dict) or "target" not in item:
        raise InputError(f'{where}: must be JSON with a "target", such as {{"text": "A dog.", "target": "Ein Hund."}}')
    target = item.pop("target")
    return item, target


def _read(name: Any, number: int) -> bytes:
    try:
        return Path(name).read_bytes()
    except (OSError, TypeError, ValueError):
        raise InputError(f"line {number}: cannot read the image file {name!r}") from None


if __name__ == "__main__":
    sys.exit(main())
