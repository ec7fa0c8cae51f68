"""The recipes of train.py: values that replace the defaults of its configuration."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    # The paper, section 3, "Training": SGD and momentum over batches of 512, learning rate 0.3,
    # label smoothing, flips and mixup, five epochs of warm-up, decay at 30, 50 and 80 of 90.
    "paper": {
        "model": "resnet50",
        "opt": "momentum",
        "lr": 0.3,
        "weight_decay": 0.0,
        "lambda_weights": 1e-5,
        "global_batch_size": 512,
        "batch_size": 64,
        "smoothing": 0.1,
        "scale": (1.0, 1.0),
        "ratio": (1.0, 1.0),
        "mixup": 0.2,
        "epochs": 90,
        "warmup_epochs": 5,
        "sched": "multistep",
        "decay_milestones": (30, 50, 80),
        "decay_rate": 0.1,
    },
    # What the authors' own program did (training/run.py in github.com/serre-lab/Harmonization-old):
    # Nesterov's momentum, six levels, lambda in sweeps of 10 to 50, Mixup off. Its learning rate
    # was an argument (0.0005 to 0.01 in the runs that it lists); this one is the paper's.
    "paper-code": {
        "model": "resnet50",
        "opt": "sgd",
        "lr": 0.3,
        "weight_decay": 0.0,
        "lambda_weights": 1e-5,
        "lambda_harmonization": 20.0,
        "levels": 6,
        "global_batch_size": 1024,
        "batch_size": 128,
        "smoothing": 0.1,
        "epochs": 200,
        "warmup_epochs": 5,
        "sched": "multistep",
        "decay_milestones": (30, 60, 80),
        "decay_rate": 0.1,
        "amp": True,
    },
    # From timm's weights, ten epochs, BatchNorm frozen: only images with a map cost more.
    "finetune": {
        "model": "resnet50",
        "pretrained": True,
        "freeze_norm": True,
        "opt": "adamw",
        "lr": 5e-5,
        "weight_decay": 0.05,
        "global_batch_size": 256,
        "batch_size": 64,
        "scale": (0.35, 1.0),
        "epochs": 10,
        "warmup_epochs": 1,
        "sched": "cosine",
        "model_ema": True,
    },
}
