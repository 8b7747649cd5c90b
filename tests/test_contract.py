"""What holds for every built-in method, through both APIs, on every kind of model."""

import functools

import jax
import pytest
from helpers.contract import CASES, DOORS, SUBJECTS, VARIANTS, shaken

from adapters_jax.testing import checks


@functools.cache
def build(door, case, variant="plain", **options):
    return DOORS[door](CASES[case], **VARIANTS[variant], **options)


@pytest.fixture(params=map("-".join, SUBJECTS))
def subject(request):
    """A model of one API, with one method, in one form; and the case it is made from."""
    door, case, variant = request.param.split("-")
    made = build(door, case, variant)
    made.case, made.variant = CASES[case], variant
    return made


def test_start_count_file_and_merge(subject):
    checks.starts_as_the_base(subject, subject.case.away)
    checks.counts(subject, subject.case)
    if subject.variant in ("plain", "scan"):
        checks.counts_shapes(subject)
    checks.goes_through_files(subject)
    checks.merges(subject)


def test_steps_move_adapters_and_nothing_else(subject):
    checks.trains_its_leaves_alone(subject)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("door", DOORS)
def test_adapters_vmap_over_one_base(door, case):
    checks.runs_under_vmap(build(door, case))


@pytest.mark.parametrize("variant", ["plain", "scan"])
@pytest.mark.parametrize("case", CASES)
def test_both_apis_compute_the_same(case, variant):
    checks.computes_the_same(build("linen", case, variant), build("nnx", case, variant))


@pytest.mark.parametrize("case", CASES)
def test_layers_stack_and_their_leaves_are_sharded(case):
    unrolled = build("linen", case, "plain", layers=3)
    checks.stacks(unrolled, build("linen", case, "scan"))
    checks.shards(unrolled)


@pytest.mark.parametrize("door", DOORS)
def test_without_jit_the_output_is_the_same(door):
    subject = build(door, "together")
    adapters = shaken(subject.adapters)
    jitted = jax.jit(subject.run)(adapters, subject.frozen)
    checks.close(subject.run(adapters, subject.frozen), jitted, 1e-5, "the output without jit")
