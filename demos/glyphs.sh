# make demo: the best that the program finds in four minutes. The characters are of a typeface that it has never seen.
set -eux
ROOT=${1:-collections/glyphs} RUN=${RUN:-outputs/demo}
DATA="data=glyphs data.root=$ROOT"

# Network, size, augmentation and rate follow from the minutes.
python train.py $DATA run_dir=$RUN/train loop.minutes=4
python evaluate.py run_dir=$RUN/train
python export.py format=onnx run_dir=$RUN/train
python predict.py weights=$RUN/train/export/model.onnx input=$ROOT/images/STIXGeneral output=$RUN/predictions.csv
