"""Write data/sample (text and labelled tasks) from two Debian packages. Every run writes the same bytes.

Debian's reader `bible` prints the text of the King James Bible. Install its packages bible-kjv and bible-kjv-text, or
unpack them with `dpkg -x` and give the folder with -p:

    bible -f 'Gen1:1-Rev22:21' > kjv.txt            # or: bible -f -p X/usr/lib 'Gen1:1-Rev22:21'
    python benchmarks/sample_data.py --kjv kjv.txt \
        --fortunes /usr/share/games/fortunes --out data/sample

The poems come from the package fortunes-zh. This script uses only the standard library.
"""

import argparse
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ENGLISH_TEXT = (0, 3, 6)  # chapters with number % 10 in here go to en.txt, the others to the task
ENGLISH_SIZES = {"train": 1000, "dev": 1000, "test": 2000}  # clauses
CHINESE_SHARE = 4  # every fourth poem goes to the task
CHINESE_SIZES = {"train": 400, "dev": 200, "test": 400}  # couplets
SHARED_WORDS = 6  # two clauses that share this many words in a row count as the same passage
SHARED_HAN = 5  # two poems that share a clause of at least this many characters count as the same poem
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]")
# Poets of the Song dynasty or earlier in the file `chinese`, in addition to the poets of the other two files.
POETS = set(
    """
    辛弃疾 李煜 柳永 晏几道 吴文英 张先 温庭筠 张孝祥 陈亮 刘克庄 张炎 晏殊 史达祖 王沂孙
    蒋捷 冯延巳 刘过 敦煌 刘辰翁 周密 南宋无名氏 陈人杰 韩元吉 袁去华 吴潜 汪元量 范仲淹
    王琪 岳飞 程垓 杨炎正 黄机 牛希济 孙光宪 潘阆 王安国 张舜民 赵鼎 向子湮 李弥逊 吕渭老
    康与之 张抡 赵善括 石孝友 高观国 卢祖皋 严仁 邓剡 李晔 唐朝无名氏 和凝 牛峤 鹿虔 欧阳炯
    徐昌图 五代无名氏 石延年 李冠 尹洙 韩缜 阮逸女 孙洙 王观 孙浩然 王诜 胡世将 李邴 幼卿
    蒋兴祖女 洪皓 蔡伸 聂胜琼 王以宁 李石 黄公度 赵彦端 姚宽 绍兴太学生 严蕊 王炎 赵师侠
    卢炳 汪莘 刘仙伦 俞国宝 刘学箕 吴泳 岳珂 葛长庚 赵以夫 吴渊 曹豳 王澜 华岳 赵希蓬
    淮上女 黄孝迈 李曾伯 方岳 李彭老 张绍文 陈允平 文及翁 李好古 朱嗣发 杨佥判 王清慧
    醴陵士人 徐君宝妻 陈德武 刘将孙
    """.split()  # noqa: SIM905
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def word_runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + SHARED_WORDS]) for i in range(len(found) - SHARED_WORDS + 1)}


def read_chapters(path: Path) -> list[list[str]]:
    """Return the verses of each chapter, in the order of the Bible."""
    chapters: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        reference, _, verse = line.partition(" ")
        chapters.setdefault(reference.partition(":")[0], []).append(" ".join(verse.split()))
    return list(chapters.values())


def split_english(chapters: list[list[str]]) -> tuple[list[list[str]], list[str]]:
    """Return the chapters for en.txt and the clauses for the task, from the other chapters.

    A clause is dropped if six of its words in a row also stand in en.txt or in an earlier clause:
    Kings and Chronicles, the Gospels, and formulas have much in common.
    """
    kept = [chapter for index, chapter in enumerate(chapters) if index % 10 in ENGLISH_TEXT]
    seen = set().union(*(word_runs(" ".join(chapter)) for chapter in kept))
    clauses = []
    for index, chapter in enumerate(chapters):
        for clause in re.split("[,;:.?!()]", " ".join(chapter)):
            clause, runs = clause.strip(), word_runs(clause)
            length = len(clause.split())
            if index % 10 not in ENGLISH_TEXT and 6 <= length <= 12 and not runs & seen:
                clauses.append(clause)
            seen |= runs
    return kept, clauses


def swap_words(text: str, rng: random.Random) -> str | None:
    """Exchange two neighbouring lower-case words that no punctuation separates."""
    parts = text.split(" ")
    plain = [bool(re.fullmatch("[a-z]+", part)) for part in parts]
    places = [i for i in range(1, len(parts) - 1) if plain[i] and plain[i + 1] and parts[i] != parts[i + 1]]
    if not places:
        return None
    i = rng.choice(places)
    parts[i], parts[i + 1] = parts[i + 1], parts[i]
    return " ".join(parts)


def read_poems(folder: Path) -> list[tuple[str, list[str]]]:
    """Return (title line, sentences) of every poem, without repetitions."""
    texts = {
        name: re.sub(r"\x1b\[[0-9;]*m", "", (folder / name).read_text(encoding="utf-8"))
        for name in ("tang300", "song100", "chinese")
    }
    found: list[tuple[str, str, str]] = []
    for name in ("tang300", "song100"):
        for title, author, body in re.findall(r"^(?:题目:)?(《.*)\n作者[：:](.*)\n((?:(?!%).*\n)*)", texts[name], re.M):
            found.append((title, re.sub("[（〔].*", "", author), body))
    poets = POETS | {author for _, author, _ in found}
    for entry in texts["chinese"].split("\n%\n"):
        match = re.fullmatch(r"(.*)\n\s*--\s*(\S+?)(《[^《》]*》)", entry.strip(), re.S)
        if match and match[2] in poets and len(HAN.findall(match[1])) >= 40:
            found.append((match[3], match[2], match[1]))
    poems, seen = [], set()
    for title, author, body in found:
        body = re.sub(r"^\s+其.\s*$", "", body, flags=re.M)
        body = re.sub(r"\s", "", unicodedata.normalize("NFC", body))
        clauses = {part for part in re.split("[，。？！；：、]", body) if len(part) >= SHARED_HAN}
        if re.search(r"[^\u3400-\u9fff，。？！；：、“”‘’《》「」]", body) or clauses & seen:
            continue  # the poem is damaged, or shares a clause with an earlier one
        seen |= clauses
        sentences = re.findall("[^。？！]+[。？！]+[”’」]*", body)
        poems.append((unicodedata.normalize("NFC", title + author), sentences))
    return poems


def shuffle_clauses(text: str, rng: random.Random) -> str | None:
    """Shuffle the characters of every clause; the punctuation stays where it is."""
    clauses = re.split("([，。？！；：、])", text)
    changed = "".join("".join(rng.sample(part, len(part))) for part in clauses)
    return changed if changed != text else None


def write_task(
    folder: Path,
    texts: list[str],
    sizes: dict[str, int],
    change: Callable[[str, random.Random], str | None],
) -> None:
    """Write the three splits. `sizes` counts texts.

    In train every text stands in both forms, so that both classes have the same words. In dev and
    test every text stands once, and every second one is changed.
    """
    rng = random.Random(0)
    texts = [text for text in texts if change(text, random.Random(0)) is not None]
    rng.shuffle(texts)
    folder.mkdir(parents=True, exist_ok=True)
    start = 0
    for split, size in sizes.items():
        rows = []
        for index, text in enumerate(texts[start : start + size]):
            changed = change(text, rng) or text
            if split == "train" or index % 2 == 0:
                rows.append({"text": text, "label": "original"})
            if (split == "train" or index % 2 == 1) and changed != text:
                rows.append({"text": changed, "label": "changed"})
        start += size
        rng.shuffle(rows)
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        write_text(folder / f"{split}.jsonl", "\n".join(lines))
        labels = Counter(row["label"] for row in rows)
        print(f"{folder.name}/{split}.jsonl: {len(rows)} examples, {dict(labels)}")


def write_text(path: Path, text: str) -> None:
    path.write_text(unicodedata.normalize("NFC", text) + "\n", encoding="utf-8", newline="\n")


def write_documents(path: Path, documents: Iterable[list[str]]) -> None:
    """Write one line per verse or sentence and a blank line between documents."""
    texts = ["\n".join(lines) for lines in documents]
    write_text(path, "\n\n".join(texts))
    print(f"{path.name}: {len(texts)} documents, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kjv", type=Path, required=True, help="the text that `bible` printed")
    parser.add_argument("--fortunes", type=Path, required=True, help="folder with tang300 etc.")
    parser.add_argument("--out", type=Path, default=Path("data/sample"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    chapters, clauses = split_english(read_chapters(options.kjv))
    write_documents(options.out / "en.txt", chapters)
    write_task(options.out / "tasks/en_order", clauses, ENGLISH_SIZES, swap_words)

    poems = read_poems(options.fortunes)
    write_documents(
        options.out / "zh.txt",
        ([title, *body] for i, (title, body) in enumerate(poems) if i % CHINESE_SHARE),
    )
    couplets = [line for _, body in poems[::CHINESE_SHARE] for line in body]
    couplets = [line for line in dict.fromkeys(couplets) if 10 <= len(HAN.findall(line)) <= 14]
    write_task(options.out / "tasks/zh_order", couplets, CHINESE_SIZES, shuffle_clauses)


if __name__ == "__main__":
    main()
