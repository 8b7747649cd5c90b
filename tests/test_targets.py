"""The pattern language: every construct, and the data in its errors."""

import itertools
import random
import re

import pytest
from helpers.errors import raises

from adapters_jax.errors import TargetError
from adapters_jax.targets import (
    _unmatched,
    as_patterns,
    either,
    failures,
    matches,
    nearest,
    require_match,
)

LAYERS = [f"layer_{i}/attention/{name}" for i in range(3) for name in ("query", "key", "value")]
MEANT = {
    "query": (["query"], ["layer_0/query", "query/kernel", "queryx", "xquery", ""]),
    "layer_0/query": (["layer_0/query"], ["layer_0", "layer_0/query/x", "layer_00/query"]),
    "*": (["a", "layer_0"], ["", "a/b"]),
    "*/b": (["a/b"], ["b", "a/a/b", "a/b/c"]),
    "a/*/c": (["a/b/c"], ["a/c", "a/b/b/c"]),
    "layer_*": (["layer_0", "layer_"], ["layer", "layer_0/x"]),
    "*_1*": (["h_1", "h_10", "_1"], ["h_2"]),
    "**": (["", "a", "a/b/c"], []),
    "**/b": (["b", "a/b", "a/a/b"], ["", "a/b/c", "ab"]),
    "a/**": (["a", "a/b", "a/b/c"], ["", "b", "ab"]),
    "a/**/c": (["a/c", "a/b/c", "a/b/b/c"], ["a", "c", "a/bc"]),
    "**/a/**": (["a", "b/a", "a/b", "b/a/b"], ["b", "ba"]),
    "**/a/**/b": (["a/b", "x/a/x/b"], ["b/a"]),
    "a**": (["a", "abc"], ["a/b", "ba"]),
    "{a,b}": (["a", "b"], ["ab", "a,b", ""]),
    "{a}": (["a"], ["b"]),
    "x{,_1}": (["x", "x_1"], ["x_2"]),
    "{query, value}": (["query", "value"], [" value"]),
    "**/{query,value}/kernel": (["query/kernel", "a/value/kernel"], ["a/key/kernel"]),
    "{a/b,c}/d": (["a/b/d", "c/d"], ["a/d", "b/d"]),
    "{*_norm,ln*}/scale": (["out_norm/scale", "ln_1/scale"], ["norm/scale", "a/ln/scale"]),
    "{**/a,b/**}": (["a", "x/y/a", "b", "b/c"], ["ab", "x/b", "a/x"]),
    "a/{**,x}/b": (["a/b", "a/x/b", "a/y/z/b"], ["b"]),
    "{a,{b,c}d}": (["a", "bd", "cd"], ["b", "ad"]),
    "{a,b}_{0,1}": (["a_0", "a_1", "b_0", "b_1"], ["a_2", "a"]),
    "{a|b}": (["a", "b"], ["ab", "a|b", ""]),
    "{a | b}/c": (["a/c", "b/c"], [" b/c", "c"]),
    "{a,b|c}": (["a", "b", "c"], ["b|c", "a,b"]),
    "{a|{b,c}d}": (["a", "bd", "cd"], ["b", "ad"]),
    "**/mlp/{output/dense|output}": (["mlp/output", "a/mlp/output/dense"], ["mlp/dense"]),
    "a,b": (["a,b"], ["a", "b"]),
    "a.b": (["a.b"], ["axb"]),
    "a+(b)[c]^$|?\\d": (["a+(b)[c]^$|?\\d"], ["aab", "a+(b)c", "a"]),
    "a|b": (["a|b"], ["a", "b"]),
    "Query": (["Query"], ["query"]),
}


@pytest.mark.parametrize("pattern", MEANT)
def test_a_pattern_means_these_paths_and_not_those(pattern):
    meant, other = MEANT[pattern]
    assert [path for path in meant if not matches(pattern, path)] == []
    assert [path for path in other if matches(pattern, path)] == []


PATHS = ("a", "b/x", "b/y", "c_0", "c_1", "d")
UNMATCHED = {  # a pattern: what of it matches none of the paths
    "{a,d}": [],
    "{a,e}": ["'e' of target '{a,e}'"],
    "{a,e,f,d}": ["'e' of", "'f' of"],
    "{a|e}": [],
    "{e|a|f}": [],
    "{e|f}": ["target '{e|f}'"],
    "{e,f}": ["target '{e,f}'"],
    "{a,e|f}": ["'e|f' of"],
    "{a,e|d}": [],
    "{a, e }": ["'e' of"],
    "{a,}": ["'' of"],
    "{a}": [],
    "{e}": ["target '{e}'"],
    # An expansion matches or not; a part is matched where any expansion with it is.
    "{b,c}{/x,_0}": [],
    "{b,c}{/x,_2}": ["'c' of", "'_2' of"],
    "{b,c}{/x|_2}": ["'c' of"],
    "{b|c}{/x|_2}": [],
    # Nested: only the outermost part that fails is named, and nothing within a part not taken.
    "{a,b/{x,y}}": [],
    "{a,b/{x,z}}": ["'z' of"],
    "{a,b/{z,w}}": ["'b/{z,w}' of"],
    "{a|b/{z,w}}": [],
    "{a|b/{x,w}}": ["'w' of"],
    "{d,{a,{e,b/x}}}": ["'e' of"],
    # Wildcards, and commas and bars that are in no brace.
    "**/{x,z*}": ["'z*' of"],
    "{**,e}": ["'e' of"],
    "{*_0,*_2}": ["'*_2' of"],
    "a,e": ["target 'a,e'"],
    "a|e": ["target 'a|e'"],
}


@pytest.mark.parametrize("pattern", UNMATCHED)
def test_every_part_of_a_brace_must_match(pattern):
    lines = failures("LoRA", (pattern,), PATHS)
    expected = UNMATCHED[pattern]
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert line.startswith(f"LoRA: {part}")
    whole = failures("LoRA", (pattern,), PATHS, parts=False)
    assert whole == [line for line in lines if "' of target" not in line]
    assert failures("LoRA", (either(pattern),), PATHS) == failures(
        "LoRA", (either(pattern),), PATHS, parts=False
    )


def test_either_needs_one_part_and_matches_the_same_paths():
    every = [path for meant, other in MEANT.values() for path in (*meant, *other)]
    for pattern in MEANT:
        loose = either(pattern)
        assert "," not in loose or "{" not in loose
        assert [matches(loose, p) for p in every] == [matches(pattern, p) for p in every], pattern


def test_a_part_that_matches_nothing_is_named_with_its_nearest_paths_and_reasons():
    unusable = {"layer_0/norm": "LayerNorm is not linear", "layer_0": None}
    data = ("LoRA: 'vlaue' of target '**/{query,vlaue,norm}'", ": layer_0/attention/value, ")
    data += ("LoRA: 'norm' of target ", ": layer_0/norm (LayerNorm is not linear)")
    with raises(TargetError, *data) as error:
        require_match("LoRA", ("**/{query,vlaue,norm}",), LAYERS, unusable)
    assert len(str(error.value).split("\n")) == 2
    with raises(TargetError, "'layer_0' of target", "layer_0 (it holds nothing"):
        require_match("LoRA", ("{layer_0,**/query}",), LAYERS, unusable)
    many = "{" + ",".join(f"n{i}" for i in range(99)) + ",**}"
    with raises(TargetError, "'n0' of", "'n11' of", "LoRA: other targets") as error:
        require_match("LoRA", (many,), LAYERS)
    assert len(str(error.value).split("\n")) == 13


OTHERS = {"layer_0/norm": "LayerNorm is not linear", "head": "no reason", "": None, "layer_2": None}
EXCLUSIONS = {  # patterns: what the message names; nothing where there is none
    ("**/query", "!layer_1/**"): (),
    ("**/query", "!head"): (),  # another method's module
    ("**/query", "!layer_0/norm"): (),  # a module that cannot be adapted
    ("**/query", "!**/key"): (),  # a module that no pattern matches
    ("**/query", "!layer_2"): (),
    ("**/query", "!{head,layer_1/**}"): (),
    ("**/query", "!{haed|head}"): (),
    ("**/query", "!haed"): ("target '!haed' matches nothing", ": head"),
    ("**/query", "!{haed,layer_1/**}"): ("'haed' of target '!{haed,layer_1/**}'", ": head"),
    ("**/query", "!layer_9/**"): ("'!layer_9/**'", "layer_2"),
    ("**/query", "!**"): ("'!**' excludes everything", "layer_0/attention/query"),
    ("**/query", "!layer_0/**", "!layer_{1,2}/**"): (
        "'!layer_0/**', '!layer_{1,2}/**' excludes everything",
        "layer_0/attention/query, layer_1/attention/query, layer_2/attention/query",
    ),
    ("**/qeury", "!head"): ("'**/qeury'",),
}


@pytest.mark.parametrize("patterns", EXCLUSIONS)
def test_an_exclusion_must_match_something_in_the_model(patterns):
    data = EXCLUSIONS[patterns]
    if not data:
        return require_match("LoRA", patterns, LAYERS, OTHERS)
    with raises(TargetError, *data) as error:
        require_match("LoRA", patterns, LAYERS, OTHERS)
    assert len(str(error.value).split("\n")) == 1


def by_definition(pattern, names):
    """The definition of `**` and `*` word for word, over lists of names."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(by_definition(pattern[1:], names[i:]) for i in range(len(names) + 1))
    if not names:
        return False
    one = pattern[0] in ("*", names[0]) or (pattern[0] == "a*" and names[0].startswith("a"))
    return one and by_definition(pattern[1:], names[1:])


def test_patterns_agree_with_the_definition_on_every_small_path():
    paths = [p for n in range(4) for p in itertools.product(("a", "b", "ab"), repeat=n)]
    patterns = [p for n in range(1, 4) for p in itertools.product(("a", "*", "**", "a*"), repeat=n)]
    for pattern, names in itertools.product(patterns, paths):
        got = matches("/".join(pattern), "/".join(names))
        assert got == by_definition(pattern, names), (pattern, names)


@pytest.mark.parametrize("pattern", ["{a", "a}", "}a{", "{a,{b}", "{a},b}", "**/{query,value"])
def test_unbalanced_braces(pattern):
    with raises(TargetError, repr(pattern), "{a,b}"):
        as_patterns(pattern, "LoRA")


@pytest.mark.parametrize("targets", [(), [], "", ("a", ""), None, 3, ("a", 3)])
def test_no_targets(targets):
    with raises(TargetError, "LoRA: ", f"targets={targets!r},", "'**/query'"):
        as_patterns(targets, "LoRA")


def test_targets_become_a_tuple():
    assert as_patterns("a", "LoRA") == ("a",)
    assert as_patterns(["a", "{b,c}"], "LoRA") == ("a", "{b,c}")
    assert as_patterns((p for p in "ab"), "LoRA") == ("a", "b")


def test_the_error_for_a_misspelt_pattern_has_its_nearest_paths():
    with raises(TargetError, "LoRA: ", "'**/qurey'", ": layer_0/attention/query, ") as error:
        require_match("LoRA", ("**/qurey",), LAYERS)
    assert str(error.value).endswith(
        ": layer_0/attention/query, layer_0/attention/key, layer_0/attention/value"
    )


@pytest.mark.parametrize("pattern", ["query", "attention/query", "{query,value}", "attention/*"])
def test_the_last_names_alone_are_found_deeper_down(pattern):
    with raises(TargetError, f"'{pattern}'", f"'**/{pattern}'", "layer_0/attention/") as error:
        require_match("LoRA", (pattern,), LAYERS)
    require_match("LoRA", (f"**/{pattern}",), LAYERS)
    assert str(error.value).endswith(" more")


@pytest.mark.parametrize(
    ("pattern", "proposed"),
    [
        ("!query", "!**/query"),
        ("!layer_0.attention.query", "!layer_0/attention/query"),
        ("!layer_0", "!layer_0/**"),
    ],
)
def test_a_pattern_that_excludes_is_answered_with_one(pattern, proposed):
    with raises(TargetError, repr(pattern), repr(proposed)):
        require_match("LoRA", ("**", pattern), LAYERS)
    require_match("LoRA", ("**", proposed), LAYERS)


def test_where_nothing_is_near_some_paths_are_shown():
    with raises(TargetError, f": {', '.join(LAYERS[:5])} and 4 more"):
        require_match("LoRA", ("zzz",), LAYERS)
    with raises(TargetError, "'zzz'") as error:
        require_match("LoRA", ("zzz",), [])
    assert str(error.value) == "LoRA: target 'zzz' matches nothing"
    with raises(TargetError, "'zzz'", ": (the model itself)"):
        require_match("LoRA", ("zzz",), [""])


def test_nearest_to_a_module_is_what_it_holds():
    paths = [*LAYERS, "head/bias", "head/kernel"]
    with raises(TargetError, "Nearest paths: head/bias, head/kernel; ", "'head/**'"):
        require_match("Unfreeze", ("head",), paths)


def test_every_failing_pattern_is_in_one_message():
    with raises(TargetError) as error:
        require_match("LoRA", ("**/query", "**/vlaue", "nowhere"), LAYERS)
    first, second = str(error.value).split("\n")
    assert first.startswith("LoRA: ") and "'**/vlaue'" in first
    assert first.endswith(": layer_0/attention/value, layer_0/attention/query")
    assert second.startswith("LoRA: ") and "'nowhere'" in second


def test_of_many_failing_patterns_the_first_are_in_the_message():
    many = [f"nowhere_{i}" for i in range(99)]
    for patterns in (many, ["**/query", *(f"!{name}" for name in many)]):
        with raises(TargetError) as error:
            require_match("LoRA", patterns, LAYERS)
        lines = str(error.value).split("\n")
        assert len(lines) == 13 and "nowhere_11'" in lines[11]
        assert lines[12].startswith("LoRA: ") and "nowhere" not in lines[12]
    with raises(TargetError) as error:
        require_match("LoRA", many[:12], LAYERS)
    lines = str(error.value).split("\n")
    assert [name in line for name, line in zip(many, lines, strict=False)] == [True] * 12


@pytest.mark.parametrize(
    "pattern",
    [
        "*a" * 40 + "b",
        "**/a*/" * 30 + "b",
        "{a,aa}" * 9 + "b",
        "{a|aa}" * 9 + "b",
        "*" * 60 + "b",
        "**/" * 60 + "b",
    ],
)
def test_no_pattern_is_slow(pattern):
    """A matcher that tries every split of a path would not end within the age of the universe."""
    assert not matches(pattern, "a" * 300)
    assert not matches(pattern, "/".join(["a" * 20] * 60))
    assert matches(pattern, "/".join(["a" * 45] * 30 + ["b"])) == ("/" in pattern)


def test_patterns_agree_with_plain_regular_expressions():
    """Text between wildcards is fixed at its first match, which changes no result."""
    plain = {"/**": "(?:/[^/]+)*", "*": "[^/]*"}
    draw, found = random.Random(0), 0
    parts = ("a", "b", "/", "*", "**", "/**/", "*a", "b*")
    for _ in range(8000):
        pattern = "".join(draw.choices(parts, k=draw.randint(1, 8)))
        names = [
            "".join(draw.choices("ab", k=draw.randint(1, 3))) for _ in range(draw.randint(0, 5))
        ]
        tokens = re.findall(r"/\*\*(?=/|$)|\*|[^*]", f"/{pattern}")
        expected = re.fullmatch(
            "".join(plain.get(t, t) for t in tokens), "".join(f"/{n}" for n in names)
        )
        assert matches(pattern, "/".join(names)) == (expected is not None), (pattern, names)
        found += expected is not None
    assert found > 200


@pytest.mark.parametrize(
    "pattern", ["{a,b}" * 40, "{,}" * 40, "{a|b}" * 40, "{a}" * 9000, "{a,{b,c}}" * 20]
)
def test_the_expansion_of_a_pattern_is_bounded(pattern):
    with raises(TargetError, pattern[:9], 65536):
        as_patterns(pattern, "LoRA")
    many = "layer_{" + ",".join(map(str, range(126))) + "}/*/{q,k,v,o,gate,up,down}"
    assert as_patterns(many, "LoRA") and matches(many, "layer_125/mlp/down")


@pytest.mark.parametrize(
    "pattern",
    [
        "{x,*}" * 9 + "z",
        "{,*}" * 9,
        "{a,{b,{c,{d,{e,{f,{g,{h,x_7*}}}}}}}}/x",
        "x_{0,1}{,*a}{,*b}" * 3,
    ],
)
def test_parts_are_found_without_trying_every_combination(pattern):
    """2,000 paths: work grows with the number of parts, not with that of their combinations."""
    tried = []
    paths = [f"x_{i}/x" for i in range(2000)]

    class Counted(list):
        def __iter__(self):
            tried.append(1)
            return super().__iter__()

    list(_unmatched(pattern, Counted(paths), True))
    assert len(tried) <= 1 + 2 * len(re.findall("[,{]", pattern))


def test_paths_that_cannot_be_used_are_named_with_the_reason():
    unusable = {f"layer_{i}/norm": "LayerNorm is not linear" for i in range(5)}
    shown = "layer_0/norm, layer_1/norm, layer_2/norm and 2 more (LayerNorm is not linear)"
    with raises(TargetError, "LoRA: ", "'{**/norm|final}'", f": {shown}, final (it did not run)"):
        require_match("LoRA", ("{**/norm|final}",), LAYERS, {**unusable, "final": "it did not run"})
    require_match("LoRA", ("**",), LAYERS, unusable)


def test_nearest_compares_the_last_names_of_the_pattern():
    assert nearest("**/attention/qeury", LAYERS)[0] == "layer_0/attention/query"
    assert nearest("layer_3/attention/value", LAYERS)[0] == "layer_2/attention/value"
    assert nearest("**/xyz/**", LAYERS) == []
    assert len(nearest("**/attention/*", LAYERS, count=2)) == 2
    assert nearest("**/{qeury,vlaue}", LAYERS, 9)[0] == "layer_0/attention/query"
    assert "layer_0/attention/value" in nearest("**/{qeury|vlaue}", LAYERS)
