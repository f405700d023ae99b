"""Fine-tuning a Hugging Face folder on a labelled task.

This package never imports our model: it works on folders, so folders of other origin work as well. transformers and
peft are imported when the stage runs, after its configuration has been read.
"""

from pretrain.finetune.stage import FinetuneConfig, run

__all__ = ["FinetuneConfig", "run"]
