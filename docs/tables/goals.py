"""The goals of the project beside what is measured: one line each, the figures from benchmarks/results."""

from measured import TEXT, TOKENS, Words, number, read, rows, say, times


def summary(language: str) -> str:
    """One line a goal: what was measured, beside whom, how much faster, at which rate, and where the whole table is."""
    loader, steps = read("loader")["results"], read("train")
    train = read("tokenizer-train")["results"][0]
    encode, shards = read("tokenizer-encode")["results"], read("shards")["results"]
    ours = train["contestants"]["ours, 1 worker"]["cpu_s"][0]

    def batches(kind: str, pair: str) -> tuple[list[float], list[float]]:
        """Ratios of one kind of batches, and million tokens per CPU second as trained."""
        rate = [one["contestants"][f"ours, {kind}, as trained"]["m_tokens_per_cpu_s"][0] for one in loader]
        return [one["ratios"][pair] for one in loader], rate

    def step(group: str, pair: str) -> tuple[list[float], list[float]]:
        """The ratio of CPU speeds, and the CPU milliseconds of a step, through DeepSpeed on one rank."""
        found = steps[group]
        ratio = found["cpu_speed_ratios"][f"ours, one rank / {pair}"][1]
        return [ratio], [found["cpu_ms_a_step"]["ours, one rank"][1]]

    encoded = (
        [one["ratios"]["ours, cold / tokenizers"] for one in encode],
        [one["contestants"]["ours, cold"]["mb_per_cpu_s"][0] for one in encode],
    )
    built = (
        [one["ratios"]["the same, with start, ours / Megatron-LM, 1"] for one in shards],
        [one["contestants"]["ours, 1"]["mb_per_cpu_s_with_start"][0] for one in shards],
    )
    learned = ([train["ratios"]["CPU, tokenizers / ours"]], [train["megabytes"] / ours])
    figures = [
        learned,
        encoded,
        built,
        batches("causal", "ours, causal / HF datasets, torch format"),
        batches("masked", "ours, masked / HF collator, NumPy"),
        batches("masked words", "ours, masked words / HF collator, whole words"),
        step("decoder", "nanoGPT, fused AdamW"),
        step("encoder", "HF BERT, fused AdamW"),
    ]
    body = [
        [
            f"[{say(what, language)}]({place})",
            peer,
            _range([times(min(ratios)), times(max(ratios))]),
            f"{_range([number(min(rates)), number(max(rates))])} {say(unit, language)}",
            say(goal, language),
        ]
        for (what, peer, unit, goal, place), (ratios, rates) in zip(GOALS, figures, strict=True)
    ]
    heads: list[Words | str] = [
        ("what", "内容"),
        ("compared with", "比较对象"),
        ("this project is faster by", "本项目快多少"),
        ("rate of this project", "本项目的速率"),
        ("goal", "目标"),
    ]
    return rows(heads, body, language)


def _range(ends: list[str]) -> str:
    return ends[0] if ends[0] == ends[1] else "–".join(ends)


STEP: Words = ("CPU ms per step", "CPU 毫秒每步")
# The work, the contestant, the unit of the rate, the goal, the page of the whole table. Figures come from the results.
GOALS: list[tuple[Words, str, Words, Words, str]] = [
    (
        ("train a vocabulary, 100 MB, 30,000 entries", "训练词表，100 MB，30,000 个词条"),
        "tokenizers",
        TEXT,
        ("3.9× or more, same bytes every time", "不低于 3.9×，每次结果逐字节相同"),
        "text.md#vocabulary",
    ),
    (
        ("text to ids, cold start, equal ids", "文本转 id，冷启动，id 相同"),
        "tokenizers, encode_batch_fast",
        TEXT,
        ("4.5× or more", "不低于 4.5×"),
        "text.md#ids",
    ),
    (
        ("text to token files, start included", "文本转词元文件，含启动"),
        "Megatron-LM",
        TEXT,
        ("9.8× or more", "不低于 9.8×"),
        "text.md#token-files",
    ),
    (
        ("causal batches, as trained", "因果批次，含顺序与摘要"),
        "Hugging Face datasets",
        TOKENS,
        ("400 million", "4 亿"),
        "batches.md#rate",
    ),
    (
        ("masked batches, as trained", "掩码批次，含顺序与摘要"),
        "Hugging Face collator, NumPy",
        TOKENS,
        ("80 million", "8 千万"),
        "batches.md#rate",
    ),
    (
        ("masked whole words, as trained", "整词掩码批次，含顺序与摘要"),
        "Hugging Face collator",
        TOKENS,
        ("50 million", "5 千万"),
        "batches.md#rate",
    ),
    (
        ("a step of a decoder, same shape, CPU", "解码器一步，结构相同，CPU"),
        "nanoGPT, fused AdamW",
        STEP,
        ("1.05× or more", "不低于 1.05×"),
        "training.md#steps",
    ),
    (
        ("a step of an encoder, same shape, CPU", "编码器一步，结构相同，CPU"),
        "Hugging Face BertForMaskedLM, fused AdamW",
        STEP,
        ("1.28× or more", "不低于 1.28×"),
        "training.md#steps",
    ),
]
