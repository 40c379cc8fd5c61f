"""Create a W&B dashboard for a project, with the charts that matter first.

    python -m utils.record.wandb_dashboard [ENTITY/]PROJECT

It makes a saved view named `Atelier` in the project, and prints its address. Your other views stay as they are; the
command again makes another view.
"""

import argparse
import sys
from collections.abc import Sequence

from utils.errors import UserError
from utils.record.wandb_mode import find_problem, import_wandb
from utils.tool import print_result

NAME = "Atelier"

# Section -> (title, names of figures) of each chart. The axis is `step`, or `samples` where the section says so.
CHARTS = {
    "Result": [
        ("top-1 on the validation split", ["evaluate/top1", "evaluate/ema/top1"]),
        ("validation loss", ["evaluate/loss", "evaluate/ema/loss"]),
        ("macro F1", ["evaluate/macro_f1", "evaluate/ema/macro_f1"]),
    ],
    "Training": [
        ("training loss", ["train/loss"]),
        ("training accuracy", ["train/accuracy"]),
        ("learning rate", ["train/lr"]),
        ("momentum", ["train/momentum"]),
        ("gradient norm", ["train/grad_norm"]),
        ("skipped steps", ["train/skipped_steps"]),
    ],
    "Pretraining": [
        ("probes of the features", ["evaluate/probe/knn", "evaluate/probe/linear"]),
        ("loss of the reconstruction", ["evaluate/loss", "train/loss"]),
    ],
    "By samples seen": [
        ("top-1 on the validation split", ["evaluate/top1", "evaluate/ema/top1"]),
        ("training loss", ["train/loss"]),
    ],
    "Speed and memory": [
        ("images per second", ["train/images_per_sec"]),
        ("peak memory, GiB", ["train/peak_memory_gib"]),
        ("seconds of training", ["epoch/seconds"]),
    ],
}
PICTURES = ["images/reconstructions", "images/mistakes", "images/confusion", "images/predictions"]
TABLES = ["tables/classes", "tables/confusions"]


def create_dashboard(project: str, entity: str | None) -> str:
    """Create the view and return its address. Raises UserError where W&B refuses."""
    if (problem := find_problem()) is not None:
        raise UserError(f"{problem}; run `wandb login` once")
    wandb = import_wandb()
    import wandb_workspaces.reports.v2 as charts
    import wandb_workspaces.workspaces as views

    sections = [
        views.Section(
            name=section,
            panels=[
                charts.LinePlot(title=title, x="samples" if "samples" in section else "step", y=list(names))
                for title, names in lines
            ],
            is_open=True,
        )
        for section, lines in CHARTS.items()
    ]
    pictures = [charts.MediaBrowser(title=name.partition("/")[2], media_keys=[name]) for name in PICTURES]
    tables = [charts.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    sections += [views.Section(name="Pictures", panels=pictures), views.Section(name="Tables", panels=tables)]
    try:
        api = wandb.Api(timeout=20)
        default = api.default_entity  # asks the server, for 20 s; what follows would wait for one that is down
        entity = entity or default
        api.create_project(project, entity)  # if it is not there yet
        return views.Workspace(name=NAME, entity=entity, project=project, sections=sections).save().url
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"W&B does not make the view in {entity}/{project}: {reason}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser("python -m utils.record.wandb_dashboard", description="Create a W&B dashboard.")
    parser.add_argument("project", help="[ENTITY/]PROJECT; the entity is the account's default")
    entity, _, project = parser.parse_args(arguments).project.rpartition("/")
    return print_result("wandb_dashboard", lambda: create_dashboard(project, entity or None))


if __name__ == "__main__":
    sys.exit(main())
