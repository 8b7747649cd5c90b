"""The cookbook's DPO on a file of pairs, since its own command reads the Hub's alone."""

import chz
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig


def main(
    model_name: str,
    renderer_name: str,
    learning_rate: float,
    base_url: str,
    log_path: str,
    pairs: str,
) -> None:
    common = ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=model_name,
        renderer_name=renderer_name,
        max_length=200,
        batch_size=8,
    )
    rows = DPODatasetBuilderFromComparisons(
        common_config=common, comparison_builder=ComparisonBuilderFromJsonl(train_path=pairs)
    )
    train_dpo.main(
        train_dpo.Config(
            model_name=model_name,
            renderer_name=renderer_name,
            learning_rate=learning_rate,
            base_url=base_url,
            log_path=log_path,
            dataset_builder=rows,
            recipe_name="dpo",
            lora_rank=8,
            num_epochs=8,
            evaluator_builders=[],
            save_every=0,
            eval_every=0,
        )
    )


if __name__ == "__main__":
    chz.entrypoint(main)
