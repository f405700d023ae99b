"""Fine-tuning a Hugging Face folder on a labelled task.

Nothing here imports our model: the hand-off is a folder format, so folders of other origin do as well. transformers
and peft are imported when the stage runs, after its configuration was read.
"""

from pretrain.finetune.stage import FinetuneConfig, run

__all__ = ["FinetuneConfig", "run"]
