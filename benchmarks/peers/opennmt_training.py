"""A training step of OpenNMT-py: its model, its loss with the statistics it keeps, its optimizer, its own trainer."""

from types import SimpleNamespace

from torch import nn

from benchmarks.peers.exchange import PAD, Exported
from benchmarks.peers.opennmt import make_model  # first: it lets OpenNMT-py be imported
from benchmarks.peers.training import LEARNING_RATE, MAX_GRAD_NORM, Batch, Step, main

from onmt.trainer import Trainer  # isort: skip
from onmt.utils import Statistics  # isort: skip
from onmt.utils.loss import LossCompute  # isort: skip
from onmt.utils.optimizers import Optimizer  # isort: skip

OPTIONS = SimpleNamespace(
    optim="adam",
    learning_rate=LEARNING_RATE,
    max_grad_norm=MAX_GRAD_NORM,
    adam_beta1=0.9,
    adam_beta2=0.999,
    decay_method="none",
    start_decay_steps=None,
    train_from="",
    model_dtype="fp32",
)


def load(exported: Exported) -> Step:
    model = make_model(exported)
    criterion = nn.CrossEntropyLoss(ignore_index=PAD, reduction="sum")
    loss = LossCompute(criterion, model.generator)
    trainer = Trainer(model, loss, loss, None, {}, Optimizer.from_opt(model, OPTIONS), norm_method="tokens")

    def step(batch: Batch) -> float:
        given = {
            "src": batch["inputs"][:, :, None],
            "srclen": batch["lengths"],
            "tgt": batch["labels"][:, :, None],
        }
        statistics = Statistics()
        for batches, normalization in trainer._accum_batches([(given, 0)]):
            trainer._gradient_accumulation(batches, normalization, Statistics(), statistics)
        return float(statistics.xent())

    return step


if __name__ == "__main__":
    main(load)
