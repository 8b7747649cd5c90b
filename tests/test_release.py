"""What a release consists of: workflows, metadata, public names and bounds of dependencies."""

import dataclasses
import importlib
import inspect
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import docstring_parser
import pytest
import yaml
from helpers.public import imported_by_pages, public_modules
from packaging.requirements import Requirement

import adapters_jax as aj

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = (ROOT / ".ci" / "run").read_text()
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PUBLIC = ROOT / "tests" / "public.txt"
PAIR = ("interop", "documentation")
# Packages whose docstrings name every argument, and have an example.
DESCRIBED = [
    "adapters_jax",
    *(
        f"adapters_jax.{name}"
        for name in (
            "linen",
            "nnx",
            "training.losses",
            "finetune.inference",
            "finetune.serving",
            "finetune.tasks",
            "methods",
            "testing",
            "files.peft",
            "files.adapterhub",
        )
    ),
]


def parts():
    """The parts that `.ci/run` takes."""
    return {
        word
        for line in re.findall(r'^(?:PARTS|MORE)="(.*)"', CI, re.M)
        for word in re.split(r"[ +]", line)
    }


def jobs(path):
    return yaml.safe_load(path.read_text())["jobs"]


def commands(job):
    """The lines that a job runs, once for each value of its matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for step in job.get("steps", []):
        line = step.get("run", "")
        names = re.findall(r"\$\{\{ *matrix\.(\w+) *\}\}", line)
        values = matrix[names[0]] if names else [""]
        yield from (re.sub(r"\$\{\{.*?\}\}", value, line) for value in values if line)


def test_every_part_of_ci_is_a_function_and_is_run_by_a_workflow():
    functions = set(re.findall(r"^(\w+)\(\) \{", CI, re.M))
    assert parts() <= functions
    run = {line for path in WORKFLOWS for job in jobs(path).values() for line in commands(job)}
    run = {line for line in run if not line.startswith("gh release create ")}
    assert run == {
        f".ci/run {part}" for part in parts() - {"newest"}
    }  # the matrix has all versions


def stubbed(root, functions):
    """A copy of `.ci/run` in which some parts are other functions."""
    shutil.copy(ROOT / "README.md", root)
    (root / ".ci").mkdir()
    script = root / ".ci" / "run"
    script.write_text(CI.replace("\nknown=", f"\n{functions}\nknown=", 1))
    return script


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_parts_that_run_at_the_same_time_all_run_and_each_can_fail(tmp_path):
    stubs = "checks() { echo checked; }\ninterop() { echo compared; }\n"
    stubs += "package() { false; echo afterwards; }"
    script = stubbed(tmp_path, stubs)
    executable(tmp_path / ".venv-uv" / "bin" / "uv", "exit 0")
    for words, fails in (
        (["interop+checks"], False),
        (["interop+package+checks"], True),
        (["package+interop", "checks"], True),
        (["interop+checks+nonsense"], True),
    ):
        done = subprocess.run(["bash", script, *words], capture_output=True, text=True)
        assert (done.returncode != 0) == fails, (words, done.stdout, done.stderr)
        assert ("compared" in done.stdout) == ("nonsense" not in words[0])
        assert ("checked" in done.stdout) == (not fails)
        assert "afterwards" not in done.stdout and ("== done" in done.stdout) == (not fails)


def test_parts_that_run_at_the_same_time_share_one_installer(tmp_path):
    script = stubbed(
        tmp_path,
        "\n".join(f'{part}() {{ environment {part} "$python" nothing; }}' for part in PAIR),
    )
    uv, pip = ".venv-uv/bin/uv", tmp_path / "pip"
    executable(pip, f"echo installed >> made; sleep 1; echo exit 0 > {uv}; chmod +x {uv}")
    executable(tmp_path / "bin" / "python3", f"mkdir -p $3/bin; cp {pip} $3/bin/pip")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", script, "+".join(PAIR)], check=True, env=environment)
    assert (tmp_path / "made").read_text().split() == ["installed"]


def test_a_release_fails_where_a_package_could_not_be_audited():
    assert re.search(r'pip-audit --strict .*-r "\$work/installed"', CI)
    assert re.search(r'pip freeze --exclude adapters-jax > "\$work/installed"', CI)


def test_what_ci_names_is_there():
    for name in re.findall(r"tests/[\w/]+\.(?:py|txt)", CI):
        assert (ROOT / name).exists(), name
    lists = re.findall(r'^(?:OLDEST|LIVE|NAMES|NEWEST)\+?="(.*)"', CI, re.M)
    assert len(lists) > 3
    for name in " ".join(lists).split():
        assert (ROOT / "tests" / f"test_{name}.py").exists(), name
    extras = {name for names in re.findall(r'"\.\[(.*?)\]"', CI) for name in names.split(",")}
    assert extras and extras <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_permissions_are_the_least(path):
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for uses in re.findall(r"uses: (.*)", path.read_text()):
        assert re.fullmatch(r"(\./\S+|[\w/-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+)", uses), uses
    for name, job in jobs(path).items():
        allowed = {"publish": {"id-token": "write"}, "release": {"contents": "write"}}
        assert job.get("permissions") == allowed.get(name), name
        most = 90 if name == "weekly" else 40
        assert "uses" in job or job["timeout-minutes"] <= most, name
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"] == {"persist-credentials": False}


def test_the_publishing_job_has_no_token_and_waits_for_the_tests():
    publish = jobs(ROOT / ".github" / "workflows" / "publish.yml")
    assert publish["build"]["needs"] == ["tests", "weekly"]
    assert publish["publish"]["needs"] == "build"
    assert publish["publish"]["environment"] == "pypi"
    assert "secrets" not in (ROOT / ".github" / "workflows" / "publish.yml").read_text()


def test_the_versions_of_python_are_the_same_everywhere():
    tested = jobs(ROOT / ".github" / "workflows" / "tests.yml")["tests"]["strategy"]["matrix"]
    named = re.findall(r":: Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert tested["python"] == named == ["3.11", "3.12", "3.13"]
    assert {name.split("-")[0] for name in tested["os"]} == {"ubuntu", "macos"}
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_the_oldest_releases_are_the_bounds():
    """`uv pip compile` of CONTRIBUTING.md writes the file anew."""
    lines = (ROOT / "tests" / "oldest.txt").read_text().split()
    pinned = dict(line.split("==") for line in lines)
    wrong, needs = [], [*PROJECT["dependencies"], f"{PROJECT['name']}[test]"]
    for text in needs:  # which grows by the extras that it names
        need = Requirement(text)
        if need.name == PROJECT["name"]:
            needs += [x for name in need.extras for x in PROJECT["optional-dependencies"][name]]
            continue
        (bound,) = need.specifier
        found = pinned.get(need.name.lower().replace("_", "-"), "nothing")
        same = found == bound.version or found.startswith(f"{bound.version}.")
        if bound.operator != ">=" or not same:
            wrong.append(f"{text}: {found}")
    assert not wrong


def test_the_public_names_are_those_of_the_policy():
    """The tables of CONTRIBUTING.md have the modules, `tests/public.txt` their names.

    Of the first table's packages these are `__all__`, of the second one's what pages import.
    """
    packages, modules = public_modules()
    names = {package: importlib.import_module(package).__all__ for package in packages}
    for module in modules:
        names[module] = [name for where, name in imported_by_pages() if where == module and name]
    found = [f"{module}.{name}" for module, several in names.items() for name in sorted(several)]
    assert found == PUBLIC.read_text().split()
    assert len(found) == len({*found})


def test_pages_import_from_public_modules():
    packages, modules = public_modules()
    imported = {module for module, _ in imported_by_pages()}
    assert imported <= {*packages, *modules}
    assert {*modules} <= imported, "no page imports from a module of the second table"


def test_every_public_name_is_there_and_described():
    for path in PUBLIC.read_text().split():
        module, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
        assert not callable(thing) or thing.__doc__, path


def arguments(thing):
    """The names of a callable's arguments; of a dataclass the fields that it is made of.

    What a class takes over from flax is left out, and nobody makes a protocol.
    """
    if getattr(thing, "_is_protocol", False):
        return []
    if not isinstance(thing, type):
        return list(inspect.signature(thing).parameters)
    flax = [parent for parent in thing.__mro__[1:] if parent.__module__.startswith("flax.")]
    taken = {name for parent in flax for name in inspect.signature(parent.__init__).parameters}
    taken |= {"parent", "name"} if flax else set()  # fields that linen gives each class
    if dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing) if field.init]
    else:
        names = list(inspect.signature(thing.__init__ if flax else thing).parameters)
    return [name for name in names if name not in taken]


@pytest.mark.parametrize("package", DESCRIBED)
def test_public_docstrings_name_every_argument_and_have_an_example(package):
    module, lacking = importlib.import_module(package), []
    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing) or (isinstance(thing, type) and issubclass(thing, BaseException)):
            continue
        text = inspect.getdoc(thing) or ""
        described = docstring_parser.google.parse(text).params  # of Args and of Attributes
        names = {x.lstrip("*") for each in described for x in each.arg_name.split(", ")}
        # `Method` describes those that all methods have.
        method = isinstance(thing, type) and issubclass(thing, aj.Method) and thing is not aj.Method
        names |= {"name", "train"} if method else set()
        lacking += [f"{name}: {each}" for each in arguments(thing) if each not in names]
        lacking += [] if ">>> " in text else [f"{name}: an example"]
    assert not lacking


def test_the_citation_has_what_its_format_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[name] for name in ("message", "title", "authors"))
    assert citation["license"] == PROJECT["license"]
    assert citation["version"] == aj.__version__


@pytest.mark.parametrize("path", [p for p in FORMS if p.stem != "config"], ids=lambda p: p.stem)
def test_issue_forms_have_what_their_format_needs(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"] and form["body"]
    assert all(each["type"] in ("textarea", "input") for each in form["body"])
    assert all(each["attributes"]["label"] for each in form["body"])
    assert len({each["id"] for each in form["body"]}) == len(form["body"])


@pytest.mark.parametrize("part", ["interop", "zoo", "tpu"])
@pytest.mark.parametrize(("installer", "left"), [(1, 1), (124, 0)], ids=["fails", "is slow"])
def test_only_a_slow_installation_is_left_out(tmp_path, part, installer, left):
    """An extra that cannot be installed fails the part, in place of ending it without a test."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    shutil.copy(ROOT / "README.md", tmp_path)
    for name, status in (
        (".venv-uv/bin/uv", installer),
        *((f"bin/{name}", 0) for name in ("python3.11", "python3.13")),
    ):
        executable(tmp_path / name, f"exit {status}")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    line = [tmp_path / ".ci" / "run", part]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert (done.returncode, "NOT RUN" in done.stdout) == (left, not left), done
