"""DeepNet and ResMem for models of growing size (the paper's Figure 3b and Table 1): which larger DeepNet a ResMem equals."""

import dataclasses
import math
import sys
from collections.abc import Sequence

import jax
from etils import epy

from resmem_lm.errors import UserError
from resmem_lm.model.config import ModelConfig
from resmem_lm.model.train import train
from resmem_lm.report.plots import Figure, line
from resmem_lm.report.tables import interval
from resmem_lm.studies.derived import build_and_evaluate, checkpoint_steps, derive, settings_of
from resmem_lm.studies.study import study, write_study
from resmem_lm.workdir.run import Run
from resmem_lm.workdir.storage import Record, read_json

with epy.lazy_imports():
    from resmem_lm.model import decoder

LINES = {"deepnet": "DeepNet", "resmem_paper": "ResMem (paper)", "resmem": "ResMem", "resmem_adaptive": "Adaptive ResMem"}


def resized(model: ModelConfig, width: int) -> ModelConfig:
    """The same model in another width: layers and size of a head stay, the MLP grows alike."""
    heads, mlp_dim = max(1, width // model.head_dim), max(1, width * model.mlp_dim // model.emb_dim)
    return dataclasses.replace(model, emb_dim=width, num_heads=heads, mlp_dim=mlp_dim)


def count_parameters(model: ModelConfig) -> int:
    """Of the whole model, embedding included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(lambda: decoder.init_parameters(model, 0))))


def equal_deepnet(parameters: Sequence[int], deepnet: Sequence[float], own: int, accuracy: float) -> str:
    """The size of the smallest DeepNet that is as accurate, as a multiple of the model's own size.

    Args:
        parameters: of the DeepNets, from the smallest.
        deepnet: their accuracy; between two of them it is taken to be linear in the logarithm of the size.
        own: parameters of the model.
        accuracy: to be reached.
    """
    if deepnet[0] >= accuracy:
        return f"{'at most ' if deepnet[0] > accuracy else ''}{parameters[0] / own:.2g}x"
    for number in range(1, len(parameters)):
        if deepnet[number] >= accuracy:
            share = (accuracy - deepnet[number - 1]) / (deepnet[number] - deepnet[number - 1])
            size = math.exp((1 - share) * math.log(parameters[number - 1]) + share * math.log(parameters[number]))
            return f"{size / own:.2g}x"
    return f"more than {parameters[-1] / own:.2g}x"


@study(name="model-size")
def study_model_size(run: Run, *, widths: tuple[int, ...] | list[int] = (64, 256)) -> Record:
    """Test accuracy of DeepNet and ResMem for the run's model and for others, trained, indexed and evaluated alike.

    Each is a work directory of its own, WORKDIR/derived/model-size/emb-WIDTH, with a datastore as large as the run's.

    Args:
        widths: `emb_dim` of the other models; heads and MLP follow.

    Raises:
        UserError: a width below 1, a run whose checkpoint was trained elsewhere, or whose datastore has changed since its evaluation.
    """
    if not widths or min(widths) < 1:
        raise UserError(f"study_model_size.widths = {widths}: take one or more widths, of 1 or more")
    settings = settings_of(run, "train")
    if "steps" not in settings:
        raise UserError(
            f"{run} took its checkpoint from elsewhere, and the study model-size trains other models as that one was: "
            "take the --workdir of a run that trained its own, without CHECKPOINT"
        )
    if "evaluate" not in run.current():
        raise UserError(f"{run}: the evaluation is of another datastore than this one: run `resmem index` and `resmem evaluate` first")
    own = ModelConfig(**settings["model"])
    found = [(own, read_json(run.results))]
    others = sorted(set(widths) - {own.emb_dim})
    for number, width in enumerate(others, start=1):
        print(f"model-size: emb {width} ({number} of {len(others)})", file=sys.stderr, flush=True)
        derived, model = derive(run, f"model-size/emb-{width}", ("documents", "vocabulary")), resized(own, width)
        train(derived, **settings | {"model": model, "checkpoint_steps": checkpoint_steps(settings["steps"])})
        dimensions = settings_of(run, "build")["key_dimensions"]
        found.append((model, build_and_evaluate(run, derived, key_dimensions=dimensions and min(dimensions, width))))

    found.sort(key=lambda pair: count_parameters(pair[0]))
    parameters = [count_parameters(model) for model, _ in found]
    methods = [results["splits"]["test"]["methods"] for _, results in found]
    accuracy = {name: [method[name]["accuracy"] for method in methods] for name in LINES}
    rows: list[Record] = [
        {
            "model": f"emb {model.emb_dim}",
            "parameters": size,
            "DeepNet, %": 100 * method["deepnet"]["accuracy"],
            "DeepNet, 95%": interval(method["deepnet"]["accuracy_ci95"]),
            "ResMem (paper), %": 100 * method["resmem_paper"]["accuracy"],
            "ResMem, %": 100 * method["resmem"]["accuracy"],
            "Adaptive ResMem, %": 100 * method["resmem_adaptive"]["accuracy"],
            "gain, %": 100 * method["resmem"]["gain"],
            "gain, 95%": interval(method["resmem"]["gain_ci95"]),
            "equals a DeepNet of": equal_deepnet(parameters, accuracy["deepnet"], size, method["resmem"]["accuracy"]),
        }
        for (model, _), size, method in zip(found, parameters, methods, strict=True)
    ]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, title) in enumerate(LINES.items()):
            line(axes, number, parameters, [100 * value for value in accuracy[name]], title)
        axes.set_xscale("log")
        axes.set_xticks(parameters, [f"{size / 1e6:.2g}M" for size in parameters])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        axes.set_ylabel("test accuracy, %")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=len(LINES), frameon=False)

    text = (
        "The same text, vocabulary, steps and settings for models of another width; ResMem with the paper's hyperparameters and with those "
        "chosen on validation, to which the gain belongs. Equals a DeepNet of: the size at which the DeepNet line, linear in the logarithm "
        "of the size, reaches ResMem's accuracy, as a multiple of the model's own."
    )
    return write_study(run, "model-size", title="Size of the model (Figure 3b, Table 1)", text=text, rows=rows, draw=draw)
