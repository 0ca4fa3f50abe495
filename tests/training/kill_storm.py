"""Kill a training run with SIGKILL, again and again, and compare its end with that of a run left alone.

    python -m tests.training.kill_storm --kills 1000

Runs are forked from one process that has imported everything, so a kill costs a fraction of a second. A child says in
shared memory what it is doing; the parent waits for the phase it wants to hit, then strikes at a random moment in it.
In a save, and when a finished run makes its model directory, a child strikes itself: before a given one of the system
calls by which it changes the disk there, each in its turn.
"""

import argparse
import functools
import hashlib
import json
import mmap
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import training.checkpoint
import training.loop
import training.run
from tests.training import together

PHASES = ("start-up", "step", "validation", "save")  # of a run under way
FINISH = "finish"
SYSTEM_CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")
CALLS_OF_TWO_SAVES = 60  # about: more as there is more to remove
FINISHING, FINISHED = 36, 60  # about: the calls of a finish up to when it is one, and with what it removes then
TIMEOUT_S = 120.0
Shared = mmap.mmap  # byte 0: the phase, by its place in ENTERED; byte 1: how often it was entered, modulo 256
ENTERED = (*PHASES, FINISH)


def recipe_fields(number: int, directory: Path, workers: int = 1) -> dict[str, Any]:
    """Four runs that between them use all that a checkpoint holds."""
    sections, settings = (_language_model, _classifier, _tagger, _translator)[number % 4]()
    return {**sections, "run": _run(directory, workers=workers, **settings)}


def _language_model() -> tuple[dict[str, Any], dict[str, Any]]:
    """Carried state, dropout of every kind, noise, chunks of many lengths, 16 bits, averages, plateau."""
    words = {"kind": "word", "vocab_size": 120}
    decoder = {
        "embedding_size": 8,
        "embedding_dropout": 0.1,
        "dropout": 0.2,
        "locked_dropout": True,
        "activation_penalty": 0.1,
        "temporal_activation_penalty": 0.1,
        "recurrent": {"cell": "lstm", "hidden_size": 8, "num_layers": 2, "dropout": 0.1, "weight_dropout": 0.2},
    }
    return {
        "task": "generate",
        "data": {"generated": "language-model", "tokenizer": words, "chunk_length": 8, "vary_chunk_length": True},
        "model": {"architecture": "generator", "decoder": decoder},
        "optim": {"learning_rate": 0.01, "lr_scheduler_type": "plateau", "gradient_noise": 1e-4},
    }, {"ema_decay": 0.9, "tokens_per_batch": 128, "bf16": True}


def _classifier() -> tuple[dict[str, Any], dict[str, Any]]:
    """Length buckets, accumulation, momentum, warm-up, snapshots."""
    return {
        "task": "classify",
        "data": {"generated": "sentiment", "tokenizer": {"kind": "word", "vocab_size": 200}},
        "model": {"architecture": "classifier", "dropout": 0.1, "encoder": _text_encoder("gru")},
        "optim": {
            "optimizer": "sgd",
            "momentum": 0.9,
            "nesterov": True,
            "learning_rate": 0.1,
            "lr_scheduler_type": "cosine_with_restarts",
            "num_cycles": 3,
            "warmup_steps": 5,
        },
    }, {"gradient_accumulation_steps": 2, "tokens_per_batch": 256, "keep_snapshots": True}


def _tagger() -> tuple[dict[str, Any], dict[str, Any]]:
    """Both directions, clipping of each number, patience, rates by parameter, late learners, a mean of models."""
    encoder = _text_encoder("lstm", bidirectional=True, num_layers=2, dropout=0.2)
    return {
        "task": "tag",
        "data": {"generated": "number-tags", "tokenizer": {"kind": "character", "vocab_size": 60}},
        "model": {"architecture": "tagger", "encoder": encoder},
        "optim": {
            "optimizer": "rmsprop",
            "learning_rate": 3e-3,
            "momentum": 0.5,
            "clip_value": 0.1,
            "learning_rate_factors": {"encoder.embedding.*": 0.5},
            "unfreeze_steps": {"encoder.recurrent.*": 21},
        },
    }, {"tokens_per_batch": 512, "early_stopping_patience": 4, "average_best": 2}


def _translator() -> tuple[dict[str, Any], dict[str, Any]]:
    """Two vocabularies, attention, zoneout, label smoothing, frozen weights, sampled tokens, beam search."""
    recurrent = {"cell": "lstm", "hidden_size": 8, "layer_norm": True, "zoneout": 0.1, "cell_zoneout": 0.2}
    decoder = {"embedding_size": 8, "attention": "additive", "recurrent": recurrent, "scheduled_sampling": 0.5}
    return {
        "task": "translate",
        "data": {"generated": "numbers-en-fr", "tokenizer": {"kind": "word", "vocab_size": 100}},
        "model": {
            "architecture": "generator",
            "label_smoothing": 0.1,
            "encoder": _text_encoder("rnn_tanh"),
            "decoder": decoder,
        },
        "optim": {"optimizer": "adamw", "weight_decay": 0.01, "freeze": ["encoder.embedding.*"], "warmup_steps": 10},
        "generation": {"num_beams": 2, "max_new_tokens": 8},
    }, {"tokens_per_batch": 256, "max_eval_samples": 8}


def _text_encoder(cell: str, **recurrent: Any) -> dict[str, Any]:
    return {"input": "text", "embedding_size": 8, "recurrent": {"cell": cell, "hidden_size": 8, **recurrent}}


def _run(directory: Path, **settings: Any) -> dict[str, Any]:
    every = {"eval_steps": 12, "save_steps": 5, "logging_steps": 3, "max_eval_samples": 40}
    return {"max_steps": 60, "threads": 1, "output_dir": str(directory), **every, **settings}


def outcome(directory: Path) -> dict[str, str]:
    """What must not depend on interruptions: weights, optimizer, random states, and the metric log."""
    newest = training.checkpoint.saved_checkpoints(directory / "checkpoints")[-1]
    progress = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
    del progress["seconds"]
    files = {"state": newest / "state.safetensors", "log": directory / "metrics.jsonl"}
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    for path in (
        directory / "model.safetensors",
        directory / "finished.json",
        *sorted(directory.glob("snapshots/*/model.safetensors")),
    ):
        digests[str(path.relative_to(directory))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return {**digests, "progress": json.dumps(progress)}


def storm(kills: int, seed: int = 1, workers: int = 1) -> Counter[str]:
    """Kill so often; return how many kills hit each phase. Raises AssertionError where an end differs.

    workers: of each run; the first is struck, and the others die with it.
    """
    source = random.Random(seed)
    hits: Counter[str] = Counter()
    number = 0

    def under_way() -> int:
        return sum(hits[phase] for phase in PHASES)

    with tempfile.TemporaryDirectory() as folder:
        while under_way() < kills:
            alone, stormy = Path(folder) / f"alone-{number}", Path(folder) / f"stormy-{number}"
            assert _finish(recipe_fields(number, alone, workers)), "the uninterrupted run failed"
            # A quarter of the kills wanted, so that every recipe gets its share.
            limit = min(kills, under_way() + -(-kills // 4))
            while under_way() < limit:
                rarest = min(PHASES, key=lambda phase: (hits[phase], source.random()))
                call = hits["save"] % CALLS_OF_TWO_SAVES + 1 if rarest == "save" else 0
                hit = _kill_in(rarest, recipe_fields(number, stormy, workers), source, call)
                if hit is None:  # it was done before we struck
                    break
                hits[hit] += 1
            for left in reversed(range(max(2, kills // 40))):  # the last where the run may be finished already
                call = hits[FINISH] % FINISHING + 1 if left else source.randint(FINISHING, FINISHED)
                if _kill_in(FINISH, recipe_fields(number, stormy, workers), source, call) is None:
                    break
                hits[FINISH] += 1
            assert _finish(recipe_fields(number, stormy, workers)), "the run did not get over its last kill"
            assert not (stormy / "validated").exists()
            difference = {k for k, v in outcome(alone).items() if v != outcome(stormy)[k]}
            assert not difference, f"after {sum(hits.values())} kills these differ: {', '.join(sorted(difference))}"
            number += 1
            print(f"{number} runs, {hits.total()} kills: each run ended as the one left alone", file=sys.stderr)
    return hits


def _kill_in(phase: str, fields: dict[str, Any], source: random.Random, call: int = 0) -> str | None:
    """Start, wait for the phase, kill. Returns the phase that was hit, None if the run ended first.

    call: 0, or which of the phase's system calls the child is to die before.
    """
    shared = mmap.mmap(-1, 2)
    child = _fork(fields, shared, phase, call)
    if not call:
        entries = 1 if phase == "start-up" else source.randint(1, 9 if phase == "step" else 2)
        seen, last, deadline = 0, -1, time.monotonic() + TIMEOUT_S
        while seen < entries:
            if os.waitpid(child, os.WNOHANG)[0]:
                return None
            assert time.monotonic() < deadline, f"phase {phase} never came"
            if ENTERED[shared[0]] == phase and shared[1] != last:
                seen, last = seen + 1, shared[1]
        time.sleep(source.random() * (0.15 if phase == "start-up" else 0.003))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return ENTERED[shared[0]] if os.WIFSIGNALED(status) else None


def _finish(fields: dict[str, Any]) -> bool:
    return os.waitpid(_fork(fields, mmap.mmap(-1, 2)), 0)[1] == 0


def _fork(fields: dict[str, Any], shared: Shared, phase: str = "", call: int = 0) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        _announce(shared)
        if call:
            _die_before(call, phase, shared)
        together.train(fields)
        code = 0
    finally:
        os._exit(code)


def _announce(shared: Shared) -> None:
    """Wrap the phases so that each says when it begins, and gives way to the one it stands in when it ends."""

    def announced(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **options: Any) -> Any:
            before = shared[0]
            shared[0], shared[1] = ENTERED.index(phase), (shared[1] + 1) % 256
            result = function(*args, **options)
            shared[0] = before
            return result

        return wrapper

    training.loop.Trainer.run = announced("step", training.loop.Trainer.run)  # type: ignore[method-assign]
    training.loop.Trainer._step = announced("step", training.loop.Trainer._step)  # type: ignore[method-assign]
    training.loop.Trainer._validate = announced("validation", training.loop.Trainer._validate)  # type: ignore[method-assign]
    training.loop.Trainer._save = announced("save", training.loop.Trainer._save)  # type: ignore[method-assign]
    training.run._finish = announced(FINISH, training.run._finish)


def _die_before(call: int, phase: str, shared: Shared) -> None:
    """Kill this process before one of the calls by which it changes the disk in a phase, counted from 1.

    Python tells an audit hook of those that open, rename, make and remove; `flush` is wrapped, of which it tells
    nothing. The tensors are written by one call of the library, which a random moment may hit as well.
    """
    made = 0

    def count() -> None:
        nonlocal made
        if ENTERED[shared[0]] == phase:
            made += 1
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, given: tuple[Any, ...]) -> None:
        if event in SYSTEM_CALLS and (event != "open" or given[2] & (os.O_WRONLY | os.O_RDWR)):
            count()

    flush = training.checkpoint.flush

    def counted_flush(path: Path) -> None:
        count()
        flush(path)

    sys.addaudithook(audit)
    training.checkpoint.flush = counted_flush


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    hits = storm(options.kills, options.seed, options.workers)
    missed = [phase for phase in ENTERED if not hits[phase]]
    print(
        json.dumps({"kills": dict(hits), "missed": missed, "equal": True, "seconds": round(time.monotonic() - began)})
    )
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
