"""Predict classes, tags or features of images with a run, a weight file or an ONNX file; draw pictures with SDXL.

    python predict.py weights=RUN input=PATH output=predictions.jsonl
    python predict.py weights=RUN input=FOLDER sort=SORTED threshold=0.7    copies, in a folder of each class
    python predict.py weights=RUN/weights/last_weights.safetensors input=PATH output=predictions.csv top=1
    python predict.py weights=RUN/export/model.onnx input=image.png output=predictions.csv
    python predict.py weights=RUN input=FOLDER output=submission.csv form=sample_submission.csv   of a competition
    python predict.py weights=RUN input=FOLDER output=beside text.spaces=true            tags: a .txt beside each image
    python predict.py weights=RUN_OR_BASE prompts=FILE output=FOLDER lora=[FILE:0.8]     SDXL: a picture of each prompt
    python predict.py weights=[BASE,RUN,FILE] prompts=FILE output=FOLDER    the pictures of several weights, on one page

`input` is an image, a folder with its subfolders, a pattern, a list of these, or `-` (paths from standard input). An
image that cannot be read gets a row with the reason.
"""

from utils.start import begin

begin(__doc__)

from engine.judging.config import PredictConfig
from sdxl.config import DrawConfig
from utils.config.entry_point import Job, entry_point
from utils.start import open_name


class Config(PredictConfig):
    """conf/predict.yaml, checked."""

    pictures: DrawConfig


@entry_point("predict", Config)
def main(config: Config, job: Job) -> str:
    """Predict images, or draw pictures."""
    name = "engine.judging.predict:predict" if config.prompts is None else "sdxl.pictures.painter:draw_prompts"
    return open_name(name)(config, job)


if __name__ == "__main__":
    main()
