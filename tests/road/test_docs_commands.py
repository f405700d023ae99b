"""Every command in the README and in the pages is run by a test, or checked against the real command line.

A fence ```sh holds commands for the sample in this repository. A fence with other needs states them in its title:

    ```sh title="needs: cluster"      or gpu, network, your text, your model

The commands in `tests.road.test_readme.WALKED` run in order, and so does every call of explain and check_files. For any
other command the test loads the configuration file with its overrides, as the stage would. The pages of both languages
hold the same commands, so the tests use the English ones.
"""

import ast
import re
import shlex
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from pretrain import config
from pretrain.cli import config_of
from pretrain.corpus.recipe import Recipe
from tests.conftest import ROOT
from tests.road.test_readme import ANSWERED, WALKED, fences

NEEDS = {"needs: cluster", "needs: gpu", "needs: network", "needs: your text", "needs: your model"}
PAGES = ["README.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs" / "en").rglob("*.md")))]
OF_THIS_CHECKOUT = [page for page in PAGES if "/extend/" not in page]  # test_extend.py runs the pages that add modules


def twin(page: str) -> str:
    return {"README.md": "README.zh-CN.md"}.get(page, page.replace("docs/en/", "docs/zh/"))


def commands(page: str) -> list[str]:
    """The commands that a reader of the page can run as they are printed."""
    return [line for fence in fences(page) if fence.language == "sh" and not fence.title for line in fence.lines]


def stage_of(script: str) -> type[config.Config]:
    """Return the configuration class of the stage that `launch/STAGE.py` starts."""
    return config_of(Path(script).stem)


def check(command: str) -> None:
    """Fail unless the real program would accept this command."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "tensorboard":
        assert metadata.entry_points(group="console_scripts", name="tensorboard"), command
        assert words[1:] == ["--logdir", "runs"], command
    elif words[0] == "deepspeed":
        assert words[1:4] == ["--num_accelerators", "2", "launch/pretrain.py"], command
        config.load(stage_of(words[3]), ROOT / words[4], words[5:])
    else:
        assert words[0] == "python", f'no test knows how to check {command!r}: mark its fence with title="needs: …"'
        config.load(stage_of(words[1]), ROOT / words[2], words[3:])


@pytest.mark.parametrize("page", OF_THIS_CHECKOUT)
def test_every_command_runs_in_a_test_or_is_accepted(page):
    for command in commands(page):
        if command not in WALKED and not any(script in command for script in ANSWERED):
            check(command)


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands(page):
    def code(page: str) -> list:
        return [fence for fence in fences(page) if fence.language in ("sh", "yaml", "python", "json")]

    ours, theirs = code(page), code(twin(page))
    assert [(fence.language, fence.title, fence.lines) for fence in ours] == [
        (fence.language, fence.title, fence.lines) for fence in theirs
    ]


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_are_not_run_say_what_they_need_and_name_scripts_that_exist(page):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for fence in fences(page):
        if fence.language == "sh":
            assert not fence.title or fence.title in NEEDS, (page, fence.title)
    text = (ROOT / page).read_text(encoding="utf-8")
    for script in re.findall(r"launch/[a-z][\w.]*\w", text):
        assert (ROOT / script).is_file(), f"{page} names {script}"
    for names in re.findall(r"pip install '?\.\[([\w,]+)\]", text):
        assert set(names.split(",")) <= set(extras), (page, names)


@pytest.mark.parametrize("page", PAGES)
def test_configurations_are_accepted(page):
    """A fence `yaml title="STAGE.yaml"` is a configuration of that stage; for a run, the keys to change in a sample."""
    for fence in fences(page):
        if fence.language == "python":
            ast.parse("\n".join(fence.lines))
        if fence.language != "yaml":
            continue
        assert fence.title, f"{page}: say in the title of the fence which stage reads this configuration"
        values, name = config.parse(fence.text, page), Path(fence.title).stem
        kind = Recipe if name == "recipe" else stage_of(f"launch/{name}.py")
        values = laid_over_a_sample(values) if name == "pretrain" else values
        assert isinstance(config.build(kind, values, page), kind), page


def laid_over_a_sample(values: dict) -> dict:
    """Return the sample encoder's configuration with these values. `data` with corpora replaces the whole section."""
    run = config.parse((ROOT / "configs/sample/encoder.yaml").read_text(encoding="utf-8"), "encoder.yaml")
    for section, value in values.items():
        whole = not isinstance(value, dict) or "corpora" in value
        run[section] = value if whole else {**run.get(section, {}), **value}
    return run


def test_the_checks_refuse_what_the_programs_would_refuse():
    for command in (
        "python launch/tokenizer.py configs/sample/tokenizer-bert.yaml vocab_sise=4096",
        "python launch/tokenizer.py configs/sample/no-such-file.yaml",
        "make no-such-target",
        "sbatch launch/slurm.sbatch CONFIG.yaml",
    ):
        with pytest.raises((config.ConfigError, subprocess.CalledProcessError, AssertionError)):
            check(command)


def test_pages_name_modules_that_exist():
    for page in OF_THIS_CHECKOUT:
        text = (ROOT / page).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:pretrain|configs|benchmarks|docs|data|tests)/[\w./-]*\w/?)`", text):
            assert (ROOT / name).exists(), f"{page} names {name}"
