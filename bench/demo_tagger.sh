#!/usr/bin/env bash
# The tagger: from pictures with words to a model.onnx that programs for taggers read.
#
#     bash bench/demo_tagger.sh [out=FOLDER] [KEY=VALUE ...]      (make demo-tagger)
#
# Trains a ResNet-18 from scratch on the words in the names of one typeface's characters, with the orientation map and
# without it; beside them FCMAE on all glyphs without labels, then fine-tuning. All are measured on a typeface never
# seen. Calibrates, exports to wd14, and predicts by ONNX Runtime.
. "$(dirname "$0")/demo_common.sh"
begin demo_tagger "$@"

words=("task.vocabulary=$out/selected_tags.csv" loop.find=path:images/DejaVuSans/ "${overrides[@]}")
colours=(model.in_channels=3 'augment.mean=[0.5,0.5,0.5]' 'augment.std=[0.5,0.5,0.5]' augment.pad=square)
# About 130 seconds of one core each: 0.18 s a step of pretraining, 0.5 s of fine-tuning, 0.7 s of ResNet-18.
train=(train.py task=tagging augment=tagger 'augment.image_size_hw=[32,32]'
    'augment.affine={degrees:8.0,translate:0.08,scale:[0.8,1.1],shear_degrees:10.0}' loop.total_steps=184
    loop.evaluate_every_epochs=100 optim=muon optim.lr=6.0e-3 +optim.extra.ns_steps=3 schedule=cosine
    schedule.warmup_steps=18 loop.clip_grad_norm=1.0 runtime.compile=false)

stage glyphs prepare.py data=glyphs
stage vocabulary prepare.py job=vocabulary "job.output=$out/selected_tags.csv"
beside tagger "${train[@]}" "run_dir=$out/tagger" task.orientation=glyphs "${words[@]}"
stage pretrain pretrain_fcmae.py experiment=glyphs/demo_pretrain "run_dir=$out/pretrain" "${colours[@]}" loop.total_steps=300 \
    schedule.warmup_steps=30 loop.evaluate_every_epochs=100 task.probe.every_epochs=null "${overrides[@]}"
stage finetune finetune.py experiment=glyphs/tagger "init_from=$out/pretrain" "run_dir=$out/finetune" loop.total_steps=145 \
    schedule.warmup_steps=14 "${words[@]}"
join
stage no_map "${train[@]}" "run_dir=$out/no_map" task.orientation=null "${words[@]}"
stage evaluate evaluate.py "run_dir=$out/tagger" weights=last calibrate=true
stage export export.py format=wd14 "run_dir=$out/tagger" weights=last
stage predict predict.py "weights=$out/tagger/export/wd14/model.onnx" input=collections/glyphs/images/STIXGeneral "output=$out/predictions.jsonl"
"$python" bench/demo_table.py tagger "$out"
