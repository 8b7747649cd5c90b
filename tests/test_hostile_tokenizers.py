"""What a `tokenizer.json` may try, case by case; and real ones, which stay as they are."""

import base64
import json
import os
import random
import struct

import pytest
from helpers.errors import raises
from helpers.tiny import write_llama
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers import pre_tokenizers as splitters

from adapters_jax.errors import BaseFileError, UserError
from adapters_jax.finetune.base_files.backtracking import check_expression
from adapters_jax.finetune.data.batches import encode
from adapters_jax.finetune.pretrained.assets import ASSETS, cache_root
from adapters_jax.finetune.pretrained.decoder import load_decoder_tokenizer
from adapters_jax.finetune.pretrained.locate import read_tokenizer

pytestmark = pytest.mark.hostile

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
OTHERS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[^(\s|[.,!?…])]+",
    r"[\u4e00-\u9fa5\u3040-\u309f]+",
    r"[\p{Lu}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{M}&&[^\p{Han}]]+",
    r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
    r"\p{Nd}{1,3}(?=(?:\p{Nd}{3})*(?!\p{Nd}))",
    r"(?=(\d{3})+(?!\d))",
    r"a{20,}b{3}",
)
TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "ab", "▁", "##b", *"cdefghij"]
TEXTS = ["", "a", "ab  ab\n\nb 123 é 的字 \x00", "<s>A new</s> x", "\u0301ﷺ"]


def write(directory, values):
    (directory / "tokenizer.json").write_text(json.dumps(values))
    return directory


def plain(model=None, **parts):
    """The values of a file: those of a model of words, and the parts given."""
    model = model or {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    return {"version": "1.0", "added_tokens": [], "model": model, **parts}


def bpe(**changes):
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    return plain(model | changes)


def unigram(**changes):
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]], "unk_id": 0}
    return plain(model | changes)


def template(single, pair=(("Sequence", "A"), ("Sequence", "B")), **tokens):
    def pieces(named):
        return [{kind: {"id": name, "type_id": 0}} for kind, name in named]

    found = {"single": pieces(single), "pair": pieces(pair), "special_tokens": tokens}
    return plain(post_processor={"type": "TemplateProcessing", **found})


def special(name, *ids):
    return {name: {"id": name, "ids": ids, "tokens": [name] * len(ids)}}


def split(pattern):
    kinds = {"behavior": "Isolated", "invert": False}
    return plain(pre_tokenizer={"type": "Split", "pattern": {"Regex": pattern}, **kinds})


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


def added(content, **flags):
    kinds = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": 2, "content": content, **kinds, **flags}


def charsmap(units, texts):
    """A table of characters: its trie, and the texts behind it."""
    trie = struct.pack(f"<I{len(units)}I", 4 * len(units), *units)
    table = base64.b64encode(trie + texts).decode()
    return plain(normalizer={"type": "Precompiled", "precompiled_charsmap": table})


def trie(value=0, step=120, leaf=1):
    """A trie of 512 units that leads from the letter x, by a step of 120, to the leaf at 256."""
    units = [0] * 512
    units[0], units[256 ^ ord("x")] = 256 << 10, ord("x") | leaf << 8 | step << 10
    units[256] = 1 << 31 | value
    return units


A, X = ("Sequence", "A"), ("SpecialToken", "x")
HOSTILE = [
    ("a template without its token", template([X, A]), ["'x'"]),
    (
        "a template with more ids than tokens",
        template([X, A], x={"ids": [1, 1], "tokens": ["x"]}),
        ["'x'"],
    ),
    ("a template of a second text", template([("Sequence", "B")]), ["single", "'B'"]),
    ("a template that repeats a text", template([A, A]), ["single", "['A', 'A']"]),
    ("a template of 8 tokens", template([X, A], **special("x", *[1] * 8)), ["8", "7"]),
    ("a template with an id of no token", template([X, A], **special("x", 77)), ["77"]),
    (
        "a template of nothing",
        template([A]) | {"post_processor": {"type": "TemplateProcessing"}},
        ["single=None"],
    ),
    (
        "two templates",
        plain(
            post_processor={"type": "Sequence", "processors": [template([A])["post_processor"]] * 2}
        ),
        ["2 steps"],
    ),
    (
        "an end of no token",
        plain(post_processor={"type": "BertProcessing", "cls": ["a", 1], "sep": ["b", 9]}),
        ["9"],
    ),
    (
        "half an end",
        plain(post_processor={"type": "RobertaProcessing", "cls": ["a", 1], "sep": ["b"]}),
        ["['b']"],
    ),
    ("an expression", split("(a+)+b"), ["'(a+)+b'"]),
    ("a length of 0", plain(pre_tokenizer={"type": "FixedLength", "length": 0}), ["length=0"]),
    ("an unknown step", plain(pre_tokenizer={"type": "Frobnicate"}), ["'Frobnicate'", "ByteLevel"]),
    ("a step without a type", plain(normalizer={"lowercase": True}), ["lowercase"]),
    (
        "65 steps",
        plain(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}] * 65}),
        ["64"],
    ),
    (
        "replacements of replacements",
        plain(
            normalizer={
                "type": "Sequence",
                "normalizers": [replaced({"String": "a"}, "a" * 4)] * 7,
            }
        ),
        ["1.64e+04"],
    ),
    (
        "the same in two parts",
        plain(
            normalizer={
                "type": "Sequence",
                "normalizers": [replaced({"String": "a"}, "a" * 100)] * 2,
            },
            pre_tokenizer={"type": "ByteLevel"},
        ),
        ["normalizer and pre_tokenizer", "4e+04"],
    ),
    ("a long replacement", plain(decoder=replaced({"String": "a"}, "a" * 201)), ["content="]),
    ("a replacement everywhere", plain(normalizer=replaced({"Regex": "(?=a)"}, "b")), ["'(?=a)'"]),
    ("a number of 5000 digits", split("a{" + "9" * 5000 + "}"), []),
    ("another", plain(normalizer=replaced({"Regex": "b{3}?"}, "c")), ["'b{3}?'"]),
    ("a pattern that is none", plain(normalizer=replaced({"Glob": "*"}, "b")), ["Glob"]),
    (
        "a cut at the end",
        plain(decoder={"type": "Strip", "content": "a", "start": 0, "stop": 3}),
        ["stop=3"],
    ),
    ("no table of characters", charsmap([], b""), ["precompiled_charsmap"]),
    ("a trie that leads out", charsmap(trie(step=2**20), b"yy\0"), ["out of the table"]),
    ("a leaf that leads out", charsmap(trie(value=9), b"yy\0"), ["not the place"]),
    ("a leaf in a character", charsmap(trie(value=1), "é\0".encode()), ["not the place"]),
    ("texts that are none", charsmap(trie(), b"\xff"), ["0xff"]),
    ("a merge that is too long", bpe(vocab={"a": 0, "b": 1}), ["['a', 'b']"]),
    ("a merge that escapes hide", bpe(vocab={"a": 0, "b": 1, "\x00": 2}), ["['a', 'b']"]),
    ("a merge of three", bpe(merges=["a b ab"]), ["'a b ab'"]),
    ("a merge without its prefix", bpe(continuing_subword_prefix="##"), ["['a', 'b']"]),
    ("merges that are pieces", bpe(merges=[["a", -1.0]] * 5), ["no pairs"]),
    ("merges that are pairs of pieces", bpe(merges=[["a", -1.0]] * 4), []),
    ("chance", bpe(dropout=0.1), ["dropout=0.1"]),
    ("two tokens of one id", bpe(vocab={"a": 0, "b": 1, "ab": 1}), ["same id"]),
    ("an id of ten digits", bpe(vocab={"a": 0, "b": 2**32 - 1, "ab": 1}), ["vocab"]),
    ("no vocab", plain({"type": "BPE", "merges": []}), ["vocab"]),
    ("a number in the place of tokens", bpe(vocab=0), []),
    ("an unknown token that is none", bpe(unk_token="<none>"), ["'<none>'"]),
    ("no unknown token", plain({"type": "WordLevel", "vocab": {"a": 1}}), ["unk_token None"]),
    (
        "long words",
        plain(
            {
                "type": "WordPiece",
                "vocab": {"a": 1},
                "unk_token": "a",
                "max_input_chars_per_word": 10**9,
            }
        ),
        ["10" + "0" * 8],
    ),
    ("a piece of no character", unigram(vocab=[["<unk>", 0.0], ["", 0.0]]), ["0 to 5"]),
    ("a long piece", unigram(vocab=[["<unk>", 0.0], ["a" * 5000, 0.0]]), ["5000"]),
    ("a score beyond floats", unigram(vocab=[["<unk>", 0.0], ["a", 1e300]]), ["vocab"]),
    ("no unknown piece", unigram(unk_id=None), ["unk_id=None"]),
    ("an unknown piece behind the last", unigram(unk_id=2), ["unk_id=2"]),
    ("a long added token", plain(added_tokens=[{"content": "a" * 5000}]), ["added_tokens"]),
    (
        "an added token of nothing",
        plain(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})
        | {"added_tokens": [added(" ", normalized=True)]},
        ["leaves nothing", "' '"],
    ),
    ("no model", {"version": "1.0"}, ["no model"]),
]


@pytest.mark.parametrize(("values", "data"), [x[1:] for x in HOSTILE], ids=[x[0] for x in HOSTILE])
def test_hostile_files_are_errors(tmp_path, capfd, values, data):
    with raises(BaseFileError, tmp_path / "tokenizer.json", *data):
        read_tokenizer(write(tmp_path, values))
    assert capfd.readouterr().err == ""  # where a panic would write


@pytest.mark.parametrize(
    "text", ['{"model": {}, "model": {}}', "[" * 10**5, "[]", "", '{"model": 1']
)
def test_texts_that_are_no_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with raises(BaseFileError, tmp_path / "tokenizer.json"):
        read_tokenizer(tmp_path)


def test_a_name_with_escapes_is_no_way_around(tmp_path):
    values = bpe(vocab={"a": 0, "b": 1})
    text = json.dumps(values).replace('"vocab"', '"\\u0076ocab"')
    (tmp_path / "tokenizer.json").write_text(text)
    with raises(BaseFileError, "vocab"):
        read_tokenizer(tmp_path)
    more = {"vocab": {"a": 0, "b": 1, "ab": 2}}
    text = text.replace('"added_tokens": []', f'"added_tokens": [{json.dumps(more)}]')
    (tmp_path / "tokenizer.json").write_text(text)
    with raises(BaseFileError, "vocab"):
        read_tokenizer(tmp_path)


def test_padding_and_truncation_of_the_file_are_taken_away(tmp_path):
    padding = {"strategy": {"Fixed": 10**7}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "[UNK]"}
    cut = {"max_length": 1, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    write(tmp_path, plain(padding=padding, truncation=cut, pre_tokenizer={"type": "Whitespace"}))
    found = read_tokenizer(tmp_path)
    assert found.encode("a b a").ids == [1, 0, 1]
    assert encode(found, [("a b a", None)], 8)[0][0].input_ids.tolist() == [1, 0, 1]
    assert found.padding is None and found.truncation is None


def test_a_panic_is_an_error_and_an_interrupt_stays_one(tmp_path, monkeypatch):
    class PanicException(BaseException):
        pass

    write(tmp_path, plain())
    for raised, kind in (
        (PanicException("odd"), BaseFileError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):

        class Odd:
            @staticmethod
            def from_buffer(data, raised=raised):
                raise raised

        monkeypatch.setattr("tokenizers.Tokenizer", Odd)
        with pytest.raises(kind):
            read_tokenizer(tmp_path)


def test_a_table_of_characters(tmp_path):
    found = read_tokenizer(write(tmp_path, charsmap(trie(), b"yy\0")))
    assert found.normalizer.normalize_str("axb") == "ayyb"


def kinds():
    """Tokenizers of every kind of model, with the steps of real ones."""
    alphabet = sorted(splitters.ByteLevel.alphabet())
    byte = {token: i for i, token in enumerate([*alphabet, "ab", "<s>"])}
    ids = {token: i for i, token in enumerate(TOKENS)}
    ends = [("<s>", 1), ("</s>", 2)]
    both = {"single": "<s> $A </s>", "pair": "<s> $A </s> $B:1 </s>:1", "special_tokens": ends}
    scores = [(token, -float(i)) for i, token in enumerate(TOKENS)]
    llama3 = splitters.Sequence([splitters.Split(Regex(LLAMA3), "isolated"), splitters.ByteLevel()])
    t5 = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), "▁")])
    gemma = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made = {
        "gpt2": (models.BPE(byte, [("a", "b")]), None, splitters.ByteLevel(), None, None),
        "llama3": (
            models.BPE(byte, [("a", "b")], ignore_merges=True),
            normalizers.NFC(),
            llama3,
            processors.Sequence([processors.ByteLevel(), processors.TemplateProcessing(**both)]),
            decoders.ByteLevel(),
        ),
        "gemma": (
            models.BPE(ids, [("a", "b")], unk_token="<unk>", byte_fallback=True, fuse_unk=True),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
            splitters.Split(" ", "merged_with_previous"),
            processors.TemplateProcessing(**both),
            gemma,
        ),
        "bert": (
            models.WordPiece(ids, unk_token="<unk>"),
            normalizers.BertNormalizer(),
            splitters.BertPreTokenizer(),
            processors.BertProcessing(("</s>", 2), ("<s>", 1)),
            decoders.WordPiece(),
        ),
        "roberta": (
            models.BPE(byte, [("a", "b")], unk_token=""),
            None,
            splitters.Sequence([splitters.Digits(), splitters.ByteLevel()]),
            processors.RobertaProcessing(("ab", 256), ("<s>", 257)),
            decoders.ByteLevel(),
        ),
        "t5": (
            models.Unigram(scores, 0),
            t5,
            splitters.Metaspace(),
            processors.TemplateProcessing(**both),
            decoders.Metaspace(),
        ),
    }
    for name, (model, normalizer, splitter, processor, decoder) in made.items():
        tokenizer = Tokenizer(model)
        parts = {"normalizer": normalizer, "pre_tokenizer": splitter, "decoder": decoder}
        for part, value in (parts | {"post_processor": processor}).items():
            if value is not None:
                setattr(tokenizer, part, value)
        tokenizer.add_special_tokens([AddedToken("<s>", lstrip=True), "<mask>"])
        tokenizer.add_tokens([AddedToken("new", single_word=True)])
        yield name, tokenizer.to_str()


def real():
    """Files of tokenizers: those made here, and those of the pinned models."""
    yield from kinds()
    for asset in ASSETS.values():
        path = cache_root() / asset.folder / "tokenizer.json"
        if path.is_file():
            yield asset.name, path.read_text()


@pytest.mark.parametrize(("name", "text"), list(real()), ids=[name for name, _ in real()])
def test_real_tokenizers_stay_as_they_are(tmp_path, name, text):
    (tmp_path / "tokenizer.json").write_text(text)
    found, theirs = read_tokenizer(tmp_path), Tokenizer.from_str(text)
    theirs.no_padding()
    theirs.no_truncation()
    assert found.to_str() == theirs.to_str()
    for first in TEXTS:
        for second in (None, "b"):
            ours, same = found.encode(first, second), theirs.encode(first, second)
            assert (ours.ids, ours.offsets) == (same.ids, same.offsets)
            assert found.decode(ours.ids) == theirs.decode(ours.ids)


@pytest.mark.parametrize("pattern", [GPT2, LLAMA3, O200K, CL100K, *OTHERS])
def test_expressions_of_real_tokenizers(pattern):
    check_expression(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a+)+b", "(a*)*[bc]", r"\s*\s*x", "(?:a|aa){1,1000}b", "a?" * 30 + "a" * 30),
        *("(?:a|a)" * 30 + "b" for _ in "a"),
        *("a{1,9}" * 9 + "b" for _ in "a"),
        *("(?:(?:ab?)c)+d", "(?:a+){30,}", "a**b", "[ab]*(?!(?:a|b)*)", "a{1,3}+b"),
        *("(a+)+b{,}", "(a+)+{}", "a{15,1}" * 9 + "b", r"[\c[](a+)+b]", r"[[\C-[](a+)+b]"),
        *(r"(a)\1", r"(?<n>a)\k<n>", r"(a\g<0>?b)", "(?~a)", "(?(1)a)", "(?#a)", "(?i)a", r"\X"),
        *("(a", "[a", "+a", "(" * 100 + ")" * 100, "a" * 10_000),
    ],
)
def test_expressions_that_take_for_ever_or_are_not_known(pattern):
    with raises(UserError, "regular expression"):
        check_expression(pattern)


def expression(chance, depth=0):
    """A random expression."""
    inner = lambda: expression(chance, depth + 1)  # noqa: E731
    if depth > 3 or chance.random() < 0.35:
        return chance.choice(("a", "b", "[ab]", "[^b]", ".", r"\w", "c", "$", r"\b", "(?!a)"))
    form = chance.choice(
        (
            "{0}{1}",
            "{0}{1}",
            "(?:{0}|{1})",
            "(?={0})",
            "(?>{0})",
            "(?:{0})+",
            "(?:{0})*",
            "(?:{0})?",
            "(?:{0}){{2,}}",
            "(?:{0}){{1,3}}+",
            "[ab]*{0}",
            "a+{0}",
            "a?{0}",
            ".*?{0}",
            "b++{0}",
        )
    )
    return form.format(inner(), inner())


def test_expressions_that_are_accepted_end_soon():
    """Oniguruma panics after 10 million steps, which a text of 200 characters can take it to."""
    chance, accepted, refused = random.Random(0), 0, 0
    for _ in range(1500):
        pattern = expression(chance) + chance.choice(("c", "$", "(?!a)", ""))
        try:
            check_expression(pattern)
        except UserError:
            refused += 1
            continue
        accepted += 1
        try:
            splitter = splitters.Split(Regex(pattern), "isolated")
        except Exception:  # as of `$+`; reading a file raises our error then
            continue
        for text in ("a" * 200 + "c", "ab" * 100 + "c", "aab" * 70 + "!c"):
            splitter.pre_tokenize_str(text)
    assert accepted > 500 and refused > 100


def test_the_command_line_says_it_in_one_line(tmp_path, capfd):
    base = write_llama(tmp_path / "base")
    values = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(
        json.dumps(values | {"post_processor": template([X, A])["post_processor"]})
    )
    with raises(BaseFileError, base / "tokenizer.json", "'x'"):
        load_decoder_tokenizer(os.fspath(base))
    assert capfd.readouterr().err == ""
