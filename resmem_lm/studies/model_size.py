"""Compare DeepNet and ResMem for models of growing size (Figure 3b, Table 1); find the DeepNet that equals each ResMem."""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
from etils import epy

from resmem_lm.errors import UserError
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import train
from resmem_lm.report.plots import Figure, legend_above, line, log_ticks
from resmem_lm.report.tables import interval
from resmem_lm.studies.derived import build_and_evaluate, checkpoint_steps, derive
from resmem_lm.studies.study import check_values, study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

with epy.lazy_imports():
    from resmem_lm.model import decoder

LINES = ("DeepNet", "ResMem (paper)", "ResMem", "Adaptive ResMem")


@study(name="model-size")
def study_model_size(run: Run, *, widths: tuple[int, ...] | list[int] = (64, 256)) -> Record:
    """Compare the test accuracy of DeepNet and ResMem for the run's model and for other widths, all with the same settings.

    Each other model has a work directory, WORKDIR/derived/model-size/emb-WIDTH, with a datastore as large as the run's.

    Args:
        widths: `emb_dim` of the other models; heads and MLP follow.

    Raises:
        UserError: a width below 1, a run that did not train its model, or a datastore that has changed since the evaluation.
    """
    check_values("study_model_size.widths", widths, lambda width: width >= 1, "of 1 or more")
    settings = run.finished("train")["settings"]
    if "steps" not in settings:
        raise UserError(
            f"{run} took its checkpoint from elsewhere, and the study model-size trains other models with the settings of the run: "
            "take the --workdir of a run that trained its model, without CHECKPOINT"
        )
    if "evaluate" not in run.current():
        raise UserError(f"{run}: the datastore has changed since the evaluation: run `resmem index` and `resmem evaluate` first")
    own = ModelConfig(**settings["model"])
    found = [(own, read_json(run.results))]
    others = sorted(set(widths) - {own.emb_dim})
    for number, width in enumerate(others, start=1):
        print(f"model-size: emb {width} ({number} of {len(others)})", file=sys.stderr, flush=True)
        found.append((resized(own, width), _evaluate(run, resized(own, width))))
    rows = _rows({count_parameters(model): (model, results["splits"]["test"]["methods"]) for model, results in found})
    text = (
        "Models of different widths have the same text, vocabulary, steps and settings. ResMem (paper) has the paper's hyperparameters. "
        "ResMem has hyperparameters chosen on validation; the gain is its gain. The last column is the size of a DeepNet with ResMem's "
        "accuracy, as a multiple of the model's size. It is interpolated linearly in the logarithm of the size."
    )
    return write_study(run, "model-size", title="Size of the model (Figure 3b, Table 1)", text=text, rows=rows, draw=_draw)


def resized(model: ModelConfig, width: int) -> ModelConfig:
    """Return the model in another width: layers and head size stay the same, and the MLP grows in proportion."""
    heads, mlp_dim = max(1, width // model.head_dim), max(1, width * model.mlp_dim // model.emb_dim)
    return dataclasses.replace(model, emb_dim=width, num_heads=heads, mlp_dim=mlp_dim)


def count_parameters(model: ModelConfig) -> int:
    """Return the number of parameters, embedding included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: decoder.init_parameters(model, 0))))


def equal_deepnet(parameters: Sequence[int], deepnet: Sequence[float], own: int, accuracy: float) -> str:
    """Return the size of the smallest DeepNet with at least a given accuracy, as a multiple of `own` parameters.

    `deepnet` has the accuracies of models with ascending `parameters`. Between them, accuracy is linear in the logarithm of the size.
    """
    if deepnet[0] >= accuracy:
        return f"{'at most ' if deepnet[0] > accuracy else ''}{parameters[0] / own:.2g}x"
    for number in range(1, len(parameters)):
        if deepnet[number] >= accuracy:
            share = (accuracy - deepnet[number - 1]) / (deepnet[number] - deepnet[number - 1])
            size = math.exp((1 - share) * math.log(parameters[number - 1]) + share * math.log(parameters[number]))
            return f"{size / own:.2g}x"
    return f"more than {parameters[-1] / own:.2g}x"


def _evaluate(run: Run, model: ModelConfig) -> Record:
    """Train another model with the run's settings; return the results of its evaluation."""
    derived = derive(run, f"model-size/emb-{model.emb_dim}", ("documents", "vocabulary"))
    settings, dimensions = run.finished("train")["settings"], run.finished("build")["settings"]["key_dimensions"]
    train(derived, **settings | {"model": model, "checkpoint_steps": checkpoint_steps(settings["steps"])})
    return build_and_evaluate(run, derived, key_dimensions=dimensions and min(dimensions, model.emb_dim))


def _rows(found: dict[int, tuple[ModelConfig, Record]]) -> list[Record]:
    """Return one row per model, by number of parameters."""
    parameters = sorted(found)
    deepnet = [found[size][1]["deepnet"]["accuracy"] for size in parameters]
    return [
        {
            "model": f"emb {model.emb_dim}",
            "parameters": size,
            "DeepNet, %": 100 * methods["deepnet"]["accuracy"],
            "DeepNet, 95%": interval(methods["deepnet"]["accuracy_ci95"]),
            "ResMem (paper), %": 100 * methods["resmem_paper"]["accuracy"],
            "ResMem, %": 100 * methods["resmem"]["accuracy"],
            "Adaptive ResMem, %": 100 * methods["resmem_adaptive"]["accuracy"],
            "gain, %": 100 * methods["resmem"]["gain"],
            "gain, 95%": interval(methods["resmem"]["gain_ci95"]),
            "DeepNet as accurate as ResMem": equal_deepnet(parameters, deepnet, size, methods["resmem"]["accuracy"]),
        }
        for size, (model, methods) in sorted(found.items(), key=lambda item: item[0])
    ]


def _draw(figure: Figure, rows: list[Record]) -> None:
    axes, parameters = figure.subplots(), [row["parameters"] for row in rows]
    for number, title in enumerate(LINES):
        line(axes, number, parameters, [row[f"{title}, %"] for row in rows], title)
    log_ticks(axes, parameters, lambda size: f"{size / 1e6:.2g}M", base=10)
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    legend_above(figure)
