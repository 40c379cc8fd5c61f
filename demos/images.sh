# make workshop, or sh demos/images.sh PATH: from images, some of them with tags, to a tagger and a tiny SDXL. Trainings
# have minutes, the sizes are for two CPU cores (docs/commands.md).
set -eux
ROOT=${1:-collections/shapes} RUN=${RUN:-outputs/workshop}
SMALL="optim=muon loop.batch_size=64 loop.evaluate_every_epochs=100 schedule.warmup_most=0.1 runtime.compile=false"

# FCMAE, without labels.
python pretrain_fcmae.py data.validation_fraction=0.25 data.root="$ROOT" run_dir=$RUN/pretrain model=convnextv2_glyph \
    'model.depths=[1,1,4]' 'augment.image_size_hw=[32,32]' augment.pad=square 'augment.mean=[0.5,0.5,0.5]' \
    'augment.std=[0.5,0.5,0.5]' $SMALL optim.lr=3e-3 loop.minutes=1 schedule.warmup_steps=30
# A tagger, on the images that have tags; its thresholds, fitted on half of the validation images; its file for ComfyUI.
python finetune.py data.validation_fraction=0.25 data.root="$ROOT" run_dir=$RUN/tagger init_from=$RUN/pretrain task=tagging \
    task.min_count=5 'augment.image_size_hw=[32,32]' $SMALL optim.lr=6e-3 loop.minutes=1 loop.clip_grad_norm=1.0 \
    schedule.warmup_steps=15
python evaluate.py run_dir=$RUN/tagger calibrate=true
python export.py format=wd14 run_dir=$RUN/tagger
# The images in a copy, and tags for those that have none.
python prepare.py job=copy data.root="$ROOT" job.to=$RUN/images
python predict.py weights=$RUN/tagger input=$RUN/images output=beside existing=skip text.spaces=true text.order=vocabulary
python prepare.py job=manifest data=image_folder data.root=$RUN/images
# A tiny SDXL, whose VAE learns the images for half a minute. Its captions are the tags, rare ones count more.
test -e $RUN/base/model_index.json || python bench/tiny_sdxl.py base $RUN/base 0.5 $RUN/images
python finetune_sdxl.py data.root=$RUN/images run_dir=$RUN/sdxl experiment=sdxl/demo model.path=$RUN/base loop.minutes=5 \
    data.validation_fraction=0.1 task.latent_cache=$RUN/latents task.text_cache=$RUN/texts task.captions.source=tags \
    'task.tag_weights={power: 0.5, low: 0.1, high: 3.0, factors: {}}' 'task.buckets.areas_px=[6144]' \
    task.buckets.min_px=32 'task.samples.image_size_hw=[64,64]' 'task.samples.prompts=["","","",""]' \
    task.samples.steps=12 loop.evaluate_every_epochs=3
python export.py format=single_file run_dir=$RUN/sdxl
