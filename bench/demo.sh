#!/usr/bin/env bash
# The whole main job on the embedded glyphs, by the commands that a user types.
#
#     bash bench/demo.sh [full] [out=FOLDER] [KEY=VALUE ...]      (make demo, make demo-full)
#
# Pretrains on all glyphs without labels and fine-tunes with the labels of one typeface; meanwhile trains train.py's
# ResNet-18 with the same labels; evaluates on a typeface never trained on, exports, predicts. `full` also runs both
# with all labels, and the same ConvNeXt V2 from scratch. Ends with a table, summary.json and the paths of its pictures.
. "$(dirname "$0")/demo_common.sh"
begin demo "$@"

one_face=(loop.find=path:images/DejaVuSans/ loop.evaluate_every_epochs=14)
# About 250 seconds of one core each: 0.145 s a step of pretraining, 0.315 s of fine-tuning, 0.315 s of ResNet-18.
resnet18=(train.py optim.lr=0.2 loop.total_steps=800 runtime.compile=false)
finetune=(finetune.py experiment=glyphs/demo_finetune)

stage glyphs prepare.py data=glyphs
beside resnet18 "${resnet18[@]}" "run_dir=$out/resnet18" "${one_face[@]}" "${overrides[@]}"
stage pretrain pretrain_fcmae.py experiment=glyphs/demo_pretrain "run_dir=$out/pretrain" "${overrides[@]}"
stage finetune "${finetune[@]}" "run_dir=$out/finetune" "init_from=$out/pretrain" "${one_face[@]}" "${overrides[@]}"
join
stage evaluate evaluate.py "run_dir=$out/finetune" weights=last
stage export export.py format=onnx "run_dir=$out/finetune" weights=last
stage predict predict.py "weights=$out/finetune/export/model.onnx" input=collections/glyphs/images/STIXGeneral "output=$out/predictions.csv"

if $full; then
    beside all_labels_resnet18 "${resnet18[@]}" "run_dir=$out/all_labels_resnet18" "${overrides[@]}"
    stage all_labels "${finetune[@]}" "run_dir=$out/all_labels" "init_from=$out/pretrain" "${overrides[@]}"
    stage scratch "${finetune[@]}" "run_dir=$out/scratch" task.head=random loop.total_steps=800 schedule.warmup_steps=80 "${one_face[@]}" "${overrides[@]}"
    join
fi
"$python" bench/demo_table.py glyphs "$out"
