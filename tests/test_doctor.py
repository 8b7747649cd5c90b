"""`adapters-jax doctor` says what is installed, and finds what is wrong."""

import json
import os
import subprocess
import sys

import jax
import optax
import pytest
from helpers.commands import command_raises

from adapters_jax.errors import UserError
from adapters_jax.finetune import doctor
from adapters_jax.finetune.cli.main import main
from adapters_jax.finetune.pretrained import assets


def problems(findings):
    return [each.problem for each in findings if each.problem]


def test_a_sound_installation(capsys):
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    found = {each["subject"]: each["found"] for each in json.loads(out)["findings"]}
    assert found["jax"] == jax.__version__
    assert found["devices"].startswith(f"{jax.device_count()} x cpu")
    assert {"a step in float32", "a step in bfloat16", "flax", "numpy"} <= found.keys()
    assert "nothing is wrong" in err


def test_versions_that_do_not_go_together(monkeypatch):
    real = doctor.version
    versions = {"jaxlib": "0.4.1", "libtpu": "0.0.1", "optax": None}

    def version(name):
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise doctor.PackageNotFoundError(name)
        return found

    stated = doctor.requires
    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", lambda name: stated(name) if name != "libtpu" else [])
    found = problems(doctor.packages())
    (of_jax,) = (each for each in found if each.startswith("jax "))
    assert "jaxlib" in of_jax and "0.4.1" in of_jax
    assert "libtpu==" in of_jax and "0.0.1 is installed" in of_jax
    assert "optax is missing" in found
    assert any(each.startswith("adapters-jax ") and "optax>=" in each for each in found)


@pytest.mark.witness("nvidia0-cuda", "vfio/0-tpu")
@pytest.mark.parametrize(
    ("file", "extra"), [("nvidia0", "cuda"), ("accel0", "tpu"), ("vfio/0", "tpu")]
)
def test_an_accelerator_that_jax_does_not_use(tmp_path, monkeypatch, file, extra):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    path = tmp_path / "dev" / file
    path.parent.mkdir(parents=True)
    path.touch()
    (found,) = problems(doctor.examine(tmp_path))
    assert f"/dev/{file}" in found
    assert f"[{extra}]'" in found
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (found,) = problems(doctor.examine(tmp_path))
    assert "unset JAX_PLATFORMS=cpu" in found


def test_a_damaged_file_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTERS_JAX_CACHE", str(tmp_path))
    assert [each.found for each in doctor.cache()] == ["not in the cache"] * len(assets.ASSETS)
    for name in assets.ASSETS["smollm2-135m"].files:
        path = tmp_path / "smollm2-135m-0.1.2" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (found,) = problems(doctor.cache())
    assert str(path.parent) in found and "SmolLM2-135M-Instruct.Q4_1.gguf, LICENSE" in found


def test_a_step_that_is_wrong(monkeypatch):
    sgd = optax.sgd
    monkeypatch.setattr(doctor.optax, "sgd", lambda rate: sgd(1.1 * rate))
    assert "not that of the formula" in doctor.step("float32").problem
    with command_raises(UserError, "a step in float32", "a step in bfloat16"):
        assert main(["doctor"]) == 2


@pytest.mark.weekly
def test_no_device_is_a_problem_and_no_traceback():
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    words = [sys.executable, "-m", "adapters_jax", "doctor"]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    assert "jax finds no device" in ran.stderr
    assert ran.stderr.count("\n") == 2  # the first line says that jax is imported
