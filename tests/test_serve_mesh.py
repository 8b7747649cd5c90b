"""A server on a mesh: what tenants train and what is sampled is that of one device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.commands import command_raises
from helpers.tiny import write_llama

from adapters_jax.distributed.mesh import ShardingError
from adapters_jax.finetune.cli import serve
from adapters_jax.finetune.cli.main import main

HERE = Path(__file__).parent
LAYOUTS = ("data=4,model=2", "data=2,fsdp=2,model=2")


@pytest.fixture(scope="module", params=LAYOUTS)
def found(request):
    """A layout of eight devices, and what `helpers.served_mesh` finds on one device and there."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": path, "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, HERE / "helpers" / "served_mesh.py", json.dumps([None, request.param])],
        env={**os.environ, **quick},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    alone, mesh = map(json.loads, done.stdout.strip().splitlines())
    return request.param, alone, mesh


@pytest.mark.weekly
def test_tenants_and_samples_are_those_of_one_device(found):
    _, alone, mesh = found
    for name, numbers in alone["trained"].items():  # losses and norms
        np.testing.assert_allclose(mesh["trained"][name], numbers, rtol=1e-5)
    for mine, own in zip(mesh["adapters"], alone["adapters"], strict=True):
        for path, leaf in own.items():
            np.testing.assert_allclose(mine[path], leaf, atol=5e-5)
    for mine, own in zip(mesh["sampled"], alone["sampled"], strict=True):
        assert mine["ids"] == own["ids"]
        np.testing.assert_allclose(mine["logprobs"], own["logprobs"], atol=5e-5)
    assert len({str(each["ids"]) for each in alone["sampled"]}) == 4  # the adapters do something


@pytest.mark.slow
@pytest.mark.witness("data=2,fsdp=2,model=2")
def test_the_base_and_the_rows_are_split_and_nothing_compiles_again(found):
    layout, alone, mesh = found
    assert set(alone["parts"].values()) == {1}
    assert min(mesh["parts"].values()) >= 2  # every leaf, norms too
    axes = "('data', 'fsdp')" if "fsdp" in layout else "'data'"
    assert set(mesh["caches"]) == {f"P({axes},)"}
    assert mesh["compiled"] == []
    # Of eight devices; two axes split rows within groups, and a group has two.
    assert mesh["flops"] < alone["flops"] * (0.5 if "fsdp" in layout else 0.15)
    assert len(mesh["refused"]) == 3
    assert all("6" in text and "into 4 parts" in text for text in mesh["refused"].values())


@pytest.mark.parametrize(
    ("mesh", "error", "data"),
    [
        ("data=2", ShardingError, ("data=2", "1 devices", "data=1")),
        ("rows=1", ShardingError, ("rows", "data, fsdp, model")),
        ("two", ShardingError, ("two", "NAME=SIZE")),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(tmp_path, mesh, error, data):
    base = write_llama(tmp_path / "llama")
    with command_raises(error, *data):
        assert main(["serve", str(base), "--port", "0", "--mesh", mesh]) == 2


@pytest.mark.parametrize(
    ("rows", "axes", "group"),
    [
        (16, None, 4),
        (6, None, 2),
        (16, {"data": 4, "model": 2}, 4),
        (16, {"data": 8}, 2),  # eight groups, one a device
        (8, {"fsdp": 8}, 1),
        (16, {"data": 2, "fsdp": 4}, 8),  # whose rows are split
    ],
)
def test_a_mesh_splits_the_groups_of_rows_or_the_rows_of_a_group(rows, axes, group):
    assert serve._group(rows, axes and SimpleNamespace(shape=axes)) == group
