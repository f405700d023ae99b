"""Adopt a vocabulary made elsewhere: a `vocab.txt` of BERT, any `tokenizer.json`, or a folder with one of them.

Its tokens keep their ids, and new tokens follow them. Its template becomes ours, `[CLS] … [SEP]` or `… <eod>`.
Truncation, padding and the dropout of merges are switched off, because they change encodings.
"""

import itertools
import json
import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from pretrain.corpus import CleanedCorpus, Corpus, Shares, Skipped
from pretrain.errors import CorpusError, TokenizerError
from pretrain.storage.files import digest
from pretrain.storage.index import INDEX, listed, read_index
from pretrain.tokenizer.config import TokenizerConfig
from pretrain.tokenizer.kinds import PREFIX, ROLES, SPECIALS, WORD_CHARACTERS, Rules, build, is_reserved, template
from pretrain.tokenizer.training.learn import MadeVocabulary, check_special_tokens, free_slots
from pretrain.tokenizer.vocabulary import Vocabulary, vocabulary_of

TOKENIZER, VOCAB = "tokenizer.json", "vocab.txt"
SETTINGS = ("special_tokens_map.json", "tokenizer_config.json")  # a key in both is taken from the second
MOST_IDS = 1 << 22  # a model has a row for every id, used or not; the largest published vocabularies have a million
NEEDED = {"bert": ("pad", "unk", "cls", "sep", "mask"), "byte": ("eod",)}


@dataclass(frozen=True)
class Foreign:
    """A tokenizer as read from its files."""

    engine: tokenizers.Tokenizer
    roles: dict[str, str]  # role → token
    files: dict[str, Path]  # the files that were read, by name


def adopt(config: TokenizerConfig, corpus: Corpus | CleanedCorpus) -> MadeVocabulary:
    """The vocabulary in `config.adopt`, ready to build shards with. Only the held-out text of `corpus` is read.

    Raises TokenizerError when a file is missing or broken, or when a special token that a run needs is missing.
    """
    assert config.adopt is not None, "the stage calls this only if `adopt` is set"
    _check_place(config.adopt, config.corpus, corpus)
    foreign = opened(config.adopt, config.lowercase, config.strip_accents)
    engine, roles = foreign.engine, foreign.roles | config.roles
    kind = config.kind or ("bert" if all(role in roles for role in NEEDED["bert"]) else "byte")
    _check_roles(config.adopt, kind, roles, engine)
    if kind == "byte":
        roles.setdefault("pad", roles["eod"])  # padding may share an id: it has no loss, and no token attends to it
    _cut_marks(engine)
    _make_special(engine, roles)
    rules = rules_of(engine, roles) if kind == "bert" else None
    if rules:  # a vocab.txt does not say which tokens are special
        check_special_tokens(config.special_tokens, rules)
    _append(config, kind, engine)
    known = engine.get_vocab()
    specials = {role: known[roles[role]] for role in SPECIALS[kind] if role in roles}
    engine.post_processor = template(kind, {role: (roles[role], token) for role, token in specials.items()})
    reserved = {token for text, token in known.items() if is_reserved(text)} - set(specials.values())
    vocabulary = vocabulary_of(engine, reserved)
    _check_marks(config.adopt, vocabulary)
    others = sorted(vocabulary.marks - reserved - set(specials.values()))
    lossless, counts_bytes = _probed(vocabulary)
    skipped, shares = Skipped(), Shares()
    return MadeVocabulary(
        vocabulary=vocabulary,
        kind=kind,
        rules=rules,
        specials=specials,
        special_tokens={text: token for token in others if (text := engine.id_to_token(token)) is not None},
        reserved=sorted(reserved),
        lossless=lossless,
        counts_bytes=counts_bytes and kind == "byte",
        identity={"adopted": {name: digest(path)["sha256"] for name, path in sorted(foreign.files.items())}},
        recorded={"adopted": config.adopt},
        report={},
        heldout=corpus.documents(("heldout",), skipped, shares),
        skipped=skipped,
        shares=shares,
    )


def opened(place: str, lowercase: bool | None = None, strip_accents: bool | None = None) -> Foreign:
    """The tokenizer in a folder (its tokenizer.json, else its vocab.txt), or in one such file.

    `lowercase` and `strip_accents` apply to a vocab.txt, which contains neither. If they are None, the
    tokenizer_config.json beside it decides. If that is silent too, the vocabulary decides: without a single capital
    letter it is for lower-cased text, as BERT's are. Raises TokenizerError.
    """
    path, files = _files(Path(place))
    settings: dict = {}
    for name in SETTINGS:
        if name in files:
            settings |= _json(files[name])
    if path.suffix == ".txt":
        engine = _wordpiece(path, settings, lowercase, strip_accents)
    elif lowercase is None and strip_accents is None:
        engine = _engine(path)
    else:
        raise TokenizerError(f"{path} already defines how it normalises text", "remove lowercase and strip_accents")
    _check_ids(path, engine)
    return Foreign(engine, _roles(settings, engine), files)


def rules_of(engine: tokenizers.Tokenizer, roles: dict[str, str]) -> Rules | None:
    """The rules of ours that split text as this WordPiece vocabulary does, or None. With rules it can be extended."""
    model = engine.model
    if not isinstance(model, models.WordPiece) or model.continuing_subword_prefix != PREFIX["bert"]:
        return None
    if model.max_input_chars_per_word != WORD_CHARACTERS or any(roles[r] != t for r, t in SPECIALS["bert"].items()):
        return None
    switches = itertools.product((False, True), (False, True), ("whole", "single"), ("keep", "fold"))
    for rules in (Rules("bert", *switch) for switch in switches):
        if _cutting(engine) == _cutting(build(list(SPECIALS["bert"].values()), rules)):
            return rules
    return None


def _cutting(engine: tokenizers.Tokenizer) -> list:
    """The JSON of the normaliser and the pre-tokenizer. If BERT's `strip_accents` is unset, it equals `lowercase`."""
    parts = [json.loads(part.__getstate__()) if part else None for part in (engine.normalizer, engine.pre_tokenizer)]
    if parts[0] and parts[0].get("type") == "BertNormalizer" and parts[0]["strip_accents"] is None:
        parts[0]["strip_accents"] = parts[0]["lowercase"]
    return parts


# Files


def is_ours(folder: Path) -> bool:
    """Whether the tokenizer stage made `folder`, intact or damaged. Only a folder of ours can have an empty index."""
    try:
        text = (folder / INDEX).read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return False
    return '"stage": "tokenizer"' in text or not text.strip()


def _files(path: Path) -> tuple[Path, dict[str, Path]]:
    """The file that holds the vocabulary, and all files to be read, by name."""
    if path.is_file():
        return path, {path.name: path}
    remedy = f"name a {TOKENIZER}, a {VOCAB} or a folder with one"
    if not path.is_dir():
        raise TokenizerError("no such tokenizer", f"looked for: {path}", remedy)
    found = {name: path / name for name in (TOKENIZER, VOCAB, *SETTINGS) if (path / name).is_file()}
    if TOKENIZER in found:
        found.pop(VOCAB, None)
    elif VOCAB not in found:
        seen = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        holds = ", ".join(seen[:8]) or "nothing"
        saving = "AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes one"
        raise TokenizerError(f"the folder has no {TOKENIZER} and no {VOCAB}", f"{path} has {holds}", saving)
    _check_published(path, found)
    return found[TOKENIZER if TOKENIZER in found else VOCAB], found


def _check_published(folder: Path, files: dict[str, Path]) -> None:
    """Raise TokenizerError if `folder` is an export or a fine-tuned model of ours and one of `files` was altered."""
    index = folder / INDEX
    text = index.read_text(encoding="utf-8", errors="replace") if index.is_file() else ""
    if not re.search(r'"stage": "(export|finetune|import_uer)"', text):
        return
    remedy = "copy it again from where it was made"
    entries = listed(read_index(folder, TokenizerError, "python launch/export.py CONFIG.yaml"))
    altered = [name for name, path in files.items() if name not in entries or digest(path) != entries[name]]
    if altered:
        raise TokenizerError(f"{folder} was altered after it was made", f"changed: {', '.join(altered)}", remedy)


def _json(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text)
        if "\\u" in text:  # only an escape can produce a lone surrogate
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        what = "a file of the tokenizer has text that is not valid Unicode"
        raise TokenizerError(what, f"{path}: a lone surrogate", "save the tokenizer again") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError("a file of the tokenizer is not JSON", f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise TokenizerError("a file of the tokenizer is not what its name says", f"{path} holds no JSON object")
    return found


def _engine(path: Path) -> tokenizers.Tokenizer:
    """Open a tokenizer.json without its truncation, padding and dropout of merges."""
    found = _json(path)
    if not isinstance(found.get("model"), dict):
        keys = ", ".join(list(found)[:8]) or "nothing"
        raise TokenizerError(f"{path} is no {TOKENIZER}", f"it has no key `model`; its keys: {keys}")
    found |= {"truncation": None, "padding": None}
    if "dropout" in found["model"]:
        found["model"]["dropout"] = None
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(found))
    except Exception as error:  # `tokenizers` raises no other type
        raise TokenizerError(f"{path} is no {TOKENIZER} that `tokenizers` can open", str(error)) from None


def _wordpiece(path: Path, settings: dict, lowercase: bool | None, strip_accents: bool | None) -> tokenizers.Tokenizer:
    """BERT's tokenizer with the tokens of a vocab.txt: one token a line, ids in the order of the lines."""
    try:
        tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"a {VOCAB} must be UTF-8", f"{path}, byte {error.start + 1} is not") from None
    tokens = [token.removesuffix("\r") for token in tokens]
    lines: dict[str, int] = {}
    for line, token in enumerate(tokens, 1):
        if not token or token in lines:
            found = f"{token!r} of line {lines[token]} again" if token else "nothing"
            raise TokenizerError(f"a {VOCAB} needs a new token on every line", f"{path}, line {line}: {found}")
        lines[token] = line
    missing = [token for token in SPECIALS["bert"].values() if token not in lines]
    if missing:
        remedy = "a vocabulary without them needs a tokenizer.json"
        raise TokenizerError(f"{path} lacks special tokens of BERT", f"not in it: {', '.join(missing)}", remedy)
    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if not isinstance(settings.get(key), bool | None):
            raise TokenizerError(f"{key} must be true or false", f"{SETTINGS[1]} beside {path} has {settings[key]!r}")
    if settings.get("tokenize_chinese_chars") is False:
        raise TokenizerError(f"{path} does not isolate Chinese characters", "adopt the tokenizer.json of its folder")
    if lowercase is None:
        lowercase = settings.get("do_lower_case")
    if lowercase is None:
        ordinary = (token for token in tokens if token not in SPECIALS["bert"].values())
        lowercase = not any("A" <= c <= "Z" for token in ordinary for c in token)
    if strip_accents is None:
        strip_accents = settings.get("strip_accents")
    return build(tokens, Rules("bert", lowercase, lowercase if strip_accents is None else strip_accents))


def _check_ids(path: Path, engine: tokenizers.Tokenizer) -> None:
    """Raise TokenizerError unless every token has its own id and every probe text can be encoded."""
    owner: dict[int, str] = {}
    for token, number in sorted(engine.get_vocab().items()):
        if number in owner:
            raise TokenizerError(f"{path} gives one id to two tokens", f"id {number}: {owner[number]!r} and {token!r}")
        if number >= MOST_IDS:
            found = f"{token!r} has the id {number:,}: a model has a row for every id up to the largest"
            raise TokenizerError(f"{path} has an id that is too large for a model", found)
        owner[number] = token
    if not owner:
        raise TokenizerError(f"{path} has no tokens", "it was never trained")
    try:
        engine.encode_batch_fast(probes())
    except Exception as error:  # `tokenizers` raises no other type
        remedy = "add the unknown token that its model names, or make it name an existing one"
        raise TokenizerError(f"{path} has no token for unknown text", str(error), remedy) from None


# Special tokens


def _roles(settings: dict, engine: tokenizers.Tokenizer) -> dict[str, str]:
    """role → token, from the settings or else by its usual names. Tokens that the vocabulary lacks are left out."""
    found = {}
    for role, usual in ROLES.items():
        said = settings.get("eos_token" if role == "eod" else f"{role}_token")
        said = said.get("content") if isinstance(said, dict) else said
        names = [said] if isinstance(said, str) else usual
        token = next((name for name in names if engine.token_to_id(name) is not None), None)
        if token is not None:
            found[role] = token
    return found


def _cut_marks(engine: tokenizers.Tokenizer) -> None:
    """Make text that spells a special token be split after its first character, so that it never becomes the token.

    In T5 and XLM-R the special tokens are entries of a Unigram model with the best score. No other text is split.
    """
    engine.encode_special_tokens = True
    firsts = [f"{re.escape(mark[0])}(?={re.escape(mark[1:])})" for mark in _spelled(vocabulary_of(engine))]
    if firsts:
        cut = pre_tokenizers.Split(Regex("|".join(firsts)), "isolated")
        engine.pre_tokenizer = pre_tokenizers.Sequence([engine.pre_tokenizer, cut] if engine.pre_tokenizer else [cut])


def _make_special(engine: tokenizers.Tokenizer, roles: dict[str, str]) -> None:
    """Mark the tokens of all roles as special. Tokens that already are keep their flags."""
    special = {added.content for added in engine.get_added_tokens_decoder().values() if added.special}
    new = [token for token in dict.fromkeys(roles.values()) if token not in special]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])


def _append(config: TokenizerConfig, kind: str, engine: tokenizers.Tokenizer) -> None:
    """Append new special tokens, and reserved slots until the size is a multiple of `config.multiple_of`."""
    known = engine.get_vocab()
    for token in config.special_tokens:
        if token in known:
            raise TokenizerError(
                f"special_tokens: {token!r} is already a token", f"id {known[token]} of {config.adopt}"
            )
    size = max(known.values()) + 1 + len(config.special_tokens) + config.reserved
    slots = islice(free_slots([*known, *config.special_tokens], kind), config.reserved + -size % config.multiple_of)
    new = [*config.special_tokens, *slots]
    engine.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in new])


def _check_roles(place: str, kind: str, roles: dict[str, str], engine: tokenizers.Tokenizer) -> None:
    for role, token in roles.items():
        if engine.token_to_id(token) is None:
            raise TokenizerError(f"roles.{role} = {token!r} is not a token of this vocabulary", place)
    missing = [role for role in NEEDED[kind] if role not in roles]
    if missing:
        found = ", ".join(f"{role} {token}" for role, token in roles.items()) or "none"
        what = "an encoder" if kind == "bert" else "a decoder"
        raise TokenizerError(
            f"{what} needs special tokens for roles that this vocabulary lacks: {', '.join(missing)}",
            f"{place} has: {found}",
            f"name the token of each: roles.{missing[0]}=…",
        )


def _check_marks(place: str, vocabulary: Vocabulary) -> None:
    """Raise TokenizerError for a special token that its own text is encoded as, although it should not be."""
    if spelled := _spelled(vocabulary):
        mark = spelled[0]
        raise TokenizerError(
            f"the special token {mark!r} could not be told from text",
            f"{place} encodes the text {mark!r} as that token: it is an ordinary entry of the vocabulary",
            "give the role to a token that text never becomes, or choose another vocabulary",
        )


def _spelled(vocabulary: Vocabulary) -> list[str]:
    """The special tokens, except the unknown token, that their own text is encoded as."""
    engine = vocabulary.engine
    marks = filter(None, map(engine.id_to_token, sorted(vocabulary.marks - {vocabulary.unknown})))
    return [mark for mark in marks if engine.token_to_id(mark) in engine.encode(mark, add_special_tokens=False).ids]


def _check_place(place: str, name: str, corpus: Corpus | CleanedCorpus) -> None:
    """Raise an error if the stage itself made the tokenizer, or if the corpus called `name` has no held-out text."""
    if is_ours(Path(place)):
        raise TokenizerError("this tokenizer was made by this stage", place, "use that folder as it is")
    if next(iter(corpus.documents(("heldout",))), None) is None:
        remedy = "add documents, or set heldout_fraction in a recipe.yaml"
        raise CorpusError("a vocabulary needs held-out documents to be measured on", name, remedy)


# The effect of the adopted tokenizer on text


def _probed(vocabulary: Vocabulary) -> tuple[bool, bool]:
    """Whether decoding gives back each probe text, and whether the bytes of its tokens sum to its normalised size."""
    engine, sizes = vocabulary.engine, vocabulary.sizes()
    lossless, exact = True, vocabulary.in_bytes
    for text in probes():
        ids = engine.encode(text, add_special_tokens=False).ids
        normalised = engine.normalizer.normalize_str(text) if engine.normalizer else text
        lossless &= engine.decode(ids, skip_special_tokens=True) == text
        exact &= int(sizes[ids].sum()) == len(normalised.encode("utf-8"))
    return lossless, exact


def probes() -> list[str]:
    """Texts that reveal what a tokenizer changes: all code points below U+3100, kinds of spaces, scripts, emoji."""
    rng = random.Random(0)
    points = [chr(point) for point in range(0x3100)]
    astral = "漢字かな한국어ไทย😀👩\u200d👩\u200d👧\U00020bb7\U0010ffff\ue000ﬁＡ１，。"
    words = ["", " ", "a", " a", "a ", "  a  b", "\n\n\t a", "don't", "it's 3.14", "x" * 200, "汉" * 200, " " * 50]
    mixed = ["".join(rng.choices([*points, *astral, " ", "the", "的"], k=40)) for _ in range(200)]
    return [*words, *mixed, *("".join(points[i : i + 64]) for i in range(0, len(points), 64)), *astral]
