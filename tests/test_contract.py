"""The contract of every built-in method, in both APIs and on every kind of model."""

import functools

import jax
import pytest
from helpers.contract import APIS, CASES, SUBJECTS, VARIANTS, shaken

from adapters_jax.testing import checks


@functools.cache
def build(api, case, variant="plain", **options):
    return APIS[api](CASES[case], **VARIANTS[variant], **options)


# By default a variant has the methods whose shapes or whose code in it are their own.
CHOSEN = ("bottleneck", "dora", "ia3_embed", "llama_adapter", "lora_conv", "prefix", "together")
OWN = (  # in linen alone; tests of their own watch the layers of LoRA and IA3, LoHa, LoKr and OFT
    *("adalora", "compacter", "ia3", "lora_embed", "lora_slices", "loreft", "pissa"),
    *("prompt_tuning", "unfreeze", "vera"),
)
WITNESSES = {
    "linen-plain": (*CHOSEN, *OWN),
    "nnx-plain": CHOSEN,
    "linen-remat": ("prefix",),
    "nnx-bf16": ("llama_adapter",),
    "linen-scan": ("prefix",),
    "nnx-scan": ("bottleneck", "lora_conv"),
}


# Leaves of other kinds than those of CHOSEN.
TRAINED = {"linen-plain": (*CHOSEN, "adalora", "vera", "unfreeze")}


def subjects(witnesses=WITNESSES):
    """The witnesses in both APIs, and the others in linen, with which NNX is compared.

    The others are not tried in remat, where no method has code of its own.
    """
    for api, case, variant in SUBJECTS:
        chosen = case in witnesses.get(f"{api}-{variant}", ())
        if chosen or (api == "linen" and variant != "remat"):
            marks = [] if chosen else [pytest.mark.weekly]
            yield pytest.param(f"{api}-{case}-{variant}", marks=marks)


chosen = pytest.mark.parametrize(
    "case",
    [case if case in CHOSEN else pytest.param(case, marks=pytest.mark.weekly) for case in CASES],
)


@pytest.fixture(params=[*subjects()])
def subject(request):
    """The model of a case, in one API and variant."""
    api, case, variant = request.param.split("-")
    made = build(api, case, variant)
    made.case, made.variant = CASES[case], variant
    return made


def test_start_count_file_and_merge(subject):
    checks.starts_as_the_base(subject, subject.case.away)
    checks.counts(subject, subject.case)
    if subject.variant in ("plain", "scan"):
        checks.counts_shapes(subject)
    checks.goes_through_files(subject)
    checks.merges(subject)


@pytest.mark.parametrize("subject", [*subjects(WITNESSES | TRAINED)], indirect=True)
def test_steps_change_adapters_and_nothing_else(subject):
    checks.trains_its_leaves_alone(subject)


@pytest.mark.witness(
    "linen-bottleneck",
    "linen-dora",
    "linen-ia3_embed",
    "linen-llama_adapter",
    "linen-lora_conv",
    "linen-prefix",
    "linen-together",
    "nnx-bottleneck",
    "nnx-llama_adapter",
    "nnx-prefix",
)
@pytest.mark.parametrize(
    ("api", "case"), [(a, c) for a in APIS for c in CASES if a == "linen" or c in CHOSEN]
)
def test_adapters_vmap_over_one_base(api, case):
    checks.runs_under_vmap(build(api, case))


@pytest.mark.witness(
    "bottleneck",
    "compacter",
    "loreft",
    "dora",
    "adalora",
    "lora_slices",
    "lora_conv",
    "vera",
    "ia3_attention",
    "ia3_embed",
    "llama_adapter",
    "prefix",
    "prompt_tuning",
    "together",
)
@pytest.mark.parametrize("case", CASES)
def test_both_apis_compute_the_same(case):
    checks.computes_the_same(build("linen", case), build("nnx", case))


@chosen
def test_both_apis_compute_the_same_in_scanned_layers(case):
    checks.computes_the_same(build("linen", case, "scan"), build("nnx", case, "scan"))


@chosen
def test_layers_stack_and_their_leaves_are_sharded(case):
    unrolled = build("linen", case, "plain", layers=3)
    checks.stacks(unrolled, build("linen", case, "scan"))
    checks.shards(unrolled)


@pytest.mark.parametrize("api", APIS)
def test_without_jit_the_output_is_the_same(api):
    subject = build(api, "together")
    adapters = shaken(subject.adapters)
    jitted = jax.jit(subject.run)(adapters, subject.frozen)
    checks.close(subject.run(adapters, subject.frozen), jitted, 1e-5, "the output without jit")
