# make demo-sdxl: a tiny SDXL draws black and white only if its noise lets it; a LoRA learns orange. The pictures are
# those of `bench/tiny_sdxl.py tones`: shapes/, and orange/ beside it.
set -eux
ROOT=${1:-collections/tones/shapes} RUN=${RUN:-outputs/demo_sdxl}
TRAIN="python finetune_sdxl.py experiment=sdxl/demo"
NO_DROPOUT="network_dropout:0.0,rank_dropout:0.0,module_dropout:0.0,scale_weight_norms:null"
CACHES="task.latent_cache=$RUN/latents task.text_cache=$RUN/texts"

# A base model whose VAE learns all pictures for half a minute.
test -e $RUN/base/model_index.json || python bench/tiny_sdxl.py base $RUN/base 0.5 $ROOT/..
# SDXL's own noise, whose last timestep still shows how bright a picture is; then zero terminal SNR.
$TRAIN data.root=$ROOT run_dir=$RUN/epsilon model.path=$RUN/base loop.minutes=2.5 $CACHES \
    task.noise.prediction_type=epsilon task.noise.zero_terminal_snr=false task.noise.convert=true
$TRAIN data.root=$ROOT run_dir=$RUN/v_prediction model.path=$RUN/base loop.minutes=2.5 $CACHES
python export.py format=diffusers run_dir=$RUN/v_prediction
python export.py format=single_file run_dir=$RUN/v_prediction
$TRAIN data.root=$ROOT/../orange run_dir=$RUN/lora model.path=$RUN/v_prediction/export/diffusers loop.minutes=1.2 \
    task.latent_cache=$RUN/lora_latents task.text_cache=$RUN/lora_texts optim.lr=3e-3 'task.samples.prompts=[orange,black,white]' \
    "task.lora={kind:lora,factor:-1,rank:16,alpha:16.0,targets:[unet.*],layers:{},$NO_DROPOUT}"
python export.py format=kohya run_dir=$RUN/lora
