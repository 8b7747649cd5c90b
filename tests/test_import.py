"""The modules that `import adapters_jax` imports."""

import ast
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import adapters_jax as aj
from adapters_jax.finetune.cli.main import COMMANDS
from adapters_jax.finetune.models.bert import BERT_BASE

EXTRAS = (
    *("matplotlib", "tokenizers", "grain", "sklearn", "huggingface_hub", "gguf", "qwix"),
    *("jinja2", "platformdirs"),
)
APPLICATION = ("cyclopts", *EXTRAS)
WORK = {"jax", "flax", "numpy", "optax", "orbax"}
WITHOUT = f"""
import sys
sys.modules |= dict.fromkeys({EXTRAS})  # importing them raises an error
from adapters_jax.finetune.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def command(tmp_path):
    """Runs a command in an empty directory and process, without the extras' packages."""
    environment = {**os.environ, "ADAPTERS_JAX_CACHE": str(tmp_path / "cache")}

    def run(*words):
        line = [sys.executable, "-c", WITHOUT, *words]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


@pytest.mark.witness("minilm-36864")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        # Of all linear layers: queries and outputs, keys and values, the feed-forward layers.
        ("Llama-3.2-1B-Instruct", 16 * 4 * (2 * 2 * 2048 + 2 * 2560 + 3 * (2048 + 8192))),
        ("minilm", 12 * 4 * (384 + 384)),  # a pinned model, which is not in the cache
        ("here", 24 * 4 * (768 + 768)),
    ],
)
def test_audit_needs_neither_the_extras_nor_weights(command, tmp_path, model, adapters):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "config.json").write_text(json.dumps(asdict(BERT_BASE)))
    done = command("audit", "--model", model, "--method", "lora", "--rank", "4", "--json")
    assert (done.returncode, done.stderr) == (0, "adapters-jax audit: importing jax\n")
    assert json.loads(done.stdout)["adapter_parameters"] == adapters
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_command_that_needs_an_extra_says_so_in_one_line(command, tmp_path):
    done = command("predict", "runs/mine", "text")
    assert done.returncode == 2
    first, line = done.stderr.splitlines()
    assert first == "adapters-jax predict: importing jax"
    assert "pip install" in line and "[finetune]'" in line
    assert line.count("adapters-jax predict") == 1
    done = command("audit", "--model", "me/mine", "--method", "lora")
    assert done.returncode == 2 and "huggingface_hub" in done.stderr


@pytest.mark.slow
def test_models_needs_no_extra(command):
    done = command("models", "bert-base")
    assert (done.returncode, done.stderr) == (0, "adapters-jax models: importing jax\n")
    assert "108,891,648" in done.stdout


def imported_by(code):
    """The modules that are imported at the end of a program in a process of its own."""
    code = f"import contextlib, io, sys\nprinted = io.StringIO()\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.slow
def test_help_and_completion_import_nothing_of_the_work():
    """Each command's help in turn: one that imports jax would leave it imported for the others."""
    helps = "".join(f"    assert main([{name!r}, '--help']) == 0\n" for name in COMMANDS)
    imported = imported_by(
        "from adapters_jax.finetune.cli.main import main\n"
        "with contextlib.redirect_stdout(printed):\n"
        "    assert main(['--help']) == main(['--version']) == 0\n"
        f"{helps}"
        "    assert main(['completion', 'bash']) == 0\n"
    )
    assert "adapters_jax.finetune.cli.finetune" in imported
    assert not imported & {*WORK, *EXTRAS}


@pytest.mark.slow
def test_a_wrong_flag_is_found_before_the_work_is_imported():
    for words in (["finetune", "--rnk", "3"], ["methods", "--json", "--markdown"], ["chat"]):
        code = f"from adapters_jax.finetune.cli.main import main\nassert main({words}) == 2"
        assert not imported_by(code) & WORK


def test_what_files_hold_is_shown_without_jax(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,0\n")
    words = ["data", str(tmp_path / "rows.csv")]
    code = (
        "from adapters_jax.finetune.cli.main import main\n"
        "with contextlib.redirect_stdout(printed), "
        f"contextlib.redirect_stderr(printed):\n    assert main({words}) == 0\n"
        "assert 'importing' not in printed.getvalue(), printed.getvalue()"
    )
    assert "jax" not in imported_by(code)


@pytest.mark.slow
def test_a_model_is_audited_without_the_kernels_of_accelerators():
    """Pallas takes a fifth as long to import as jax."""
    imported = imported_by("import adapters_jax.finetune.shapes")
    assert "adapters_jax.finetune.models.parts.kernels" in imported
    assert not any(name.startswith("jax.experimental.pallas.") for name in imported)


@pytest.mark.slow
def test_the_package_itself_imports_nothing_until_a_name_is_used():
    assert not imported_by("import adapters_jax\nadapters_jax.__version__") & WORK
    assert imported_by("import adapters_jax\nadapters_jax.lora") >= {"jax", "flax", "numpy"}


@pytest.mark.slow
def test_a_function_is_no_module_whatever_was_imported_before():
    """A module of the package with a function's name would be found in its place."""
    modules = {each.name for each in pkgutil.iter_modules(aj.__path__)}
    values = {name: getattr(aj, name) for name in modules & {*aj.__all__}}
    assert values == {name: sys.modules[f"adapters_jax.{name}"] for name in values}
    code = (
        "from adapters_jax.auditing import Audit\nimport adapters_jax.suggesting\n"
        "import adapters_jax as aj\nassert callable(aj.audit) and callable(aj.suggest)"
    )
    assert "adapters_jax.api" in imported_by(code)


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'lorra'"):
        _ = aj.lorra
    assert not any(hasattr(aj, name) for name in ("a.b", "linen.none", ".", ""))
    assert {"lora", "nnx", "__version__"} <= {*dir(aj)}


def test_the_core_imports_nothing_of_the_application():
    imported = imported_by("import adapters_jax\nadapters_jax.lora")
    assert "adapters_jax.nnx" in imported
    assert not imported & {
        *APPLICATION,
        "adapters_jax.finetune",
        "adapters_jax.finetune.data",
        "adapters_jax.finetune.inference",
        "adapters_jax.finetune.models",
        "adapters_jax.finetune.tasks",
    }


GGUF = {f"adapters_jax.finetune.gguf.{name}" for name in ("adapters", "header", "tensors")}
OF_OTHERS = {"adapters_jax.files.adapterhub", "adapters_jax.files.peft", *GGUF}


@pytest.mark.slow
def test_our_own_adapters_and_rows_need_no_code_of_other_libraries_formats(tmp_path):
    """A format's code is imported when one of its files is read, written or promised."""
    lora = aj.LoRA("query", 2)
    leaves = {"a": np.ones((4, 2), np.float32), "b": np.ones((2, 4), np.float32)}
    aj.save_adapter(tmp_path / "lora", {"query": {"lora": leaves}}, lora)
    (tmp_path / "rows.csv").write_text("text,label\na,1\nb,0\n")
    imported = imported_by(
        "from pathlib import Path\n"
        "import jax.numpy as jnp\n"
        "from flax import nnx\n"
        "import adapters_jax as aj\n"
        "import adapters_jax.finetune.cli.finetune, adapters_jax.finetune.runs.job\n"
        "import adapters_jax.finetune.inference\n"
        "from adapters_jax.finetune.data.readers import read_file\n"
        "from adapters_jax.finetune.formats import every_file, format_of\n"
        "class Model(nnx.Module):\n"
        "    def __init__(self):\n"
        "        self.query = nnx.Linear(4, 4, rngs=nnx.Rngs(0))\n"
        "    def __call__(self, x):\n"
        "        return self.query(x)\n"
        f"lora = Path({str(tmp_path / 'lora')!r})\n"
        "aj.load_adapter(lora, Model(), example_inputs=(jnp.ones((1, 4)),))\n"
        "assert format_of(lora).name == 'native' and every_file()\n"
        f"read_file({str(tmp_path / 'rows.csv')!r})\n"
    )
    assert "adapters_jax.finetune.formats.native" in imported
    assert not imported & OF_OTHERS


@pytest.mark.slow
def test_a_lora_of_peft_needs_no_code_of_other_methods_and_formats(tmp_path):
    imported = imported_by(
        "import numpy as np\n"
        "import adapters_jax as aj\n"
        "from adapters_jax.files.peft import load_peft, save_peft\n"
        "base = {'query': {'kernel': np.ones((4, 4)), 'bias': np.ones(4)}}\n"
        "leaves = {'query': {'lora': {'a': np.ones((4, 2)), 'b': np.ones((2, 4))}}}\n"
        "names = {'q_proj': 'query'}\n"
        f"saved = save_peft({str(tmp_path / 'a')!r}, aj.LoRA('query', 2), leaves, names, base)\n"
        "load_peft(saved, names, base)\n"
        "from adapters_jax.finetune.formats.base import Adapter, BaseModel\n"
        "from adapters_jax.finetune.formats import FORMATS\n"
        "encoder = BaseModel('mine', 'encoder', names, '', base, aj.BaseIdentity(), '')\n"
        "adapter = Adapter(aj.Recipe(aj.LoRA('query', 2)), {})\n"
        "(problem,) = FORMATS['gguf'].problems(adapter, encoder)\n"
        "assert 'encoder' in problem\n"
    )
    assert not imported & {
        *GGUF,
        "adapters_jax.files.adapterhub",
        "adapters_jax.files.peft.ia3",
        "adapters_jax.files.peft.prompts",
    }


@pytest.mark.slow
def test_importing_the_commands_starts_no_backend():
    code = (
        "from adapters_jax.finetune.cli import compare, finetune, serve; import jax._src.xla_bridge"
    )
    code += " as bridge; print(bridge._backends)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "{}\n"), done.stderr


def test_type_checkers_see_the_names_alone():
    """A `__getattr__` that they see makes every misspelt name an `Any`."""
    module = ast.parse(Path(aj.__file__).read_text())
    functions = {node.name for node in module.body if isinstance(node, ast.FunctionDef)}
    assert "__getattr__" not in functions
    [lazy] = [node for node in module.body if isinstance(node, ast.If)]
    assert ast.unparse(lazy.test) == "TYPE_CHECKING"
    assert [node.name for node in lazy.orelse] == ["__getattr__"]
