#!/usr/bin/env bash
# A tiny SDXL learns captioned shapes and tones, and reaches black and white if its noise lets it.
#
#     bash bench/demo_sdxl.sh [out=FOLDER] [vae_steps=N] [KEY=VALUE ...]      (make demo-sdxl)
#
# Draws pictures of several ratios and a base model, whose VAE it trains (bench/tiny_sdxl.py). Then finetune_sdxl.py
# trains the whole U-Net twice, side by side: by epsilon with SDXL's own noise, whose last timestep still shows how
# bright a picture is, and by v_prediction with zero terminal SNR. Only the second makes pictures all black or all
# white. A LoRA on its export learns a tone that is new to it. diffusers must draw the pictures of the runs from each export.
. "$(dirname "$0")/demo_common.sh"
vae_steps=250 arguments=()
for word in "$@"; do case $word in vae_steps=*) vae_steps=${word#*=} ;; *) arguments+=("$word") ;; esac; done
begin demo_sdxl "${arguments[@]}"

# training NAME BASE PICTURES: sets the command of a training.
training() {
    command=(finetune_sdxl.py experiment=sdxl/demo "run_dir=$out/$1" "model.path=$out/$2" "data.root=$out/$3"
        "task.latent_cache=$out/cache/$1/latents" "task.text_cache=$out/cache/$1/texts")
}
export_to() { stage "$1_$2" export.py "format=$2" "run_dir=$out/$1" weights=last; }

stage base bench/tiny_sdxl.py "$out" "$vae_steps"
training epsilon base shapes
beside epsilon "${command[@]}" task.noise.prediction_type=epsilon task.noise.zero_terminal_snr=false task.noise.convert=true "${overrides[@]}"
training v_prediction base shapes
stage v_prediction "${command[@]}" "${overrides[@]}"
join
export_to v_prediction diffusers
export_to v_prediction single_file
training lora v_prediction/export/diffusers orange
stage lora "${command[@]}" 'task.lora={kind:lora,factor:-1,rank:16,alpha:16.0,targets:[unet.*],conv:true,text_encoders:false}' optim.lr=3e-3 \
    loop.total_steps=60 'task.samples.prompts=[orange,black,white]' "${overrides[@]}"
export_to lora kohya
"$python" bench/demo_table.py sdxl "$out"
