"""README's picture, of the runs of the others."""

from __future__ import annotations

from gallery import sheet
from gallery.recipe import Entry, Recipe, Run

# the documented settings with seed 0 alone: all seeds take many times as long
ONE_GAUSSIAN = Run(
    name="one_gaussian",
    commands=("fit -c configs/generative_policy/gaussian.yaml --model.seeds '[0]'",),
    folder="generative_policy/gallery/one_gaussian",
    seeds="0",
    minutes=2,
    quick="--trainer.max_steps 3000 --model.lr 0.003",
    quick_minutes=0.3,
)
ONE_MEANFLOW = Run(
    name="one_meanflow",
    commands=("fit -c configs/generative_policy/meanflow.yaml --model.seeds '[0]'",),
    folder="generative_policy/gallery/one_meanflow",
    seeds="0",
    minutes=7,
    quick="--trainer.max_steps 2000",
    quick_minutes=0.6,
)

RECIPE = Recipe(name="sheet", runs=(ONE_GAUSSIAN, ONE_MEANFLOW), figures=(Entry("sheet", sheet.RUNS, sheet.draw),))
