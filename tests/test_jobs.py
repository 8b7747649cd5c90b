"""The job files: what two of their processes start is one run, and the schedulers' own schemas."""

import argparse
import importlib
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import adapters_jax as aj

ROOT = Path(__file__).parent.parent
JOBS = ROOT / "examples" / "jobs"
NODE = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def documents(name):
    return [*yaml.safe_load_all((JOBS / name).read_text())]


def container(name):
    """The container of a Kubernetes job's pods."""
    (job,) = documents(name)
    if job["kind"] == "TrainJob":
        return job["spec"]["trainer"]
    (pods,) = job["spec"]["replicatedJobs"]
    (found,) = pods["template"]["spec"]["template"]["spec"]["containers"]
    return found


def shell(name):
    """What a container runs, as a line for the shell."""
    made = container(name)
    return shlex.join([*made["command"], *made["args"]])


def words_of_xpk():
    text = (JOBS / "gke-xpk.sh").read_text().replace("\\\n", "")
    return shlex.split(text, comments=True)


def slices(i, port):
    """What GKE writes into the one pod of each of two slices."""
    return {
        "JAX_FORCE_TPU_INIT": "1",  # jax asks only machines with chips
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(i),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
        "JAX_COORDINATOR_PORT": str(port),
    }


def trainer(i, port):
    """What Kubeflow's plugin for jax writes into a pod."""
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_COORDINATOR_PORT": str(port),
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(i),
        "JAX_DISTRIBUTED_BACKEND": "gloo",
    }


def sky(i, port):
    ips = "localhost\nlocalhost\n"
    return {"SKYPILOT_NODE_IPS": ips, "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(i)}


def slurm(i, port):
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(port),
    }


def command_of_slurm(name):
    text = (JOBS / name).read_text()
    assert text.count("srun --kill-on-bad-exit=1 ") == 1
    return text.replace("srun --kill-on-bad-exit=1 ", "")


def command_of_ray(_):
    """A worker, which Ray joins with the others before it calls the function."""
    program = (
        "import os, sys, types, jax; from unittest.mock import MagicMock; "
        "sys.path[:0] = ['examples', 'examples/jobs']; "
        "sys.modules |= {n: MagicMock() for n in ('ray', 'ray.train', 'ray.train.v2', "
        "'ray.train.v2.jax')}; import ray_trainer; ray_trainer.trainer(); "
        "config = ray_trainer.JaxTrainer.call_args.kwargs['train_loop_config']; "
        "jax.distributed.initialize(os.environ['ADDRESS'], 2, int(os.environ['RANK'])); "
        "flags = [f.replace('gs://my-bucket', os.environ['BUCKET']) for f in config['flags']]; "
        "ray_trainer.train({'flags': [*flags, '--steps', '2']})"
    )
    return shlex.join(["python", "-c", program])


def ray(i, port):
    """On GKE, whose variables are there too."""
    pods = {"TPU_WORKER_ID": str(i), "TPU_WORKER_HOSTNAMES": "localhost,localhost"}
    return {"ADDRESS": f"localhost:{port}", "RANK": str(i), "JAX_FORCE_TPU_INIT": "1", **pods}


STARTS = {
    "gke-jobset.yaml": (shell, slices),
    "kubeflow-trainjob.yaml": (shell, trainer),
    "skypilot.yaml": (lambda name: documents(name)[0]["run"], sky),
    "slurm.sbatch": (command_of_slurm, slurm),
    "ray_trainer.py": (command_of_ray, ray),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture
def start(tmp_path):
    """Starts a command of a job file in the repository, as one process of a job does."""
    (tmp_path / "libtpu.py").write_text("def get_library_path(): return 'none'\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    bucket = tmp_path.as_uri()  # a store whose objects are files

    def start(text, environment, port):
        text = re.sub(r"(\w+://my-bucket/)?runs/first", f"{bucket}/runs/first --steps 2", text)
        text = text.replace(":1234", f":{port}")
        own = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "XLA_FLAGS": ""}
        own |= {"PYTHONPATH": f"{ROOT}:{tmp_path}", "BUCKET": bucket}
        return subprocess.Popen(
            ["bash", "-c", text],
            cwd=ROOT,
            env={**os.environ, **NODE, **own, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def losses(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return re.findall(r"step +(\d) +loss ([\d.]+)", out), "on 2 devices" in out


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The losses of both devices in one process."""
    place = tmp_path_factory.mktemp("alone")
    flags = ["--run", place, "--mesh", "fsdp=-1", "--batch", "32", "--steps", "2"]
    own = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    command = [sys.executable, "examples/finetune_llama_sharded.py", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **NODE, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return re.findall(r"step +(\d) +loss ([\d.]+)", done.stdout)


@pytest.mark.witness("gke-jobset.yaml", "slurm.sbatch")
@pytest.mark.weekly
@pytest.mark.parametrize("name", STARTS)
def test_two_processes_of_a_job_are_one_run(name, start, alone, tmp_path):
    command, scheduler = STARTS[name]
    port = free_port()
    both = [start(command(name), scheduler(i, port), port) for i in range(2)]
    (first, whole), (other, _) = map(losses, both)
    assert whole and not other, "one process speaks for both"
    assert [step for step, _ in first] == ["1", "2"] == [step for step, _ in alone]
    for (_, loss), (_, expected) in zip(first, alone, strict=True):
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    recipe, arrays = aj.read_adapter(tmp_path / "runs" / "first" / "adapter")
    assert recipe == aj.lora(8) and arrays


def test_the_files_fit_each_other_and_the_page_shows_them():
    page = (ROOT / "docs" / "guides" / "jobs.md").read_text()
    for path in JOBS.glob("*.*"):
        assert f"jobs/{path.name}" in page
        assert ("finetune_llama_sharded" in path.read_text()) == (path.name != "gke-kueue.yaml")
    assert words_of_xpk()[-2:] == ["--command", shell("gke-jobset.yaml").replace("'", "")]
    flavor, cluster, local = documents("gke-kueue.yaml")
    (job,) = documents("gke-jobset.yaml")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    (group,), (pods,) = cluster["spec"]["resourceGroups"], job["spec"]["replicatedJobs"]
    (quota,) = group["flavors"]
    template = pods["template"]["spec"]
    hosts = pods["replicas"] * template["parallelism"]
    ((chip, chips),) = container("gke-jobset.yaml")["resources"]["limits"].items()
    assert quota["resources"] == [{"name": chip, "nominalQuota": hosts * chips}]
    assert group["coveredResources"] == [chip]
    assert quota["name"] == flavor["metadata"]["name"]
    assert flavor["spec"]["nodeLabels"] == template["template"]["spec"]["nodeSelector"]


def check_known(given, known, where=""):
    """Whatever a file says is in what its schema made of it."""
    pairs = given.items() if isinstance(given, dict) else enumerate(given)
    for key, value in pairs:
        if isinstance(given, dict):
            assert key in known, f"{where}/{key} is not in the schema"
        if isinstance(value, dict | list):
            check_known(value, known[key], f"{where}/{key}")
        else:
            assert value == known[key], f"{where}/{key}"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("gke-jobset.yaml", "JobsetV1alpha2JobSet"),
        ("kubeflow-trainjob.yaml", "TrainerV1alpha1TrainJob"),
    ],
)
def test_kubernetes_objects_fit_the_schemas_of_their_controllers(name, model):
    models = pytest.importorskip("kubeflow_trainer_api.models")
    (job,) = documents(name)
    check_known(job, getattr(models, model).from_dict(job).to_dict())
    job["spec"]["replicas"] = 2
    with pytest.raises(AssertionError, match="replicas"):
        check_known(job, getattr(models, model).from_dict(job).to_dict())


@pytest.mark.filterwarnings("default")  # of other libraries' code
def test_skypilot_reads_its_file(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(JOBS / "skypilot.yaml"))
    (resource,) = task.resources
    assert task.num_nodes == 2 and resource.accelerators == {"H100": 8}


@pytest.mark.filterwarnings("default")
def test_xpk_reads_its_flags():
    parsers = pytest.importorskip("xpk.parser.core")
    parser = argparse.ArgumentParser()
    parsers.set_parser(parser)
    program, *flags = words_of_xpk()
    read = parser.parse_args(flags)
    assert program == "xpk" and (read.tpu_type, read.num_slices) == ("v6e-16", 2)


@pytest.mark.filterwarnings("default")
def test_rays_trainer_takes_its_settings(monkeypatch):
    pytest.importorskip("ray.train.v2.jax")
    monkeypatch.syspath_prepend(JOBS)
    scaling = importlib.import_module("ray_trainer").trainer().scaling_config
    assert scaling.total_resources["TPU"] == 16  # Ray also compares workers with the topology
