"""From a config to a run folder with the stock ``Trainer``, in the order of the data's way.

* :mod:`stance.training.folder`: whose the run folder is, and what is written into it
* :mod:`stance.training.batches`: which rows make a step, whatever the number of processes
* :mod:`stance.training.recipe`: config -> ``Trainer``
* :mod:`stance.training.callbacks`: whole checkpoints, signals, early stopping, progress
* :mod:`stance.training.trackers`: where trackers write
* :mod:`stance.training.record`: ``run.json``, the story of the run
* :mod:`stance.training.run`: :func:`train`, all of it in order

What a run leaves in ``output_dir``: the model (``config.json``, ``model.safetensors``, tokenizer,
``stance.json``, ``manifest.json``), ``config.yaml`` as resolved, ``splits.csv``, ``metrics.json``
and ``run.json``. While it trains, ``checkpoints/`` holds what ``--resume`` needs.
"""

from stance.training.batches import LengthGroupedRows
from stance.training.folder import load_parts
from stance.training.recipe import build_trainer, validation_metrics
from stance.training.run import TrainingResult, train

__all__ = [
    "LengthGroupedRows",
    "TrainingResult",
    "build_trainer",
    "load_parts",
    "train",
    "validation_metrics",
]
