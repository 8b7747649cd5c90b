"""Regular expressions of unknown origin: what `re` says, in a bounded number of steps."""

import itertools
import random
import re

import pytest
from helpers.errors import raises

from adapters_jax.errors import UserError
from adapters_jax.files.expressions import LONGEST, matches, problem

pytestmark = pytest.mark.hostile
NAMES = [
    f"{prefix}{layer}.{module}"
    for prefix in ("model.layers.", "language_model.layers.", "visual.blocks.", "")
    for layer in (0, 7, 12, 23)
    for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.experts.3.down_proj", "norm", "attn.qkv")
]
WORDS = ["".join(word) for n in range(5) for word in itertools.product("ab.1", repeat=n) if word]
# Of the kinds that LLaMA-Factory, ms-swift, unsloth and PEFT's documentation write.
REAL = [
    r".*\.(q|v)_proj",
    r"^(?!.*visual).*(?:q_proj|up_proj|down_proj).*",
    r"^(language_model(?=\.).*\.(up_proj|q_proj|down_proj))$",
    r"(?:.*?(?:visual|vision).*?(?:attn|mlp).*?(?:qkv|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
    r"(?:self_attn|mlp)\.(?:(?:q_proj|up_proj)))",
    r"model\.layers\.(1|2[0-3]|[4-9])\.(self_attn\.q_proj|mlp.up_proj)",
    r"(?P<where>model|visual)\.[a-z]+\.\d{2}\..+",
    r"[^.]*\.[^.]*\.\d+\.[\w.]{,11}",
    r"model.layers.7.norm",
    r"",
]


@pytest.mark.parametrize("pattern", REAL)
def test_what_people_write_matches_as_in_re(pattern):
    expected = [bool(re.fullmatch(pattern, name)) for name in NAMES]
    assert [matches(pattern, name) for name in NAMES] == expected
    assert not problem(pattern)
    assert not pattern or (any(expected) and not all(expected))
    for form in (r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)"):
        whole = form.replace("{}", pattern)
        expected = [bool(re.match(whole, name)) for name in NAMES]
        assert [matches(pattern, name, form) for name in NAMES] == expected


def drawn(chance, depth):
    """A regular expression."""
    if depth == 0:
        return chance.choice(
            ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", "1", "^", "$", r"\b"]
        )
    inner, other = drawn(chance, depth - 1), drawn(chance, depth - 1)
    repeat = chance.choice(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "??", "{0}"])
    made = [inner, inner + other, inner + other, f"({inner}|{other})", f"(?:{inner}|{other})"]
    made += [f"(?={inner}){other}", f"(?!{inner}){other}", f"({inner}){repeat}"]
    return chance.choice([*made, f"{inner}(?:{other})*"])


def test_any_expression_matches_as_in_re():
    chance, read = random.Random(0), 0
    for _ in range(400):
        pattern = drawn(chance, 3)
        if problem(pattern):
            continue
        read += 1
        for word in chance.sample(WORDS, 40):
            assert matches(pattern, word) == bool(re.fullmatch(pattern, word)), (pattern, word)
    assert read > 250


@pytest.mark.parametrize(
    "pattern",
    ["(([a-z]|[a-z_.0-9])+)+!", "(a*)*b", "(a|a)*(a|a)*c", "(.*a){20}!", "(?:a?){25}a{25}!"],
)
def test_what_takes_re_for_ever_has_an_end(pattern):
    assert not matches(pattern, "a" * 400)
    assert matches(f"(?:{pattern})?a+", "a" * 400)


@pytest.mark.parametrize(
    "pattern",
    ["(((a{1,1000}){1,1000}){1,1000})", "(.*a.{30}|.*b.{31})*c", "(?:(?:.*a){2,30}.*b){2,30}"],
)
def test_what_takes_too_many_steps_is_refused(pattern):
    with raises(UserError, repr(pattern), "too many steps", "names of the modules"):
        for seed in range(100):
            matches(pattern, "".join(random.Random(seed).choices("ab", k=90)))


@pytest.mark.parametrize(
    ("pattern", "data"),
    [
        ("(", "position 0"),
        ("a{99999999999}", "too large"),
        (f"a{{{'9' * 5000}}}", "digits"),
        ("(" * 2000 + ")" * 2000 + "*", "((("),
        (r"(a)\1", r"\1"),
        (r"(?P<n>a)(?P=n)", "group of another kind"),
        ("(?i)a", "group of another kind"),
        ("(?<=a)b", "group of another kind"),
        ("(?#a)b*", "group of another kind"),
        ("(?>a*)b", "group of another kind"),
        ("a*+b", "possessive"),
        ("(?:(?=a)b)*", "repeats a lookahead"),
        (r"\x41+", r"\x"),
        (r"a+\B", r"\B"),
        ("[[a]+", "within another"),
        ("[a--b]+", "within another"),
        ("a*" * LONGEST, LONGEST),
    ],
)
def test_what_is_not_supported_is_named(pattern, data):
    assert str(data) in problem(pattern)
    assert len(problem(pattern)) < 700
