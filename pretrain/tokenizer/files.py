"""Write the files of a vocabulary. `AutoTokenizer` of transformers 4 and 5 opens them and gives the same ids."""

from pathlib import Path

from tokenizers import models

from pretrain.storage.files import write_json
from pretrain.tokenizer.kinds import PREFIX
from pretrain.tokenizer.training.learn import MadeVocabulary

FAST = "PreTrainedTokenizerFast"  # this class uses tokenizer.json unchanged


def write(folder: Path, made: MadeVocabulary) -> None:
    """Write tokenizer.json, tokenizer_config.json and, for a WordPiece vocabulary with the prefix `##`, vocab.txt."""
    engine = made.vocabulary.engine
    (folder / "tokenizer.json").write_bytes((engine.to_str(pretty=True) + "\n").encode("utf-8"))
    token = {role: engine.id_to_token(number) for role, number in made.specials.items()}
    config: dict[str, object] = {f"{'eos' if role == 'eod' else role}_token": text for role, text in token.items()}
    if made.kind == "byte":
        # decoders do not accept token_type_ids
        config |= {"tokenizer_class": FAST, "model_input_names": ["input_ids", "attention_mask"]}
    elif made.rules is not None and is_stock(made):
        config |= {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": made.rules.lowercase,
            "strip_accents": made.rules.strip_accents,
            "tokenize_chinese_chars": True,
        }
    else:
        names = ["input_ids", "token_type_ids", "attention_mask"]
        config |= {"tokenizer_class": FAST, "model_input_names": names}
    if made.special_tokens:
        config["additional_special_tokens"] = list(made.special_tokens)
    if made.kind == "bert" and _is_wordpiece(made):
        rows = (engine.id_to_token(number) for number in range(made.vocabulary.size))
        (folder / "vocab.txt").write_bytes("".join(f"{row}\n" for row in rows).encode("utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "clean_up_tokenization_spaces": False})


def is_stock(made: MadeVocabulary) -> bool:
    """Whether `BertTokenizer`, which knows only vocab.txt and three switches, can express the vocabulary."""
    rules = made.rules
    return _is_wordpiece(made) and rules is not None and (rules.digits, rules.width) == ("whole", "keep")


def _is_wordpiece(made: MadeVocabulary) -> bool:
    return isinstance(made.vocabulary.engine.model, models.WordPiece) and made.vocabulary.prefix == PREFIX["bert"]
