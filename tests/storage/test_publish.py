"""Publishing a folder: one process at a time, never over other settings or other files, and nothing is lost."""

import errno
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain import cli
from pretrain.config import StageConfig, free
from pretrain.errors import UserError
from pretrain.storage.files import write_json
from pretrain.storage.index import checksum, fingerprint, write_index
from pretrain.storage.publish import check_output, publish
from pretrain.tools import check_files
from tests.conftest import ROOT


class Stage(StageConfig):
    """A configuration as a stage declares it."""

    out: str
    size: int = 1
    rules: dict[str, int] = {}
    corpus: str = "text"
    workers: int = free(1)


def made(out: Path, **settings) -> dict:
    """Publish a folder that records the settings, and return its result."""
    with publish(out, "export", UserError, Stage(out=str(out), **settings)) as aside:
        (aside / "result").write_text(json.dumps({"size": settings.get("size", 1)}))
        write_index(aside, {"stage": "export", "recorded": {"corpus": settings.get("corpus", "text")}})
    return json.loads((out / "result").read_text())


def test_a_folder_is_made_by_one_process_at_a_time(tmp_path):
    out = tmp_path / "out"
    with publish(out, "export", UserError) as aside:
        (aside / "weights").write_bytes(b"1")
        with (
            pytest.raises(UserError, match="another process is making this folder"),
            publish(out, "export", UserError),
        ):
            pass
        assert (aside / "weights").exists(), "what the first one had written is gone"
        write_index(aside, {"stage": "export"})
    made(out)  # over it, now that it is done
    (tmp_path / ".out.tmp").mkdir()  # a killed process left it
    made(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out"]


def test_a_result_of_other_settings_is_replaced_only_if_that_is_asked_for(tmp_path):
    out = tmp_path / "out"
    made(out, size=2, rules={"a": 1, "b": 2})
    before = (out / "index.json").read_bytes()
    made(out, size=2, rules={"a": 1, "b": 2}, workers=4)  # the same, made again
    assert (out / "index.json").read_bytes() == before
    with pytest.raises(UserError) as refused:
        made(out, size=3, rules={"a": 1, "b": 5})
    assert refused.value.details[:2] == ("size: 2 → 3", "rules.b: 2 → 5")
    assert "made with other settings" in refused.value.what and "replace=true" in refused.value.details[-1]
    assert (out / "index.json").read_bytes() == before
    assert check_files.check(out) == []
    assert made(out, size=3, replace=True)["size"] == 3


def test_a_place_written_another_way_is_the_same_setting(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").touch()
    made(tmp_path / "out", corpus="text")
    made(tmp_path / "out", corpus=str(tmp_path / "text"))
    with pytest.raises(UserError, match=r"corpus: .*text → other"):
        made(tmp_path / "out", corpus="other")


def test_a_result_that_noted_no_settings_is_held_to_what_its_index_says(tmp_path):
    out = tmp_path / "out"
    made(out, size=2)
    index = json.loads((out / "index.json").read_text())
    del index["recorded"]["settings"]
    index["checksum"] = checksum(index)
    write_json(out / "index.json", index)
    with pytest.raises(UserError, match="corpus: text → other"):
        made(out, size=2, corpus="other")
    made(out, size=3)  # which size it had is not known
    (out / "index.json").write_text("{")
    made(out, size=4)  # a damaged folder is made again
    index = json.loads((out / "index.json").read_text()) | {"format": 9}
    index["fingerprint"] = fingerprint(index)
    write_json(out / "index.json", index | {"checksum": checksum(index)})
    with pytest.raises(UserError, match="made by another version"):
        made(out, size=4)


def test_every_stage_that_publishes_a_folder_knows_replace():
    """The other two stages publish nothing: `pretrain` continues its folder, `demo` runs other stages."""
    for stage in set(cli.STAGES) - {"pretrain", "demo"}:
        assert issubclass(cli.config_of(stage), StageConfig), stage


def test_a_result_that_cannot_take_its_name_is_kept_beside_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    made(out)
    real = Path.rename

    def busy(path, target):
        if Path(target) == out and path.name == ".out.tmp":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        with pytest.raises(UserError, match="the output folder cannot be replaced") as error:
            made(out)
    assert check_files.check(out) == [] and check_files.check(tmp_path / "out-2") == []
    assert f"the new result is in {tmp_path / 'out-2'}" in str(error.value)


def test_an_old_folder_that_cannot_be_removed_stops_no_build(tmp_path, monkeypatch, capsys):
    """NFS refuses this removal while another process has a file of the folder open."""
    out = tmp_path / "out"
    made(out)
    real = shutil.rmtree

    def held(path, *arguments, **options):
        if Path(path).name.startswith(".out.old") and Path(path).exists():
            if not (arguments or options):
                raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
            return
        real(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", held)
        for _ in range(3):
            made(out)
            assert "could not be removed (Directory not empty)" in capsys.readouterr().err
    made(out)
    assert check_files.check(out) == [] and not list(tmp_path.glob(".out.old*"))


def test_a_build_killed_between_two_names_loses_nothing(tmp_path):
    out = tmp_path / "out"
    made(out, size=5)
    out.rename(tmp_path / ".out.old")
    with pytest.raises(UserError, match="size: 5 → 6"):
        made(out, size=6)
    assert check_files.check(out) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a folder needs root")
def test_a_mount_point_is_refused_before_any_work(tmp_path):
    for name in ("there", "out"):
        (tmp_path / name).mkdir()
    code = "from pretrain.storage.publish import publish; publish({!r}, 'export').__enter__()".format(
        str(tmp_path / "out")
    )
    line = f"mount --bind {tmp_path}/there {tmp_path}/out && {sys.executable} -c {shlex.quote(code)}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", line], cwd=ROOT, capture_output=True, text=True)
    if "mount" in done.stderr and "Traceback" not in done.stderr:
        pytest.skip("a folder cannot be mounted here")
    assert "the output folder is a mount point" in done.stderr and f"out={tmp_path}/out/export" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "there"]


@pytest.mark.parametrize("name", ["a" * 251, "a" * 300, "x\0y", "b/" * 2100 + "out", "\udcff" * 254])
def test_a_name_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UserError, match="the output folder cannot be made"),
        publish(Path(name), "export", UserError),
    ):
        pass
    with pytest.raises(UserError, match="the output folder cannot be made"):
        check_output(Path(name))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_publishes_during_the_check_is_replaced(tmp_path, monkeypatch):
    from pretrain.storage import publish as publishing

    out, real = tmp_path / "o", publishing.stage_of

    def looked(index):
        found = real(index)
        if index.parent == out:
            monkeypatch.setattr(publishing, "stage_of", real)
            made(out)
        return found

    monkeypatch.setattr(publishing, "stage_of", looked)
    assert made(out) == {"size": 1} and not list(tmp_path.glob(".o.*old*"))


def test_a_folder_that_another_process_renames_during_the_check_is_replaced(tmp_path, monkeypatch):
    out, real = tmp_path / "o", Path.exists
    made(out)

    def looked(path):
        found = real(path)
        if path == out:
            monkeypatch.setattr(Path, "exists", real)
            out.rename(tmp_path / ".o.old")  # as a process that replaces it does before it renames its result
        return found

    monkeypatch.setattr(Path, "exists", looked)
    assert made(out, size=1) == {"size": 1}
    assert Path.exists is real and sorted(path.name for path in tmp_path.iterdir()) == [".o.lock", "o"]


def test_a_refusal_leaves_the_earlier_result_of_a_killed_process(tmp_path):
    out = tmp_path / "o"
    made(out)
    out.rename(tmp_path / ".o.old")  # killed between the two renames
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="the output folder holds something else"):
        made(out)
    assert (tmp_path / ".o.old/result").exists() and (out / "mine.txt").exists()


def test_a_link_that_leads_to_itself_is_no_output_folder(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="is a link that leads to itself"):
        made(tmp_path / "a")
