"""One slice of 16 TPU v6e chips, on a Ray cluster whose nodes have this library.

    ray job submit --working-dir examples -- python jobs/ray_trainer.py

Ray joins the processes before it calls `train`, and starts all of them again after a failure; the
run then goes on from its last checkpoint.
"""

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.jax import JaxTrainer


def train(config: dict) -> None:
    import finetune_llama_sharded  # in the working directory; jax may not start before Ray's worker

    finetune_llama_sharded.main(config["flags"])


def trainer() -> JaxTrainer:
    flags = ["--run", "gs://my-bucket/runs/first", "--mesh", "fsdp=-1", "--batch", "32"]
    return JaxTrainer(
        train,
        train_loop_config={"flags": flags},
        scaling_config=ScalingConfig(
            use_tpu=True,
            num_workers=4,  # one for each host
            topology="4x4",
            accelerator_type="TPU-V6E",
            resources_per_worker={"TPU": 4},
        ),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=10)),
    )


if __name__ == "__main__":
    trainer().fit()
