#!/bin/bash
# What the warps of the networks of run.sh do: scored in the registered frame, and with one warp for all images.
set -e
here=results/registration
data="--data_type folder --data_path ../shared/data"
for recipe in heads released; do
    for target in ${*:-transistor bottle}; do
        from=$here/$recipe/save_checkpoints/rotation_scale/2/$target/${target}_2_rotation_scale_last.pt
        fixed=$here/$recipe/save_checkpoints/${target}_fixed.pt
        python -m benchmarks.fixed_warp $from $fixed --obj $target --data_path ../shared/data
        score="python test.py --obj $target --shot 2 $data --scorer gaussian neighbours --device cpu --overwrite"
        $score --checkpoint $fixed --output results/registration_warps/${recipe}_fixed
        $score --checkpoint $from --frame registered --output results/registration_warps/${recipe}_registered
    done
done
