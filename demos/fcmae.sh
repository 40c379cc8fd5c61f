# make demo-fcmae: what pretraining does where labels are few (one typeface's). The three ways have three minutes each, from
# typing to the end: FCMAE on all images and fine-tuning share theirs.
set -eux
ROOT=${1:-collections/glyphs} RUN=${RUN:-outputs/demo_fcmae}
DATA="data=glyphs data.root=$ROOT" FEW=loop.find=path:images/DejaVuSans/

# Without labels, then with few.
python pretrain_fcmae.py $DATA experiment=glyphs/demo_pretrain run_dir=$RUN/pretrain loop.minutes=1.5
python finetune.py $DATA experiment=glyphs/demo_finetune init_from=$RUN/pretrain run_dir=$RUN/finetune loop.minutes=1.5 $FEW
# From scratch: the same network and recipe, then what the minutes ask for.
python finetune.py $DATA experiment=glyphs/demo_finetune task.head=random run_dir=$RUN/from_scratch loop.minutes=3 $FEW
python train.py $DATA run_dir=$RUN/planned loop.minutes=3 $FEW
