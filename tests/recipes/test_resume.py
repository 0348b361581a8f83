"""Interrupted merges: the same command finishes them, and nothing tells that they were interrupted."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxmerge.converters import CheckpointError, load_checkpoint, save_checkpoint
from jaxmerge.converters.partial_file import PartialFile
from jaxmerge.recipes import PlanError, make_plan, parse, run
from jaxmerge.recipes.journal import Journal
from jaxmerge.recipes.output import UNFINISHED, journal_of
from jaxmerge.recipes.processes import OtherProcessError, Processes

RECIPE = """
merge_method: linear
models:
- {model: a, parameters: {weight: 0.3}}
- {model: b, parameters: {weight: 0.7}}
"""
TENSORS, SIZE = 24, 64
SHARD = 2 * SIZE * 4

COMMAND = """
import sys
from jaxmerge.recipes import make_plan, read, run
out, size, overwrite = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "overwrite"
run(make_plan(read("recipe.yaml"), out=out, overwrite=overwrite), shard_size=size)
"""


def files(folder: Path | str) -> dict[str, bytes]:
    folder = Path(folder)
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_models(TENSORS)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


def save_models(tensors: int) -> None:
    rng = np.random.default_rng(0)
    for name in "ab":
        drawn = {f"layers.{i}.weight": rng.normal(size=SIZE).astype("f4") for i in range(tensors)}
        save_checkpoint(name, drawn, metadata={"format": "pt"})
        Path(name, "config.json").write_text(json.dumps({"model_type": name}))


def merge(out: str, **arguments: Any) -> Path:
    return run(make_plan(parse(RECIPE), out=out), shard_size=SHARD, **arguments)


class Stop(Exception):
    """What a test raises in the middle of a run."""


def stop_after(count: int, error: type[BaseException] = Stop) -> Any:
    steps = 0

    def progress(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == count:
            raise error

    return progress


def finished(out: str) -> int:
    """How many tensors the journal of an unfinished output promises."""
    try:
        return journal_of(Path(out)).read_bytes().count(b'{"tensor"')
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    ("out", "size", "kill_at"), [("out", SHARD, 2), ("out", SHARD, 50), ("out.safetensors", 1, 40)]
)
def test_a_killed_process_is_gone_on_with(folder: Path, out: str, size: int, kill_at: int) -> None:
    save_models(tensors=120)
    command = [sys.executable, "-c", COMMAND, out, str(size), ""]
    with subprocess.Popen(command) as process:
        while finished(out) < kill_at and process.poll() is None:
            time.sleep(0)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    with pytest.raises(CheckpointError):
        load_checkpoint(out)
    done: list[str] = []
    plan = make_plan(parse(RECIPE), out=out)
    assert plan.resumes
    run(plan, shard_size=size, progress=lambda name, *_: done.append(name))
    assert 0 < len(done) <= 120 - kill_at
    Path("undisturbed").mkdir()
    run(make_plan(parse(RECIPE), out=f"undisturbed/{out}"), shard_size=size)
    if Path(out).is_dir():
        assert files(out) == files(f"undisturbed/{out}")
    else:
        assert Path(out).read_bytes() == Path(f"undisturbed/{out}").read_bytes()
        assert not journal_of(Path(out)).exists()


def test_what_is_finished_is_not_merged_again(folder: Path) -> None:
    with pytest.raises(Stop):
        merge("out", progress=stop_after(10))
    names: list[str] = []
    merge("out", progress=lambda name, *_: names.append(name))
    assert len(names) == TENSORS - 10
    merge("again")
    assert load_checkpoint("out").keys() == load_checkpoint("again").keys()
    assert files("out")["jaxmerge.json"] == files("again")["jaxmerge.json"]


def test_bytes_that_the_disk_has_lost_are_merged_again(folder: Path) -> None:
    with pytest.raises(Stop):
        merge("out", progress=stop_after(10))
    shards = sorted(Path("out").glob("*.safetensors.partial"))
    shards[0].write_bytes(b"")
    data = bytearray(shards[2].read_bytes())
    data[-3] ^= 1
    shards[2].write_bytes(data)
    names: list[str] = []
    merge("out", progress=lambda name, *_: names.append(name))
    assert len(names) == TENSORS - 10 + 3
    merge("again")
    assert files("out")["jaxmerge.json"] == files("again")["jaxmerge.json"]
    for name in load_checkpoint("again"):
        np.testing.assert_array_equal(load_checkpoint("out")[name], load_checkpoint("again")[name])


def test_a_journal_whose_last_line_was_cut_short_is_read(folder: Path) -> None:
    with pytest.raises(Stop):
        merge("out", progress=stop_after(10))
    journal = Path("out", UNFINISHED)
    text = journal.read_bytes()
    for length in (len(text) - 5, 20, 0):
        journal.write_bytes(text[:length])
        if length == 20:
            # Not even the first line: nothing says whose files these are.
            with pytest.raises(PlanError, match="is not empty"):
                merge("out")
            continue
        if length == 0:
            for file in Path("out").glob("*.partial"):
                file.unlink()
        with pytest.raises(Stop):
            merge("out", progress=stop_after(1))
    merge("out")
    merge("again")
    assert files("out")["jaxmerge.json"] == files("again")["jaxmerge.json"]


def test_every_stage_of_putting_shards_in_place_can_be_gone_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = PartialFile.publish
    merge("again")
    shards = TENSORS // 2
    for stage in (0, 5, shards):
        calls = 0

        def stopping(self: PartialFile, stage: int = stage) -> None:
            nonlocal calls
            if calls == stage:
                raise Stop
            calls += 1
            publish(self)

        monkeypatch.setattr(PartialFile, "publish", stopping)
        with pytest.raises(Stop):
            merge("out")
        monkeypatch.setattr(PartialFile, "publish", publish)
    assert merge("out", progress=stop_after(1)) == Path("out")
    for name, data in files("again").items():
        # The card has the folder's name as its title.
        assert files("out")[name] == data or name == "README.md"


def test_a_replaced_folder_stays_whole_until_the_new_one_is(folder: Path) -> None:
    save_checkpoint("out", {"old": np.ones(3)})
    before = files("out")

    def merge_over(**arguments: Any) -> Path:
        plan = make_plan(parse(RECIPE), out="out", overwrite=True)
        return run(plan, shard_size=SHARD, **arguments)

    with pytest.raises(Stop):
        merge_over(progress=stop_after(5))
    assert files("out") == before
    names: list[str] = []
    merge_over(progress=lambda name, *_: names.append(name))
    assert len(names) == TENSORS - 5
    assert len(load_checkpoint("out")) == TENSORS
    assert sorted(os.listdir(".")) == ["a", "b", "out", "recipe.yaml"]


@pytest.mark.parametrize("stage", [1, 2])
def test_a_replacement_can_be_gone_on_with_between_its_renames(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    save_checkpoint("out", {"old": np.ones(3)})
    rename, calls = Path.rename, 0

    def stopping(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls > stage:
            raise Stop
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopping)
    if stage == 2:
        monkeypatch.setattr("jaxmerge.recipes.workplace._delete", stop_after(2))
    with pytest.raises(Stop):
        run(make_plan(parse(RECIPE), out="out", overwrite=True), shard_size=SHARD)
    monkeypatch.undo()
    os.chdir(folder)
    run(make_plan(parse(RECIPE), out="out", overwrite=True), shard_size=SHARD)
    assert len(load_checkpoint("out")) == TENSORS
    assert sorted(os.listdir(".")) == ["a", "b", "out", "recipe.yaml"]


def test_a_whole_file_whose_journal_is_still_there_is_not_written_again(folder: Path) -> None:
    out = Path("out.safetensors")
    merge(str(out), progress=lambda *_: None)
    plan = make_plan(parse(RECIPE), out=out, overwrite=True)
    with pytest.raises(Stop):
        run(plan, progress=stop_after(TENSORS))
    journal = journal_of(out).read_bytes()
    assert finished(str(out)) == TENSORS
    run(make_plan(parse(RECIPE), out=out))
    journal_of(out).write_bytes(journal)
    names: list[str] = []
    run(make_plan(parse(RECIPE), out=out), progress=lambda name, *_: names.append(name))
    assert names == []
    assert sorted(os.listdir(".")) == ["a", "b", "out.safetensors", "recipe.yaml"]


def test_the_same_merge_again_is_done_already(folder: Path) -> None:
    merge("out")
    assert make_plan(parse(RECIPE), out="out").done
    merge("out", progress=stop_after(1))
    next(Path("out").glob("model-*")).unlink()
    with pytest.raises(PlanError, match="is not empty"):
        make_plan(parse(RECIPE), out="out")
    run(make_plan(parse(RECIPE), out="out", overwrite=True), shard_size=SHARD)
    os.utime("b/model.safetensors", ns=(1, 1))
    with pytest.raises(PlanError, match="is not empty"):
        make_plan(parse(RECIPE), out="out")


def test_two_runs_into_one_output_are_refused(folder: Path) -> None:
    for out in ("out", "out.safetensors"):
        plan = make_plan(parse(RECIPE), out=out)

        def meanwhile(*_: object, out: str = out) -> None:
            with pytest.raises(PlanError, match="another run is writing there"):
                merge(out)

        run(plan, shard_size=SHARD, progress=meanwhile)


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_what_was_written_since_the_plan_is_not_replaced(folder: Path, out: str) -> None:
    plan = make_plan(parse(RECIPE), out=out)
    if out == "out":
        save_checkpoint(out, {"other": np.ones(3)})
    else:
        Path(out).write_bytes(b"other")
    before = sorted(folder.rglob("*"))
    with pytest.raises(PlanError, match="written by another run since the plan"):
        run(plan)
    assert sorted(folder.rglob("*")) == before


def test_a_run_beside_an_unfinished_one_is_refused(folder: Path) -> None:
    def meanwhile(*_: object) -> None:
        other = parse(RECIPE.replace("0.3", "0.5"))
        with pytest.raises(PlanError, match="another run is writing there"):
            run(make_plan(other, out="out", overwrite=True))

    merge("out", progress=meanwhile)
    assert len(load_checkpoint("out")) == TENSORS


def test_a_full_disk_keeps_what_is_finished_and_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_at, calls = PartialFile.write_at, 0

    def full(self: PartialFile, data: Any, offset: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(28, "No space left on device")
        write_at(self, data, offset)

    monkeypatch.setattr(PartialFile, "write_at", full)
    with pytest.raises(CheckpointError, match="No space left") as raised:
        merge("out")
    assert "the same command goes on where it stopped" in raised.value.__notes__[0]
    monkeypatch.setattr(PartialFile, "write_at", write_at)
    names: list[str] = []
    merge("out", progress=lambda name, *_: names.append(name))
    assert 0 < len(names) < TENSORS


@pytest.mark.parametrize("change", ["touch", "vanish"])
def test_a_source_that_changes_while_it_is_merged_is_an_error(folder: Path, change: str) -> None:
    source = Path("b/model.safetensors")

    def meanwhile(name: str, done: int, total: int) -> None:
        if done == total and change == "touch":
            os.utime(source, ns=(1, 1))
        elif done == total:
            source.rename("elsewhere")

    message = "has changed since" if change == "touch" else "cannot be read any more"
    with pytest.raises(PlanError, match=message):
        merge("out", progress=meanwhile)
    assert Path("out").exists() == (change == "vanish")
    if change == "vanish":
        Path("elsewhere").rename(source)
        names: list[str] = []
        merge("out", progress=lambda name, *_: names.append(name))
        assert names == []


def test_an_interruption_says_how_to_go_on(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="out is unfinished; the same command goes on"):
        merge("out", progress=stop_after(7, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        merge("other", progress=stop_after(1, KeyboardInterrupt))
    merge("out")


def test_another_shard_size_begins_anew(folder: Path) -> None:
    with pytest.raises(Stop):
        merge("out", progress=stop_after(7))
    names: list[str] = []
    run(make_plan(parse(RECIPE), out="out"), progress=lambda name, *_: names.append(name))
    assert len(names) == TENSORS
    assert [name for name in sorted(os.listdir("out")) if "safetensors" in name] == [
        "model.safetensors"
    ]


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path\n"
        "from jaxmerge.recipes.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]), {})\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    path = tmp_path / "journal"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(PlanError, match="another run is writing there"):
            Journal(path, {})
        process.kill()
        process.wait()
        Journal(path, {}).close()


def test_source_hashes_follow_the_merge_and_are_those_of_the_files(folder: Path) -> None:
    merge("out")
    record = json.loads(Path("out/jaxmerge.json").read_text())
    for source in record["sources"]:
        expected = hashlib.sha256(Path(source["name"], "model.safetensors").read_bytes())
        assert source["files"][0]["sha256"] == expected.hexdigest()


class Together(Processes):
    """Two processes in two threads."""

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        super().__init__(index, 2)
        self.barrier = barrier

    def meet(self, text: str = "") -> list[str]:
        try:
            self.barrier.wait(60)
        except threading.BrokenBarrierError:
            raise OtherProcessError("the other one has failed") from None
        return [text, text]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.barrier.abort()
            raise


def test_what_two_processes_have_finished_one_goes_on_with(folder: Path) -> None:
    barrier, names = threading.Barrier(2), [list[str]() for _ in range(2)]

    def share(index: int) -> None:
        def step(name: str, *_: object) -> None:
            names[index].append(name)
            if index == 1 and len(names[1]) == 5:
                raise Stop

        processes = Together(index, barrier)
        plan = make_plan(parse(RECIPE), out="out")
        with contextlib.suppress(Stop, OtherProcessError):
            run(plan, shard_size=SHARD, progress=step, processes=processes)

    threads = [threading.Thread(target=share, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(one) for one in names] == [TENSORS // 2, 5]
    assert len(list(Path("out").glob("jaxmerge-unfinished*.jsonl"))) == 2
    rest: list[str] = []
    merge("out", progress=lambda name, *_: rest.append(name))
    assert set(rest) == {f"layers.{i}.weight" for i in range(TENSORS)} - {*names[0], *names[1]}
    Path("undisturbed").mkdir()
    merge("undisturbed/out")
    assert files("out") == files("undisturbed/out")
