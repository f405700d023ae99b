"""What is done with a Hugging Face folder: fine-tune an encoder on a labelled task, prompt a decoder.

    task.py         a folder of labelled examples, read and checked
    scores.py       what a test accuracy is worth: two baselines and an interval
    train.py        one training: the model built, fitted, asked
    twins.py        a result beside that of the same training from random weights
    classify.py     the stage `finetune`: rates tried on dev, the best one on test, one model published
    prompt.py       the stage `generate`: continuations of prompts
    huggingface.py  the door to transformers

Nothing here imports our model: the hand-off is a folder format, so folders of other origin do as well. transformers
and peft are imported when a stage runs, after its configuration was read.
"""

from pretrain.finetune.classify import FinetuneConfig, run
from pretrain.finetune.prompt import GenerateConfig, generate

__all__ = ["FinetuneConfig", "GenerateConfig", "generate", "run"]
