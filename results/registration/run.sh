#!/bin/bash
# The experiment of docs/results.md, "Recipes". Run it in the project's folder; stopped at any
# point, it goes on where it was. What answers most comes first.
set -e
here=results/registration

run() { # recipe, target, flags of the recipe
    mkdir -p "$here/$1"
    if [ "$1" != released ]; then # the untrained network is the same in all recipes
        cp "$here/released/$2"_2_rotation_scale_untrained* "$here/$1/"
    fi
    python reproduce.py --config $here/experiment.json --objs "$2" --output "$here/$1" "${@:3}"
}

for target in transistor bottle screw pill; do
    run released $target
    run heads $target --train heads
done
for target in transistor bottle; do
    run heads_held_out $target --train heads --select best source --held_out grid toothbrush
done
for target in transistor bottle screw pill; do # a second training
    run released $target --seeds 2
    run heads $target --train heads --seeds 2
done
for target in transistor bottle screw pill; do
    run frozen_batch_norm $target --batch_norm frozen --seeds 2
    run low_rate $target --lr 1e-5
done
for target in transistor bottle; do
    python reproduce.py --config $here/experiment.json --objs $target --output $here/released_8 --shots 8
done
python -m benchmarks.registration $here >$here/tables.md
