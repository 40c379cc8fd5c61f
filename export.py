"""Export weights to files for other tools. Each file is compared with PyTorch before it is kept.

    python export.py format=onnx run_dir=RUN                          writes RUN/export/model.onnx
    python export.py format=onnx precision=fp16 run_dir=RUN           RUN/export/model_fp16.onnx
    python export.py format=onnx precision=int8 run_dir=RUN           RUN/export/model_int8.onnx, if it pays
    python export.py format=timm run_dir=RUN                          which transformers loads, too; or safetensors
    python export.py format=page run_dir=RUN                          one HTML file that predicts in a browser
    python export.py format=wd14 run_dir=RUN                          for a tagger
    python export.py format=wd_repository run_dir=RUN                 a tagger for all programs, to publish
    python export.py format=kohya run_dir=RUN                         for SDXL; or single_file, diffusers, ...

docs/weights.md describes the formats, how to load them, and how weights from elsewhere become a run.
"""

from utils.start import begin

begin(__doc__)

from engine.exports.config import ExportConfig
from utils.config.entry_point import Command

main = Command("export", "engine.exports.export:export", ExportConfig)

if __name__ == "__main__":
    main()
