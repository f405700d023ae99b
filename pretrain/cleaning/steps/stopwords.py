"""Remove stop words, for bag-of-words models rather than language models."""

import logging
import re
from collections.abc import Callable
from functools import partial

from pretrain.cleaning.step import Outcome, Section, Use, library, primary
from pretrain.errors import ConfigError


class StopWords(Section):
    """Remove stop words. For bag-of-words models; a language model needs them."""

    use: Use = False

    def covers(self, language: str) -> bool:
        if isinstance(self.use, list):
            for chosen in self.use:
                _check(chosen)
        return super().covers(language)


def stop_words_removed(section: StopWords, language: str) -> Callable[[str], Outcome]:
    """Remove the stop words listed by stopwordsiso, and count them. Chinese is cut into words by jieba.

    The step is off by default, and should stay off for pre-training: "not", "to", "的", 不 carry the grammar that a
    language model has to learn. A model trained without them neither generates text nor fills masks well, and
    fine-tuning text, which has its stop words, looks foreign to it. The step helps bag-of-words models: topics, search.
    """
    _check(language)
    known = primary(language)
    stop = frozenset(library("stopwordsiso").stopwords(known))
    if known != "zh":
        return lambda text: _without_words(text, stop)
    jieba = library("jieba")
    jieba.setLogLevel(logging.WARNING)
    # Without HMM: its search for unlisted words is quadratic in text without punctuation, and stop words are listed.
    cut = partial(jieba.Tokenizer().lcut, HMM=False)

    def apply(text: str) -> Outcome:
        count = 0

        def replacement(run: re.Match) -> str:
            nonlocal count
            words = cut(run[0])
            kept = [word for word in words if word not in stop]
            count += len(words) - len(kept)
            return "".join(kept)

        return Outcome(HAN_RUN.sub(replacement, text), count)

    return apply


def _check(language: str) -> None:
    lists = library("stopwordsiso")
    if not lists.has_lang(primary(language)):
        known = f"say for which languages, of these: {', '.join(sorted(lists.langs()))}"
        raise ConfigError(f"no list of stop words is known for {language!r}", known)


HAN_RUN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003347f]+")
WORD = re.compile(r"\w+(?:['’]\w+)*[ \t]?")


def _without_words(text: str, stop: frozenset[str]) -> Outcome:
    count = 0

    def replacement(match: re.Match) -> str:
        nonlocal count
        if match[0].rstrip(" \t").replace("’", "'").lower() not in stop:
            return match[0]
        count += 1
        return ""

    new = WORD.sub(replacement, text)
    return Outcome(new if count else text, count)
