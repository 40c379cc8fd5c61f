# make demo-tagger: a tagger of the words in the characters' names, and its file for ComfyUI.
set -eux
ROOT=${1:-collections/glyphs} RUN=${RUN:-outputs/demo_tagger}
DATA="data=glyphs data.root=$ROOT"

# From scratch; the orientation map exchanges left and right tags of mirrored images.
python train.py task=tagging task.orientation=glyphs $DATA run_dir=$RUN/tagger loop.minutes=3
# Thresholds, fitted on half of the validation images, measured on the others.
python evaluate.py run_dir=$RUN/tagger calibrate=true
python export.py format=wd14 run_dir=$RUN/tagger
python predict.py weights=$RUN/tagger/export/wd14/model.onnx input=$ROOT/images/STIXGeneral output=$RUN/predictions.jsonl
