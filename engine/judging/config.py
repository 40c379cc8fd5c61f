"""The keys of evaluate.py and, for images, of predict.py."""

from typing import Annotated, Literal, Self

from pydantic import Field, create_model, model_validator

from data.config import DataConfig
from data.tags.rules import TagRulesConfig, TextConfig
from engine.config import MachineConfig
from engine.exports.config import MovedBase, WeightsChoice
from utils.config.bounds import Count, CountOrZero, Fraction, Inner, Pixels, Some
from utils.config.schema import PathList, PathText, Strict, text_or
from utils.formats.spelling import CATEGORIES
from utils.formats.thresholds import PER_TAG

Split = Literal["auto", "val", "test", "train", "all"]


class _Targets(Strict):
    """The precision and recall that the profiles high_precision and high_recall reach."""

    precision: Inner
    recall: Inner


class Evaluate(WeightsChoice):
    """Measure one weight file.

    output: a folder. split: auto is val; of other images val, else test, else all. per_image: also write a row for each
    image. folds: the number of parts of the images; for each part, train the recipe on the others, and measure it
    there. calibrate: also write the thresholds of a tagger or a classifier. risk: the share of a classifier's answers
    that may be wrong.
    """

    name: Literal["evaluate"]
    output: PathText | None
    split: Split
    per_image: bool
    folds: Count | None
    calibrate: bool
    calibration: _Targets
    risk: Inner | None


class Compare(TagRulesConfig):
    """Compare taggers, `models`. min_support: the fewest images of a tag that is compared. output: a folder."""

    name: Literal["compare"]
    split: Split
    min_support: Count
    models: Annotated[PathList, Field(min_length=1)]
    output: PathText | None


class EvaluateConfig(Strict):
    """conf/evaluate.yaml, checked. data: None means the data of the run."""

    job: Annotated[Evaluate | Compare, Field(discriminator="name")]
    data: DataConfig | None
    batch_size: Count
    dry_run: bool
    runtime: MachineConfig


CategoryThresholds = create_model(  # None: from `threshold` or by `profile`
    "CategoryThresholds", __base__=Strict, **{name: (Fraction | None, ...) for name in CATEGORIES if name != "rating"}
)


class PredictConfig(Strict):
    """conf/predict.yaml, checked."""

    weights: Annotated[PathList, Field(min_length=1)]  # a run folder or a file; for prompts, several
    input: PathText | Some[PathText] | None
    prompts: PathText | None
    output: PathText | None  # a file, FOLDER/ or `beside`; None: a table in `sort`
    sort: PathText | None  # a folder for copies of the images, by class
    sort_by: Literal["copy", "link"]
    form: PathText | None  # a CSV file, whose ids and columns the output has
    existing: Literal["skip", "append", "overwrite"] | None  # for images that have tags, or with skip a row
    top: Count  # the number of classes
    threshold: Fraction | None  # for every tag or class; None: from `thresholds`, of tags by `profile`
    thresholds: text_or(CategoryThresholds, PathText)  # a table, or the threshold of each category
    profile: Literal["per_tag", "balanced", "high_precision", "high_recall", "best_f1"]
    text: TextConfig
    lora: PathList  # FILE or FILE:STRENGTH
    model: MovedBase
    batch_size: Count
    max_pixels: Pixels
    device: Literal["auto", "cpu", "cuda"]
    workers: Literal["auto"] | CountOrZero
    dry_run: bool

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.input is None) == (self.prompts is None):
            raise ValueError("input: must be given, or prompts for pictures of SDXL, and not both; add input=PATH")
        if self.output is None and (self.sort is None or self.prompts is not None):
            raise ValueError("output: must be given; add output=FILE, or for classes sort=FOLDER")
        if self.prompts is None and len(self.weights) > 1:
            raise ValueError("weights: several are for prompts=FILE; name one")
        if self.prompts is not None and self.existing == "append":
            raise ValueError("existing: append is for .txt files; set skip or overwrite")
        if self.form is not None and (self.prompts or self.sort or not self.output.endswith(".csv")):
            raise ValueError("form: is for output=FILE.csv of classes or tags; remove it, or prompts and sort")
        if self.prompts is None and self.lora:
            raise ValueError("lora: is for pictures of SDXL; add prompts=FILE")
        if self.threshold is not None and (isinstance(self.thresholds, str) or self.profile != PER_TAG):
            raise ValueError(
                f"threshold: {self.threshold:g} applies to every tag; remove it, or thresholds=FILE and profile"
            )
        return self
