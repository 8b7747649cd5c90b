"""Losses, rewards and margins are those of TRL's trainers on the same weights and tokens.

TRL adds to ORPO's loss the cross-entropy of the whole preferred sequence, with its prompt; the
paper, and we, that of the completion. So its loss is compared without that part.
"""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from adapters_jax.finetune.data.batches import Batches
from adapters_jax.finetune.data.packing import Example, sequence
from adapters_jax.finetune.models.decoder import load_decoder
from adapters_jax.finetune.tasks.preference_problem import Objective, pair_log_probs, sides_of

WHY = "needs trl: pip install 'adapters-jax[interop-test]'"
trl = pytest.importorskip("trl", reason=WHY)
torch = pytest.importorskip("torch", reason=WHY)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORDS = [f"w{i}" for i in range(40)]
RNG = np.random.default_rng(0)
BETA = {"dpo": 0.3, "ipo": 0.2, "orpo": 0.4, "kto": 0.3}


def said(least, most):
    return " ".join(RNG.choice(WORDS, RNG.integers(least, most)))


PAIRS = [
    {"prompt": said(2, 6) + " ", "chosen": said(1, 7), "rejected": said(1, 7)} for _ in range(6)
]
JUDGED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 3 == 0}
    for i, row in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two Llamas that transformers wrote, the policy and the reference, and their tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("trl")
    vocab = {word: i for i, word in enumerate(["<pad>", "<end>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(vocab), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
            pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(place / name)
        tokens = {"pad_token": "<pad>", "eos_token": "<end>"}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens).save_pretrained(place / name)
    return place


def theirs(loss, place):
    """A batch of TRL's trainer, and the loss and the metrics that it computes of it."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    policy, reference = (
        AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)
        for name in ("policy", "reference")
    )
    settings = {
        "output_dir": str(place / loss), "per_device_train_batch_size": 6, "beta": BETA[loss],
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False,
    }  # fmt: skip
    kind, config, more = {
        "dpo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "sigmoid"}),
        "ipo": (trl.DPOTrainer, trl.DPOConfig, {"loss_type": "ipo"}),
        "orpo": (ORPOTrainer, ORPOConfig, {}),
        "kto": (trl.KTOTrainer, trl.KTOConfig, {}),
    }[loss]
    trainer = kind(
        model=policy,
        args=config(**settings, **more),
        train_dataset=Dataset.from_list(JUDGED if loss == "kto" else PAIRS),
        processing_class=AutoTokenizer.from_pretrained(place / "policy"),
        **({} if loss == "orpo" else {"ref_model": reference}),
    )
    policy.eval()
    batch = next(iter(trainer.get_train_dataloader()))
    if loss == "orpo":
        value, metrics = trainer.get_batch_loss_metrics(policy, batch)
        return batch, float(value) - metrics["nll_loss"], metrics
    value = trainer.compute_loss(policy, batch)
    (metrics,) = (each for each in trainer._metrics.values() if each)
    return batch, float(value), {name: found[-1] for name, found in metrics.items() if found}


def examples(batch, prefix=""):
    """The prompt and the completion of each sequence of TRL's batch."""
    found = []
    for ids, there, learnt in zip(
        *(batch[f"{prefix}{name}"] for name in ("input_ids", "attention_mask", "completion_mask")),
        strict=True,
    ):
        there, learnt = there.bool(), learnt.bool()
        found.append(Example(ids[there & ~learnt].tolist(), ids[learnt].tolist()))
    return found


def pairs_of(loss, batch):
    """The two sequences of each row of TRL's batch."""
    if loss == "kto":
        return list(zip(examples(batch), examples(batch, "KL_"), strict=True))
    if loss == "orpo":
        for side in ("chosen", "rejected"):
            batch[f"{side}_completion_mask"] = batch[f"{side}_labels"] != -100
        return list(zip(examples(batch, "chosen_"), examples(batch, "rejected_"), strict=True))
    both = examples(batch)
    half = len(both) // 2
    return list(zip(both[:half], both[half:], strict=True))


@pytest.mark.parametrize("loss", BETA)
def test_losses_rewards_and_margins_are_those_of_trl(loss, place):
    batch, value, expected = theirs(loss, place)
    pairs = pairs_of(loss, batch)
    rows = [sequence(pair) for pair in pairs]
    (ours,) = Batches(rows, None, len(rows), None, (64,))
    assert all(0 not in each.ids and each.completion[-1] == 1 for pair in pairs for each in pair)
    read = nnx.jit(pair_log_probs, static_argnums=(2, 3))
    policy, reference = (
        read(load_decoder(place / name)[1], ours, 8, 4) for name in ("policy", "reference")
    )
    ours |= {
        "tokens": np.array([[len(each.completion) for each in pair] for pair in pairs], np.float32),
        "reference": reference,
    }
    if loss == "kto":
        ours["desirable"] = np.asarray(batch["label"], np.float32)
        ours["sides"] = sides_of(ours["desirable"], ours["weight"])
    objective = Objective(loss, BETA[loss])
    found = float(objective.losses(policy, ours).mean())
    if loss == "orpo":
        found -= float(-(policy[:, 0] / ours["tokens"][:, 0]).mean())
    assert found == pytest.approx(value, abs=1e-5)
    names = {"rewards_chosen": "chosen", "rewards_rejected": "rejected", "margin": "margins"}
    names |= {} if loss == "kto" else {"accuracy": "accuracies"}
    metrics = objective.metrics(jnp.asarray(policy), ours)
    for mine, other in names.items():
        assert float(metrics[mine]) == pytest.approx(float(expected[f"rewards/{other}"]), abs=1e-5)
