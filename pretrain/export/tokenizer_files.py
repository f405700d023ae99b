"""Write the tokenizer's files beside a model, as `AutoTokenizer` of transformers 4 and 5 opens them.

In a decoder's corpus, `<eod>` ends each document, so each document follows the `<eod>` of the one before it. The
exported tokenizer therefore encodes a prompt as `<eod> text`: `generate(**tokenizer(prompt))` continues it as in
training.
"""

import json
import shutil
from pathlib import Path

from pretrain.model.config import Composition
from pretrain.storage.files import write_json
from pretrain.tokenizer import Tokenizer


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, longest: int, causal: bool, composition: Composition = "one"
) -> None:
    """Write tokenizer.json, tokenizer_config.json and an encoder's vocab.txt; texts are truncated to `longest` tokens.

    `causal`: whether it is a decoder's. Its texts begin with the mark that ends a document, whatever the kind. An
    encoder with a decoder reads texts as an encoder does, and its decoder stops at that mark.
    """
    settings = json.loads((tokenizer.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings |= {"model_max_length": longest, "clean_up_tokenization_spaces": False}
    if not causal:
        for name in ("tokenizer.json", "vocab.txt"):  # an adopted tokenizer may have no vocab.txt
            if (tokenizer.folder / name).exists():
                shutil.copyfile(tokenizer.folder / name, folder / name)
    else:
        end = tokenizer.token_text(tokenizer.end)
        engine = json.loads((tokenizer.folder / "tokenizer.json").read_text(encoding="utf-8"))
        engine["post_processor"] = _begun_by(end, tokenizer.end)
        write_json(folder / "tokenizer.json", engine)
        # Without the class the folder opens as Qwen2Tokenizer, silently and with other ids. Prompts of several lengths
        # are padded on the left: new tokens must follow the prompt, not its padding.
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "left"}
        settings |= {"bos_token": end, "eos_token": end, "model_input_names": ["input_ids", "attention_mask"]}
    if composition == "encoder_decoder":  # T5's own class would make other ids
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.token_text(tokenizer.end)}
        settings |= {"model_input_names": ["input_ids", "attention_mask"]}
    write_json(folder / "tokenizer_config.json", settings)


def _begun_by(mark: str, token: int) -> dict:
    """The template `mark $A`, and for two texts `mark $A mark $B`, as tokenizer.json writes it."""
    special = {"SpecialToken": {"id": mark, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {mark: {"id": mark, "ids": [token], "tokens": [mark]}},
    }
