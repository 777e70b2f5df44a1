"""Recognise handwritten digits with a small multilayer perceptron in pure NumPy; PyTorch is never imported.

    python examples/digits_numpy.py
    python examples/digits_numpy.py --rule lion --epochs 60

The model is a plain tree of arrays, the gradients are written by hand, and the step is a pure function:
`state, model = opt.update(state, model, grads)` leaves the old model as it was.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: no display is needed

import numpy as np
from matplotlib import pyplot as plt
from numpy import ndarray
from sklearn.datasets import load_digits
from tqdm import tqdm

import optimisers as opt

Model = dict[str, list[dict[str, ndarray]]]  # {"layers": [{"weight": (out, in), "bias": (out,)}, ...]}

# The name given to --rule -> a function that returns the rule.
RULES: dict[str, Callable[[], opt.AbstractRule]] = {
    "adamw": lambda: opt.AdamW(3e-3, lambda_=0.1),
    "adam": lambda: opt.Adam(3e-3),
    "lion": lambda: opt.Lion(5e-4),
    "momentum": lambda: opt.OptimiserChain(opt.WeightDecay(1e-4), opt.Momentum(0.1)),
}


@dataclass(frozen=True)
class Split:
    """Images `(n, 64)` with values in [0, 1], labels `(n,)` from 0 to 9."""

    images: ndarray
    labels: ndarray


def load_data(random: np.random.Generator, test: float = 0.2) -> tuple[Split, Split]:
    """The 1,797 images of 8 x 8 pixels, shuffled, as (train, test)."""
    digits = load_digits()
    order = random.permutation(len(digits.target))
    images, labels = (digits.data[order] / 16).astype(np.float32), digits.target[order]
    cut = int(len(order) * (1 - test))
    return Split(images[:cut], labels[:cut]), Split(images[cut:], labels[cut:])


def initialise(sizes: list[int], random: np.random.Generator) -> Model:
    """Normal weights of variance 2 / inputs (He et al. 2015), zero biases."""

    def layer(inputs: int, outputs: int) -> dict[str, ndarray]:
        weight = random.normal(scale=np.sqrt(2 / inputs), size=(outputs, inputs))
        return {"weight": weight.astype(np.float32), "bias": np.zeros(outputs, np.float32)}

    return {"layers": [layer(inputs, outputs) for inputs, outputs in pairwise(sizes)]}


def forward(model: Model, x: ndarray) -> list[ndarray]:
    """What enters each layer, and the logits `(batch, 10)` last; a ReLU stands between two layers."""
    values = [x]
    for i, layer in enumerate(model["layers"]):
        x = x if i == 0 else np.maximum(x, 0)
        values[-1] = x
        x = x @ layer["weight"].T + layer["bias"]
        values.append(x)
    return values


def loss_and_grads(model: Model, batch: Split) -> tuple[float, Model]:
    """Mean cross-entropy, and its gradients in a tree like the model's."""
    *inputs, logits = forward(model, batch.images)
    rows = np.arange(len(batch.labels))
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exps / exps.sum(axis=1, keepdims=True)
    loss = -np.log(probabilities[rows, batch.labels]).mean()

    delta = probabilities  # the loss's derivative by a layer's output, beginning with the logits
    delta[rows, batch.labels] -= 1
    delta /= len(rows)
    grads = []
    for layer, x in zip(reversed(model["layers"]), reversed(inputs), strict=True):
        grads.append({"weight": delta.T @ x, "bias": delta.sum(axis=0)})
        delta = (delta @ layer["weight"]) * (x > 0)  # x came out of a ReLU, except the images, where delta ends
    return float(loss), {"layers": grads[::-1]}


def accuracy(model: Model, split: Split) -> float:
    return float((forward(model, split.images)[-1].argmax(axis=1) == split.labels).mean())


@dataclass
class History:
    """One entry an epoch: the mean training loss, and the test accuracy after it."""

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)


def train(
    model: Model,
    rule: opt.AbstractRule,
    data: tuple[Split, Split],
    random: np.random.Generator,
    *,
    epochs: int,
    batch: int = 64,
    progress: bool = False,
) -> tuple[Model, History]:
    """A trained model and its history; the model given stays as it was."""
    training, test = data
    history = History()
    state = opt.setup(rule, model)
    bar = tqdm(range(epochs), disable=not progress)
    for epoch in bar:
        if epoch == epochs * 3 // 4:
            state = opt.adjust(state, times=0.1)  # the last quarter at a tenth of the learning rate
        losses = []
        order = random.permutation(len(training.labels))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            loss, grads = loss_and_grads(model, Split(training.images[rows], training.labels[rows]))
            state, model = opt.update(state, model, grads)
            losses.append(loss)
        history.loss.append(float(np.mean(losses)))
        history.accuracy.append(accuracy(model, test))
        bar.set_postfix(loss=f"{history.loss[-1]:.4f}", accuracy=f"{history.accuracy[-1]:.3f}")
    return model, history


def plot(history: History, title: str, path: Path) -> None:
    """The training loss (logarithmic) on the left, the test accuracy on the right."""
    epochs = np.arange(1, len(history.loss) + 1)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    figure.suptitle(title)
    left.semilogy(epochs, history.loss, "C0", label="training loss")
    left.set(xlabel="epoch", ylabel="cross-entropy (nats)")
    right.plot(epochs, history.accuracy, "C1", label="test accuracy")
    right.set(xlabel="epoch", ylabel="share recognised")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> History:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rule", choices=RULES, default="adamw")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits_numpy"))
    parser.add_argument("--no-progress", action="store_true")
    args = parser.parse_args(argv)

    random = np.random.default_rng(args.seed)
    data = load_data(random)
    model = initialise([64, 128, 64, 10], random)
    rule = RULES[args.rule]()
    print(opt.setup(rule, model))
    _, history = train(model, rule, data, random, epochs=args.epochs, progress=not args.no_progress)
    plot(history, f"Handwritten digits, {args.rule}", args.out / "curves.png")
    print(f"test accuracy {history.accuracy[-1]:.1%} after {args.epochs} epochs; curves in {args.out / 'curves.png'}")
    return history


if __name__ == "__main__":
    main()
    assert "torch" not in sys.modules, "this example must run without PyTorch"
