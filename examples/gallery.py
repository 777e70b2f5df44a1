"""The pictures of the documentation: the path of every rule, singular values under Muon, schedules.

make gallery            all of them, into docs/images/gallery
make gallery ARGS=Lion  those whose names are given
"""

import argparse
import inspect
import sys
from pathlib import Path

import numpy as np

import optimisers as opt
from optimisers import rules, schedules
from optimisers.rules._base import walk

try:
    import matplotlib as mpl
    from matplotlib import pyplot as plt
    from PIL import Image
except ImportError as error:
    sys.exit(f"the gallery is drawn with matplotlib, which is not installed ({error}); make gallery installs it")

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images" / "gallery"
STEPS = 150
# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, "#56b4e9", "#000000")

TURN = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
BOWL = TURN @ np.diag([1.0, 30.0]) @ TURN.T


class Problem:
    """A function of two numbers, its gradient, a start, and the part of the plane to show."""

    def __init__(self, title, value, gradient, start, box, goal=None):
        self.title, self.value, self.gradient = title, value, gradient
        self.start, self.box, self.goal = np.array(start), box, goal


PROBLEMS = (
    Problem(
        "a rotated quadratic, condition 30",
        lambda x, y: 0.5 * (BOWL[0, 0] * x * x + 2 * BOWL[0, 1] * x * y + BOWL[1, 1] * y * y),
        lambda x, y: np.array([BOWL[0, 0] * x + BOWL[0, 1] * y, BOWL[0, 1] * x + BOWL[1, 1] * y]),
        (-2.0, 0.6),
        (-2.6, 1.4, -1.6, 1.2),
        (0.0, 0.0),
    ),
    Problem(
        "Rosenbrock's function",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2,
        lambda x, y: np.array([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)]),
        (-1.2, 1.0),
        (-1.8, 1.6, -1.0, 2.4),
        (1.0, 1.0),
    ),
    Problem(
        "past a saddle",
        lambda x, y: 0.5 * x * x - 0.5 * y * y + 0.1 * y**4,
        lambda x, y: np.array([x, -y + 0.4 * y**3]),
        (-1.6, 0.01),
        (-2.0, 1.4, -0.6, 2.4),
        (0.0, 2.5**0.5),
    ),
)


def examples():
    """Every rule as it is mostly written, by name."""
    found = {}
    for name, rule in vars(rules).items():
        if not (inspect.isclass(rule) and issubclass(rule, opt.AbstractRule)) or inspect.isabstract(rule):
            continue
        for arguments in ((), (4,), (opt.Adam(),), (opt.Adam(), 1)):
            try:
                found[name] = rule(*arguments)
                break
            except (opt.errors.OptimisersError, TypeError):
                continue
    return found


def with_rate(rule, eta):
    """The rule with a learning rate; a member of chains is followed by descent."""
    try:
        return opt.adjust(rule, eta)
    except opt.errors.OptimisersError:
        return opt.OptimiserChain(rule, opt.Descent(eta))


def path(rule, problem):
    """The points that a rule visits, None if it leaves the part of the plane that is shown."""
    matrices = any(isinstance(inner, (opt.Muon, opt.Apollo)) for inner in walk(rule))
    try:
        shape = (1, 2) if matrices else (2,)
        x = problem.start.reshape(shape)
        state = opt.setup(rule, x)
    except opt.errors.RuleError:  # it steps matrices only
        shape = (1, 2)
        x = problem.start.reshape(shape)
        state = opt.setup(rule, x)
    points = [problem.start]
    left, right, low, high = problem.box
    for _ in range(STEPS):
        with np.errstate(all="ignore"):
            state, x = opt.update(state, x, problem.gradient(*x.ravel()).reshape(shape))
        points.append(x.ravel())
        across, up = x.ravel()
        if not (left <= across <= right and low <= up <= high):
            return None
    return np.array(points)


def best_path(rule, problem):
    """(learning rate, path) of those that end lowest, of three rates in each power of ten."""
    found = []
    for eta in 10.0 ** np.arange(-4, 0.7, 1 / 3):
        points = path(with_rate(rule, float(eta)), problem)
        if points is not None:
            found.append((np.log10(1e-12 + problem.value(*points.T) - problem.value(*problem.goal))[-30:].mean(), eta, points))
    return min(found, key=lambda item: item[0])[1:] if found else None


def draw_paths(folder, name, rule):
    """The paths of one rule over all problems, side by side."""
    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(9.6, 3.0), layout="constrained")
    for axis, problem in zip(axes, PROBLEMS, strict=True):
        left, right, low, high = problem.box
        x, y = np.meshgrid(np.linspace(left, right, 160), np.linspace(low, high, 160))
        height = problem.value(x, y)
        axis.contour(x, y, np.log1p(height - height.min()), levels=10, colors="0.75", linewidths=0.6)
        best = best_path(rule, problem)
        if best is not None:
            eta, points = best
            axis.plot(*points.T, color=BLUE, linewidth=1.2, marker=".", markersize=3.5)
            axis.plot(*points[0], marker="o", markersize=6, markerfacecolor="white", markeredgecolor="black")
        axis.plot(*problem.goal, color="black", marker="*", markersize=10)
        rate = "no rate stays in view" if best is None else f"eta = {eta:.2g}"
        axis.set(title=f"{problem.title}\n{rate}", xlim=(left, right), ylim=(low, high), xticks=[], yticks=[])
    save(figure, folder, name)


def draw_spectrum(folder):
    """Singular values before and after the matrix step, for each family of coefficients."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(64, 64)))[0] for _ in range(2))
    before = np.geomspace(1e-3, 1.0, 64)
    matrix = u * before @ v
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    axis.loglog(before, before, color="0.6", linestyle=":", label="before")
    for colour, (name, steps) in zip(
        COLOURS, (("jordan", 5), ("you", 5), ("polar_express", 5), ("polar_express", 8)), strict=False
    ):
        after = np.linalg.svd(opt.orthogonalise(matrix, opt.NewtonSchulz(steps, name)), compute_uv=False)
        axis.loglog(before, after[::-1], color=colour, label=f"{name}, {steps} steps")
    axis.set(xlabel="singular value before, largest 1", ylabel="after")
    axis.legend()
    save(figure, folder, "spectrum")


def draw_schedules(folder):
    """Values of the schedules over a thousand steps."""
    shown = {
        "Linear": schedules.Linear(1.0, 0.1, 1000),
        "Polynomial": schedules.Polynomial(1.0, 0.0, 1000),
        "WarmupCosine": schedules.WarmupCosine(1.0, warmup=100, steps=1000),
        "WarmupStableDecay": schedules.WarmupStableDecay(1.0, warmup=100, steps=1000, decay=250),
        "InverseSqrt": schedules.InverseSqrt(1.0, warmup=100),
        "Exponential": schedules.Exponential(1.0, 0.5, every=250),
        "Steps": schedules.Steps(1.0, 0.4, at=(300, 600, 850)),
    }
    figure, axis = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    steps = np.arange(1001)
    for colour, style, (name, schedule) in zip(COLOURS, ("-", "--", "-", "-.", "-", "--", ":"), shown.items(), strict=True):
        axis.plot(steps, [schedule(int(t)) for t in steps], style, color=colour, label=name)
    axis.set(xlabel="step", ylabel="part of the largest value")
    axis.legend(fontsize="small")
    save(figure, folder, "schedules")


def save(figure, folder, name):
    """Write a picture with few colours, which makes it small."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.png"
    figure.savefig(file, dpi=100)
    plt.close(figure)
    with Image.open(file) as image:
        image.convert("RGB").quantize(24, dither=Image.Dither.NONE).save(file, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="rules, 'spectrum' or 'schedules'; all by default")
    parser.add_argument("--to", type=Path, default=FOLDER, help="the folder to write to")
    options = parser.parse_args()
    mpl.use("agg")
    mpl.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    known = examples()
    pictures = {name: lambda folder, name=name, rule=rule: draw_paths(folder, name, rule) for name, rule in known.items()}
    pictures |= {"spectrum": draw_spectrum, "schedules": draw_schedules}
    if unknown := sorted(set(options.names) - pictures.keys()):
        sys.exit(f"there is no picture of {', '.join(unknown)}; there are {', '.join(sorted(pictures))}")
    for name in options.names or pictures:
        pictures[name](options.to)
    print(f"{len(options.names or pictures)} pictures in {options.to}")


if __name__ == "__main__":
    main()
