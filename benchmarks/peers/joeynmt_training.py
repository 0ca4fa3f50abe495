"""A training step of JoeyNMT: its model, batch, loss, clipping and optimizer, in the order of its training loop.

Without input feeding too, its decoder goes step by step in Python.
"""

from types import SimpleNamespace

import torch
from joeynmt.batch import Batch as JoeyBatch
from joeynmt.builders import build_gradient_clipper, build_optimizer
from joeynmt.training import TrainManager

from benchmarks.peers.exchange import EOS, PAD, Exported
from benchmarks.peers.joeynmt import make_model
from benchmarks.peers.training import LEARNING_RATE, MAX_GRAD_NORM, ROWS, Batch, Step, main

CPU = torch.device("cpu")
OPTIONS = {
    "optimizer": "adam",
    "learning_rate": LEARNING_RATE,
    "clip_grad_norm": MAX_GRAD_NORM,
    "clip_grad_val": None,
}


def load(exported: Exported) -> Step:
    model = make_model(exported)
    model.loss_function = ("crossentropy", 0.0)  # a kind and how much of it is smoothed
    clip, optimizer = build_gradient_clipper(OPTIONS), build_optimizer(OPTIONS, model.parameters())
    # What `_train_step` reads of its manager, which also opens folders and data sets.
    manager = SimpleNamespace(
        model=model,
        autocast={"device_type": "cpu", "enabled": False},
        args=SimpleNamespace(normalization="tokens", batch_multiplier=1),
        n_gpu=0,
        scaler=None,
    )

    def step(batch: Batch) -> float:
        loss, _ = TrainManager._train_step(manager, joey_batch(batch))
        clip(parameters=model.parameters())
        optimizer.step()
        model.zero_grad()
        return float(loss)

    return step


def joey_batch(batch: Batch) -> JoeyBatch:
    return JoeyBatch(
        src=batch["inputs"],
        src_length=batch["lengths"],
        src_prompt_mask=None,
        trg=batch["labels"],
        trg_prompt_mask=None,
        indices=torch.arange(ROWS),
        device=CPU,
        pad_index=PAD,
        eos_index=EOS,
    )


if __name__ == "__main__":
    main(load)
