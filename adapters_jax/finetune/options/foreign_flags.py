"""Flags and keys of other libraries' training scripts, and what our commands call them.

They are those of transformers, TRL, axolotl and LLaMA-Factory. It is asked once one has failed. For
settings of methods there is `adapters_jax.files.spelling`.
"""

from adapters_jax.files.spelling import OURS

# The fields of our commands by the flags of other training scripts.
FLAGS = {
    "lr": "learning_rate",
    "lora_r": "rank",
    "lora_rank": "rank",
    "lora_dropout": "adapter_dropout",
    "lora_target_modules": "targets",
    "lora_bias": "bias",
    "use_dora": "dora",
    "alora_invocation_tokens": "invocation",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "train_file": "train",
    "validation_file": "dev",
    "test_file": "test",
    "text_column": "text",
    "text_column_name": "text",
    "text_column_names": "text",
    "label_column": "label",
    "label_column_name": "label",
    "max_seq_length": "max_length",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulate",
    "warmup_ratio": "warmup",
    "max_grad_norm": "clip",
    "output_dir": "runs",
    "resume_from_checkpoint": "resume",
    "max_train_samples": "limit",
    "max_seq_len": "max_length",
    "num_virtual_tokens": "prompt_length",
    "prefix_length": "prompt_length",
    "adapter_layers": "last",
    "block_size": "max_length",
    "run_name": "name",
    "steps": "max_steps",
    "train_on_inputs": "turns all, of conversations",
    "eval_steps": "evaluations, the number in an epoch",
    "save_steps": "checkpoint_every",
    "dataset_name": "train FILE, or hub:USER/NAME",
    "bf16": "dtype bfloat16",
    "fp16": "dtype float16",
    "load_in_8bit": "quantize int8",
    "load_in_4bit": "quantize nf4",
    "early_stopping_patience": "patience",
    "base": "model",
    "adapter": "method",
    "finetuning_type": "method",
    "lora_target": "targets",
    "datasets": "train",
    "dataset": "train",
    "test_datasets": "test",
    "eval_dataset": "dev",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "micro_batch_size": "batch_size",
    "gradient_accumulation": "accumulate",
    "warmup_steps": "warmup, the part of all steps",
    "sample_packing": "pack",
    "packing": "pack",
    "max_samples": "limit",
    "interleave_probs": "mix",
    "evals_per_epoch": "evaluations",
    "flash_attention": "attention",
    "flash_attn": "attention",
    "pref_loss": "loss",
    "pref_beta": "beta",
    "rl": "loss",
    "fsdp": "mesh",
    "deepspeed": "mesh",
    "adapter_name_or_path": "init_from",
    "lora_model_dir": "init_from",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "optim": "optimizer",
    "report_to": "track",
    "wandb": "track wandb",
    "use_wandb": "track wandb",
    "tensorboard": "track tensorboard",
    "use_tensorboard": "track tensorboard",
    "mlflow": "track mlflow",
    "use_mlflow": "track mlflow",
    "trackio": "track trackio",
}
# Flags of theirs that name what a training does here anyway, or that have nothing like them.
_UNNEEDED = {
    "finetune trains, scores dev and test, and keeps the best adapter": (
        "do_train do_eval do_predict stage load_best_model_at_end eval_strategy "
        "evaluation_strategy save_strategy"
    ),
    "--method names the method": "use_peft peft_type",
    "the model and the columns say the task, or --task": "task_type lora_task_type",
    "an encoder's head always trains; a recipe (--recipe) trains other modules": (
        "modules_to_save lora_modules_to_save"
    ),
    "a run's metrics.jsonl and report.html have every step": "logging_steps plot_loss",
    "--track tensorboard writes to the directory of the run": "logging_dir",
    "WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME or TRACKIO_PROJECT names the project of --track": (
        "project wandb_project wandb_run_id mlflow_experiment_name trackio_project_name"
    ),
    "MLFLOW_TRACKING_URI names the server of --track mlflow": "mlflow_tracking_uri",
    "WANDB_MODE=offline keeps what --track wandb writes here": "wandb_mode",
    "--name names a new run": "overwrite_output_dir overwrite_cache",
    "adapters-jax push uploads a finished run": "push push_to_hub hub_model_id",
    "--accumulate saves memory": "gradient_checkpointing",
    "only the completion or the assistant's turns count in the loss": (
        "completion_only_loss assistant_only_loss train_on_responses_only roles_to_train"
    ),
    "lora adapts all linear layers of a decoder": "lora_target_linear",
    "the chat template is the model's own": "chat_template",
    "JAX_PLATFORMS=cpu in the environment chooses the CPU": "use_cpu",
    "a tenth of the rows is kept for dev, unless --dev names a file": "val_set_size val_size",
}
UNNEEDED = {name: text for text, names in _UNNEEDED.items() for name in names.split()}


def field_of(flag: str) -> str | None:
    """The field of our commands that a flag of another library's scripts means; None if none.

    After the field may come its value, or a remark.

    Example:
        >>> field_of("--lora-r"), field_of("--target_modules"), field_of("--rank")
        ('rank', 'targets', None)
        >>> field_of("--load_in_4bit")
        'quantize nf4'
    """
    name = _as_name(flag)
    return FLAGS.get(name) or (OURS[name][0] if name in OURS else None)


def unneeded(flag: str) -> str | None:
    """Why a training here needs no flag of another library's scripts; None of other flags.

    Example:
        >>> unneeded("--use_peft"), unneeded("--rank")
        ('--method names the method', None)
    """
    return UNNEEDED.get(_as_name(flag))


def _as_name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")
