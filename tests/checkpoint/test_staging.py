"""A directory appears whole or not at all: interruptions, a killed process, a full disk, unsuitable destinations."""

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_checkpoint import assert_same_weights, build_model, files

import glm5
from glm5.checkpoint import staging
from glm5.checkpoint.staging import staged_directory
from glm5.errors import CheckpointError


class Interrupting:
    """A tokenizer in the middle of whose save something happens: the weights are written by then."""

    def __init__(self, happen: Callable[[], object]) -> None:
        self.happen = happen

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{")
        assert list(directory.glob("*.safetensors"))
        self.happen()


def press_ctrl_c() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_leaves_nothing_behind(model: glm5.GLM5, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        glm5.save_model(model, tmp_path / "m", Interrupting(press_ctrl_c))
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_the_earlier_model_untouched(saved: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "m"))
    before = files(directory)
    with pytest.raises(KeyboardInterrupt):
        glm5.save_model(build_model(seed=3), directory, Interrupting(press_ctrl_c))
    assert files(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_killed_process_leaves_the_earlier_model_whole(saved: Path, tmp_path: Path) -> None:
    """SIGKILL runs no clean-up: only a hidden sibling may remain, and the next save works beside it."""
    directory = Path(shutil.copytree(saved, tmp_path / "m"))
    before = files(directory)
    other = build_model(seed=3)
    child = os.fork()
    if child == 0:
        for name in ("m", "fresh"):
            glm5.save_model(other, tmp_path / name, Interrupting(lambda: os.kill(os.getpid(), signal.SIGKILL)))
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert files(directory) == before
    assert all(p.name.startswith(".") for p in tmp_path.iterdir() if p.name != "m")
    glm5.save_model(other, directory)
    assert_same_weights(other, glm5.load_model(directory))


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_killed_during_the_swap_loses_neither_model_nor_tokenizer(
    renames: int, saved: Path, tmp_path: Path
) -> None:
    """Dead after the earlier model was moved aside, then after the new one took its place."""
    directory = Path(shutil.copytree(saved, tmp_path / "m"))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "figures").mkdir()
    (directory / "figures" / "loss.svg").write_text("<svg/>")
    (directory / "LICENSE").symlink_to("../LICENSE")
    earlier, new = glm5.load_model(saved), build_model(seed=3)

    child = os.fork()
    if child == 0:
        rename, done = os.rename, []

        def dying(source: Path, target: Path) -> None:
            rename(source, target)
            done.append(target)
            if len(done) == renames:
                os._exit(7)

        os.rename = dying
        glm5.save_model(new, directory)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert directory.exists() == (renames == 2)

    assert_same_weights(earlier if renames == 1 else new, glm5.load_model(directory))
    glm5.save_model(earlier, directory)
    assert_same_weights(earlier, glm5.load_model(directory))
    assert (directory / "tokenizer.json").read_text() == "{}"
    assert (directory / "figures" / "loss.svg").read_text() == "<svg/>"
    assert os.readlink(directory / "LICENSE") == "../LICENSE"
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_conversion_sees_the_model_that_a_killed_save_moved_aside(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / ".m.old")
    with pytest.raises(CheckpointError, match="m holds a model already"):
        glm5.checkpoint.convert_checkpoint(saved, tmp_path / "m", "bf16")
    assert files(tmp_path / "m") == files(saved)


def test_a_refused_write_is_reported_and_undone(model: glm5.GLM5, saved: Path, tmp_path: Path) -> None:
    """The operating system refuses to grow any file past 50 kB, as a full disk would."""
    directory = Path(shutil.copytree(saved, tmp_path / "m"))
    before = files(directory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"Writing .*m failed \(.*File too large.*nothing there was changed"):
            glm5.save_model(model, directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_the_earlier_model_comes_back_when_the_rename_fails(
    model: glm5.GLM5, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Path(shutil.copytree(saved, tmp_path / "m"))
    before = files(directory)
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise OSError("device went away")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(CheckpointError, match="device went away"):
        glm5.save_model(model, directory)
    assert files(directory) == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_too_little_space_is_seen_before_writing(
    model: glm5.GLM5, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"deep/m needs 0\.0 GB and .* has 0\.0 GB free"):
        glm5.save_model(model, tmp_path / "deep" / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_with_other_content_is_refused(model: glm5.GLM5, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no model"):
        glm5.save_model(model, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(model: glm5.GLM5, tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match="m is a file; give the name of a directory"):
        glm5.save_model(model, tmp_path / "m")


def test_empty_directories_new_parents_and_links_are_fine(model: glm5.GLM5, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    glm5.save_model(model, tmp_path / "link")
    glm5.save_model(model, tmp_path / "a" / "b" / "m")
    assert (tmp_path / "link").is_symlink()
    for name in ("empty", "link", "a/b/m"):
        assert_same_weights(model, glm5.load_model(tmp_path / name))


def test_a_staged_directory_is_hidden_until_its_block_ends(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "m") as stage:
        (stage / "x").write_text("1")
        assert not (tmp_path / "m").exists() and stage.name.startswith(".m.")
    assert files(tmp_path / "m").keys() == {"x"}
