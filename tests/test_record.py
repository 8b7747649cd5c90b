"""What a run rests on: a small change of any file of its base is noticed wherever it is used."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import command_of, command_raises
from helpers.errors import raises
from helpers.tiny import GOOD, write_llama, write_meanings, write_model, write_reviews
from safetensors.numpy import load_file, save_file

from adapters_jax.errors import BaseFileError, OtherBaseError, UserError
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.console import Console
from adapters_jax.finetune.inference import load_predictor
from adapters_jax.finetune.leaving import open_source
from adapters_jax.finetune.pretrained import record
from adapters_jax.finetune.pretrained.record import record_of, sha256_of
from adapters_jax.finetune.run_directory import Run, RunError
from adapters_jax.finetune.runs.prepare import resume_run
from adapters_jax.finetune.runs.stopping import InterruptedRunError
from adapters_jax.finetune.serving.adapters import DecoderBase
from adapters_jax.finetune.serving.labels import EncoderBase
from adapters_jax.finetune.tasks.completion_problem import CompletionProblem
from adapters_jax.finetune.tasks.labelled_problem import LabelledProblem

FIXTURES = Path(__file__).parent / "fixtures"
PROBLEMS = {"tiny": LabelledProblem, "llama": CompletionProblem}
SMALL = "--no-baselines --epochs 2 --batch-size 16 --method lora --rank 2 --limit 32"
TRAIN = {
    "tiny": f"finetune --train reviews.jsonl --text review --max-length 12 {SMALL}",
    "llama": f"finetune --train meals.csv --prompt mr --completion ref --no-pack {SMALL}",
}
TRAIN["llama"] += " --exact-match 0"
TEXTS = ("the good film", "a dull plot")
USE = {"tiny": ["predict", "done-tiny", *TEXTS], "llama": ["generate", "done-llama", "--prompt"]}
USE["llama"] += ["food Thai", "--max-new-tokens", "2"]


@contextlib.contextmanager
def stopped(problem, at):
    """Within, a training ends before a step as by SIGTERM."""
    batch = problem.batch

    def stopping(self, step):
        if step == at:
            raise InterruptedRunError(signal.SIGTERM)
        return batch(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "batch", stopping)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two bases, their rows, and of each base a finished run and an interrupted one."""
    place = tmp_path_factory.mktemp("record")
    write_model(place / "tiny")
    write_reviews(place / "reviews.jsonl", rows=60)
    write_llama(place / "llama", num_hidden_layers=1)
    write_meanings(place / "meals.csv", rows=60)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for base, words in TRAIN.items():
            words = [*words.split(), "--model", base, "--runs", "."]
            assert main([*words, "--name", f"done-{base}"]) == 0
            with stopped(PROBLEMS[base], 2):
                assert main([*words, "--name", f"cut-{base}"]) == 143
    return place


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """A copy of these, with the copies of the bases in the runs' configurations."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*/config.json"):
        path.write_bytes(path.read_bytes().replace(bytes(made), bytes(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edited(path, **values):
    """Changes keys of a JSON file."""
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}))


def swap_tokens(base):
    """Exchanges the ids of two words."""
    path = base / "tokenizer.json"
    values = json.loads(path.read_text())
    words = values["model"]["vocab"]
    one, other = ("Thai", "French") if "Thai" in words else (GOOD[0], "dull")
    words[one], words[other] = words[other], words[one]
    path.write_text(json.dumps(values))


def nudge(base):
    """Adds a thousandth to one weight."""
    path = base / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).flat[0] += np.float32(1e-3)
    save_file(tensors, path, {"format": "pt"})


def write_template(base):
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


CHANGES = {  # how a base changes, and what the error names
    "tokens": ("tiny", swap_tokens, ["tokenizer.json"]),
    "weight": ("tiny", nudge, ["model.safetensors", "base_sha256"]),
    "activation": (
        "tiny",
        lambda base: edited(base / "config.json", hidden_act="relu"),
        ["config.json: hidden_act 'gelu', here 'relu'"],
    ),
    "heads": (
        "tiny",
        lambda base: edited(base / "config.json", num_attention_heads=2),
        ["config.json: num_attention_heads 4, here 2"],
    ),
    "spoken tokens": ("llama", swap_tokens, ["tokenizer.json"]),
    "end": (
        "llama",
        lambda base: edited(base / "tokenizer_config.json", eos_token="is"),
        ["tokenizer_config.json: eos_token {'content': '<end>'}, here 'is'"],
    ),
    "template": (
        "llama",
        lambda base: edited(base / "tokenizer_config.json", chat_template="{{ messages[0] }}"),
        ["tokenizer_config.json: chat_template", "here '{{ messages[0] }}'"],
    ),
    "template file": ("llama", write_template, ["chat_template.jinja absent, here "]),
    "end by its id": (
        "llama",
        lambda base: edited(base / "config.json", eos_token_id=6),
        ["config.json: eos_token_id", "here 6"],
    ),
    "positions": (
        "llama",
        lambda base: edited(base / "config.json", rope_theta=500.0),
        ["config.json: rope_theta 10000.0, here 500.0"],
    ),
    "no tokenizer config": (
        "llama",
        lambda base: (base / "tokenizer_config.json").unlink(),
        ["tokenizer_config.json: eos_token", "here absent"],
    ),
}


@pytest.mark.weekly
@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_file_is_named_by_resume_and_by_use(place, case):
    base, change, named = CHANGES[case]
    change(place / base)
    with command_raises(RunError, f"done-{base}", *named, "--any-base"):
        assert main(USE[base]) == 2
    before = Path(f"cut-{base}", "config.json").read_bytes()
    with command_raises(RunError, f"cut-{base}", *named, "--any-base"):
        assert main(["finetune", "--resume", f"cut-{base}"]) == 2
    assert Path(f"cut-{base}", "config.json").read_bytes() == before


@pytest.mark.weekly
@pytest.mark.parametrize("base", TRAIN)
def test_what_nothing_reads_may_change(place, base, capsys):
    assert main(USE[base]) == 0
    said = capsys.readouterr()
    path = place / base / "config.json"
    values = {"_name_or_path": "x", "torch_dtype": "float16", "transformers_version": "4.1.0"}
    path.write_text(json.dumps({**values, **dict(reversed(json.loads(path.read_text()).items()))}))
    edited(place / base / "tokenizer_config.json", model_max_length=7)
    (place / base / "vocab.txt").write_text("a\n")
    assert main(USE[base]) == 0
    now = capsys.readouterr()
    assert now.out == said.out and "warning" not in now.err
    assert main(["finetune", "--resume", f"cut-{base}"]) == 0
    assert "warning" not in capsys.readouterr().err
    for file in ("metrics.jsonl", "adapter/adapter.safetensors"):
        assert Path(f"cut-{base}", file).read_bytes() == Path(f"done-{base}", file).read_bytes()


@pytest.mark.weekly
@pytest.mark.parametrize("case", ["tokens", "activation", "end"])
def test_with_the_flag_a_run_goes_on_and_records_what_changed(place, case, capsys):
    base, change, named = CHANGES[case]
    change(place / base)
    assert main([*USE[base], "--any-base"]) == 0
    said = capsys.readouterr().err
    assert all(f"warning: done-{base}" in said and datum in said for datum in named)
    run = f"cut-{base}"
    assert main(["finetune", "--resume", run, "--any-base"]) == 0
    config = Run(Path(run)).read_config()
    assert "summary" in config
    assert all(any(datum in each for each in config["base_changes"]) for datum in named)
    assert config["base_files"] == record_of(base).files
    capsys.readouterr()
    # It was trained on the base as it is now, so nothing differs any more.
    assert main([run if word == f"done-{base}" else word for word in USE[base]]) == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.weekly
def test_another_change_is_recorded_beside_the_first(place):
    swap_tokens(place / "tiny")
    with stopped(LabelledProblem, 3):
        assert main(["finetune", "--resume", "cut-tiny", "--any-base"]) == 143
    edited(place / "tiny" / "config.json", hidden_act="relu")
    with command_raises(RunError, "hidden_act"):
        assert main(["finetune", "--resume", "cut-tiny"]) == 2
    assert main(["finetune", "--resume", "cut-tiny", "--any-base"]) == 0
    found = "\n".join(Run(Path("cut-tiny")).read_config()["base_changes"])
    assert all(datum in found for datum in ("tokenizer.json", "tokens_sha256", "hidden_act"))


@pytest.mark.slow
def test_the_flag_is_for_runs_that_are_resumed(place):
    with command_raises(UserError, "--any-base", "--resume"):
        assert main([*TRAIN["tiny"].split(), "--model", "tiny", "--any-base"]) == 2


@pytest.mark.slow
def test_every_other_use_of_a_run_compares(place, capsys):
    for words in (
        ["merge", "done-llama", "--out", "merged"],
        ["convert", "done-llama", "as-native", "--to", "native"],
        ["combine", "done-llama", "done-llama", "--weights", "0.5", "0.5", "--out", "sum"],
        ["push", "done-llama", "me/mine", "--dry-run"],
    ):
        base = "llama"
        shutil.copytree(base, "kept")
        swap_tokens(place / base)
        with command_raises(RunError, f"done-{base}", "tokenizer.json", "--any-base"):
            assert main(words) == 2
        assert main([*words, "--any-base"]) == 0
        assert "tokenizer.json" in capsys.readouterr().err
        shutil.rmtree(base)
        Path("kept").rename(base)
    for made in ("as-native", "sum"):  # what they wrote records the change, and its base
        config = Run(Path(made)).read_config()
        assert "tokenizer.json" in config["base_changes"][0]
        swap_tokens(place / "llama")
        assert record_of("llama").files == config["base_files"]
        swap_tokens(place / "llama")
    assert "tokenizer.json" in Path("mine", "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("base", "reader"), [("tiny", EncoderBase), ("llama", DecoderBase)])
def test_a_server_takes_a_run_of_another_base_where_its_operator_says_so(place, base, reader):
    edited(place / base / "config.json", hidden_act="relu")
    command = command_of(f"adapters-jax serve {base} done-{base} --adapters 1 --port 0")
    with raises(RunError, f"done-{base}", "hidden_act", "--any-base"):
        command.prepare(Console(json=False))()
    served = reader(base)
    with raises(RunError, "hidden_act", "--any-base"):
        served.read(Path(f"done-{base}"))
    assert served.read(Path(f"done-{base}"), any_base=True).leaves


@pytest.mark.slow
def test_in_python_too(place):
    before = load_predictor("done-tiny").predict([TEXTS[0]])
    swap_tokens(place / "tiny")
    with raises(RunError, "done-tiny", "tokenizer.json", "any_base=True"):
        load_predictor("done-tiny")
    after = load_predictor("done-tiny", any_base=True).predict([TEXTS[0]])
    assert before[0].probabilities != after[0].probabilities
    with raises(RunError, "tokenizer.json"):
        open_source("done-tiny")
    assert open_source("done-tiny", any_base=True).config["base_changes"]
    # An adapter by itself knows its base's configuration.
    shutil.copytree("done-tiny/adapter", "alone")
    edited(place / "tiny" / "config.json", hidden_act="relu")
    with raises(OtherBaseError, "config_sha256"):
        open_source("alone", "tiny", "mean")
    assert open_source("alone", "tiny", "mean", any_base=True).leaves


@pytest.mark.weekly
@pytest.mark.parametrize("base", TRAIN)
def test_a_run_of_before_goes_on_with_one_warning(place, base, capsys):
    for name in ("done", "cut"):
        path = Path(f"{name}-{base}", "config.json")
        config = json.loads(path.read_text())
        del config["base_files"], config["tokens_sha256"]
        path.write_text(json.dumps(config))
    swap_tokens(place / base)  # which it cannot know
    for words in (USE[base], ["finetune", "--resume", f"cut-{base}"]):
        assert main(words) == 0
        err = capsys.readouterr().err
        assert err.count("warning:") == 1 and "the weights alone" in err, err
    assert "base_files" in Run(Path(f"cut-{base}")).read_config()
    nudge(place / base)
    with command_raises(RunError, "base_sha256"):
        assert main(USE[base]) == 2


@pytest.mark.slow
def test_a_reader_that_reads_rows_otherwise_is_an_error(place, monkeypatch, capsys):
    """As another release of a package might, with all files as they were."""
    path = Path("cut-llama", "config.json")
    config = json.loads(path.read_text())
    config["versions"]["tokenizers"] = "0.1.0"
    edited(path, tokens_sha256="0" * 64, versions=config["versions"])
    with command_raises(RunError, "cut-llama", "tokens_sha256", "tokenizers 0.1.0 ->"):
        assert main(["finetune", "--resume", "cut-llama"]) == 2
    assert "trained with tokenizers '0.1.0'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_record_that_is_damaged_is_an_error(place):
    edited(Path("done-tiny", "config.json"), base_files=[1])
    with command_raises(RunError, "done-tiny/config.json", "base_files are [1]"):
        assert main(USE["tiny"]) == 2
    edited(Path("done-tiny", "config.json"), base_files={"config.json": [], "tokenizer.json": {}})
    with command_raises(RunError, "done-tiny", "config.json [], here absent"):
        assert main(USE["tiny"]) == 2


@pytest.mark.weekly
def test_a_cell_of_a_comparison_continues_on_its_own_base_alone(place, capsys):
    words = "compare --model tiny --train reviews.jsonl --text review --max-length 12 --epochs 2"
    words = [*f"{words} --batch-size 16 --limit 32 --seeds 0 1 --out all --recipes".split()]
    words += ["lora --rank 2 --learning-rates 1e-2"]
    with stopped(LabelledProblem, 3):
        assert main(words) == 143
    swap_tokens(place / "tiny")
    with command_raises(RunError, "all/cells", "tokenizer.json", "--out", "--any-base"):
        assert main(words) == 2
    assert main([*words, "--any-base"]) == 0
    assert "tokenizer.json" in capsys.readouterr().err
    first, second = (Run(path).read_config() for path in sorted(Path("all/cells").iterdir()))
    assert first["base_changes"] and "base_changes" not in second
    assert main(words) == 0


def differing(base, change):
    """What differs of a base after a change, as a run of before it names it."""
    was = record_of(str(base)).to_config()
    change(base)
    now = record_of(str(base))
    return record.changes(Run(base), was, now.to_config(), *now.weights)


def test_of_images_and_of_one_file(tmp_path):
    shutil.copytree(FIXTURES / "vit", tmp_path / "vit")
    edited(tmp_path / "vit" / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5], size=12)
    change = lambda base: edited(base / "preprocessor_config.json", image_mean=[0.5, 0.4, 0.5])  # noqa: E731
    expected = "preprocessor_config.json: mean [0.5, 0.5, 0.5], here [0.5, 0.4, 0.5]"
    assert differing(tmp_path / "vit", change) == [expected]
    remove = lambda base: (base / "preprocessor_config.json").unlink()  # noqa: E731
    assert "preprocessor_config.json: size [12, 12], here absent" in differing(
        tmp_path / "vit", remove
    )
    # A GGUF file has its tokenizer and its template inside.
    (tmp_path / "base.gguf").write_bytes(b"GGUF one")
    (found,) = differing(tmp_path / "base.gguf", lambda base: base.write_bytes(b"GGUF two"))
    assert found.startswith("weights (base.gguf, base_sha256) ")


@pytest.mark.parametrize("name", ["bert", "decoders/gpt_oss", "t5/t5", "towers/qwen3_5", "whisper"])
def test_the_configuration_of_every_kind_is_recorded(name):
    values = json.loads((FIXTURES / name / "config.json").read_text())
    found = record_of(str(FIXTURES / name)).files["config.json"]
    assert found["model_type"] == values["model_type"]
    assert ("eos_token_id" in found) == (name not in ("bert", "whisper"))


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    path, hashed = tmp_path / "model.safetensors", []
    digest = record.hashlib.file_digest
    counting = lambda *args: hashed.append(args) or digest(*args)  # noqa: E731
    monkeypatch.setattr(record.hashlib, "file_digest", counting)
    path.write_bytes(bytes(2**20))
    first = sha256_of(tmp_path)
    assert sha256_of(tmp_path) == first and len(hashed) == 1
    with path.open("r+b") as file:
        file.write(b"\1")
    assert sha256_of(tmp_path) != first and len(hashed) == 2


@pytest.mark.slow
def test_a_base_that_cannot_be_read_is_an_error_of_its_file(place):
    edited(place / "tiny" / "config.json", hidden_act="sine")
    with command_raises(BaseFileError, "tiny/config.json", "hidden_act='sine'"):
        assert main(USE["tiny"]) == 2


@pytest.mark.slow
def test_what_was_computed_by_the_base_before_is_computed_again(place):
    reference = Path("cut-tiny", "reference.safetensors")  # as a run of preferences has
    reference.touch()
    swap_tokens(place / "tiny")
    resume_run(Run(Path("cut-tiny")), Console(json=False), 0.0, any_base=True).unlock()
    assert not reference.exists()
