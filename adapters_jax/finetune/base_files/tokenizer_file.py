"""Reads a `tokenizer.json` of unknown origin with the package tokenizers, once it was checked.

The package trusts its files: a template that names no token, a length of 0 or a merge that is
longer than every token ends in a panic, which is no `Exception`; padding to 10 billion tokens or
replacements of replacements end the process. So the whole file is checked first. Each part must be
of a known kind, within bounds of what it makes of a text. The table of tokens and the merges are
nearly all of a file; they are only matched with a regular expression, since parsing them takes half
as long as the package takes to read the file.

Our code pads and cuts texts itself, so a tokenizer's own padding and truncation are taken away.

Reference: https://huggingface.co/docs/tokenizers/api/tokenizer
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from adapters_jax.errors import BaseFileError, UserError, shortened, shown
from adapters_jax.finetune.base_files.backtracking import check_expression
from adapters_jax.texts import parse_json

if TYPE_CHECKING:
    import tokenizers

MOST_REST = 2**24  # bytes beside tokens and merges; XLM-R's table of characters takes 300,000
MOST_STEPS = 64  # of each part
MOST_ADDED = 7  # tokens around a text, below the shortest row that a task makes
MOST_GROWTH = 2**13  # of a text, in characters; the steps of T5 have 66, those of some ALBERT 2592
LONGEST_TOKEN = 2**12  # bytes; a Unigram model looks for each of them at every character
LONGEST_WORD = 1000  # characters that a WordPiece model takes apart
_UNKNOWN = "\U00012000"  # a letter of cuneiform

_GAP = rb"[ \t\r\n]*+"
_TEXT = rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'
_SCORE = rb"-?[0-9]{1,6}+(?:\.[0-9]++)?+(?:[eE]-[0-9]++)?+"


def _several(*parts: bytes) -> bytes:
    one = _GAP + _GAP.join(parts) + _GAP
    return rb"(?:" + one + rb"(?:," + one + rb")*+)?+"


# Tokens have ids of at most 7 digits; those of a Unigram model are in order, and have scores.
_BULK = re.compile(
    rb'("(?:vocab|merges)"' + _GAP + rb":" + _GAP + rb")("
    rb"\{(?:" + _several(_TEXT, rb":", rb"[0-9]{1,7}+") + rb")\}"
    rb"|\[(?:" + _several(_TEXT) + rb")\]"
    rb"|\[(?:" + _several(rb"\[", _TEXT, rb",", _TEXT, rb"\]") + rb")\]"
    rb"|\[(?:" + _several(rb"\[", _TEXT, rb",", _SCORE, rb"\]") + rb")\])"
)


def read_tokenizer_file(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """Reads a `tokenizer.json`, without its padding and truncation; messages name the path.

    Raises:
        BaseFileError: it is not a tokenizer, or has a part that is not supported or out of bounds.
    """
    import tokenizers

    try:
        values = _checked(data)
        try:
            found = tokenizers.Tokenizer.from_buffer(data)
            found.no_padding()
            found.no_truncation()
            _check_found(found, values)
            found.decode(found.encode("a", _UNKNOWN).ids, skip_special_tokens=False)
        except UserError:
            raise
        # tokenizers raises nothing narrower, and a panic of Rust is no Exception.
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise UserError(str(error)) from error
    except UserError as error:
        raise BaseFileError(f"{str(path)!r} is not a tokenizer: {shortened(str(error))}") from error
    return found


def _checked(data: bytes) -> dict[str, Any]:
    """The checked values of a file, without its tokens and merges."""
    bulk: list[bytes] = []

    def number(found: re.Match[bytes]) -> bytes:
        bulk.append(found[2])
        return found[1] + str(len(bulk) - 1).encode()

    rest = _BULK.sub(number, data)
    if len(rest) > MOST_REST:
        raise UserError(f"it has {len(rest)} bytes beside tokens and merges, or they are no tables")
    try:
        values = parse_json(rest.decode("utf-8"))
    except ValueError as error:
        raise UserError(str(error)) from error
    model = values.get("model") if isinstance(values, dict) else None
    if not isinstance(model, dict):
        raise UserError("it has no model")
    tables: dict[str, Any] = {"merges": None}
    for name in {"vocab", "merges"} & {"vocab", *model}:
        # A file that has numbers here itself is none of a tokenizer, and tokenizers says so.
        if not _is_size(model.get(name), len(bulk) - 1):
            raise UserError(f"its {name} is no table of tokens with ids, scores or other tokens")
        tables[name] = bulk[model[name]]
    _check_model(model, **tables)
    _check_added(values.get("added_tokens"))
    _check_steps(values)
    return values


def _check_model(model: Mapping[str, Any], vocab: bytes, merges: bytes | None) -> None:
    if model.get("dropout"):
        raise UserError(f"dropout={shown(model['dropout'])} makes its tokens random, expected null")
    longest = model.get("max_input_chars_per_word", 0)
    if not _is_size(longest, LONGEST_WORD):
        raise UserError(f"max_input_chars_per_word={shown(longest)}, expected <= {LONGEST_WORD}")
    for name in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if not isinstance(text := model.get(name), str | None) or len(text or "") > 200:
            raise UserError(f"{name}={shown(text, 40)}, expected null or a short text")
    tokens = _loaded(vocab)
    if isinstance(tokens, list):
        _check_pieces(tokens, model.get("unk_id"))
        return
    if len(set(tokens.values())) < len(tokens):
        raise UserError("two tokens of its vocab have the same id")
    _check_unknown(tokens, model.get("unk_token"), "merges" in model)
    if merges is not None:
        _check_merges(tokens, merges, model.get("continuing_subword_prefix") or "")


def _loaded(table: bytes) -> Any:
    try:
        return json.loads(table)
    except ValueError as error:  # of an escape, which the expression above leaves to others
        raise UserError(str(error)) from error


def _check_pieces(pieces: list[Any], unknown: Any) -> None:
    """Raises UserError unless these are the pieces of a Unigram model, one of them unknown."""
    lengths = [len(piece[0]) if isinstance(piece, list) else 0 for piece in pieces]
    if not all(0 < length <= LONGEST_TOKEN for length in lengths):
        raise UserError(
            f"its pieces have {min(lengths)} to {max(lengths)} characters, expected 1 to "
            f"{LONGEST_TOKEN}"
        )
    if not _is_size(unknown, len(pieces) - 1):
        raise UserError(f"unk_id={shown(unknown)}, expected the id of one of {len(pieces)} pieces")


def _check_unknown(tokens: Mapping[str, int], unknown: Any, bytewise: bool) -> None:
    """Raises UserError if a character may come that is no token, and none stands for it."""
    from tokenizers import pre_tokenizers

    if bytewise and (unknown is None or tokens.keys() >= {*pre_tokenizers.ByteLevel.alphabet()}):
        return
    if unknown not in tokens:
        raise UserError(f"its unk_token {shown(unknown, 80)} is not in its vocab")


def _check_merges(tokens: Mapping[str, int], merges: bytes, prefix: str) -> None:
    """Raises UserError for a merge that is longer than every token, or lacks the prefix.

    Escapes only make a text longer than it is, so no merge is too long if none has more bytes than
    the longest token. Hardly any tokenizer needs the look at each merge.
    """
    lengths = _lengths(merges)
    in_pairs = merges[1:].lstrip().startswith(b"[")
    if in_pairs and len(lengths) % 2:
        raise UserError("its merges are no pairs")
    lengths = lengths[::2] + lengths[1::2] if in_pairs else lengths - 1  # without the space
    longest = max((len(token.encode()) for token in tokens), default=0)
    if not prefix and lengths.max(initial=0) <= longest:
        return
    for pair in _loaded(merges):
        parts = pair.split(" ") if isinstance(pair, str) else pair
        good = len(parts) == 2 and isinstance(parts[1], str) and parts[1].startswith(prefix)
        if not good or parts[0] + parts[1].removeprefix(prefix) not in tokens:
            raise UserError(f"its merge {shown(pair, 80)} makes no token")


def _lengths(table: bytes) -> np.ndarray:
    """The bytes of each text of a table, escapes included."""
    plain = table.replace(b"\\\\", b"..").replace(b'\\"', b"..")
    places = np.flatnonzero(np.frombuffer(plain, np.uint8) == ord('"'))
    return places[1::2] - places[::2] - 1


def _check_added(added: Any) -> None:
    for token in [] if added is None else added if isinstance(added, list) else [added]:
        text = token.get("content") if isinstance(token, dict) else None
        if not isinstance(text, str) or len(text) > LONGEST_TOKEN:
            raise UserError(f"added_tokens has {shown(token, 80)}, expected a token's content")


def _check_found(found: Any, values: Mapping[str, Any]) -> None:
    """Raises UserError for ids that no token has, and for added tokens that match everywhere."""
    for number in _ids(values.get("post_processor")):
        if found.id_to_token(number) is None:
            raise UserError(f"its post_processor adds the id {number}, which no token has")
    normalizer = found.normalizer
    for token in (values.get("added_tokens") or ()) if normalizer is not None else ():
        if token.get("normalized") and not normalizer.normalize_str(token["content"]):
            raise UserError(f"its normalizer leaves nothing of the token {shown(token, 80)}")


def _check_steps(values: Mapping[str, Any]) -> None:
    """Raises UserError unless all steps are known, and make little of a text together."""
    steps = {part: [*islice(_steps(part, values.get(part)), MOST_STEPS + 1)] for part in _PARTS}
    for part, found in steps.items():
        if len(found) > MOST_STEPS:
            raise UserError(f"its {part} has over {MOST_STEPS} steps")
    for parts in (("normalizer", "pre_tokenizer"), ("decoder",)):
        growth = math.prod(size for part in parts for _, size in steps[part])
        if growth > MOST_GROWTH:
            raise UserError(
                f"its {' and '.join(parts)} may make a text {growth:.3g} times as long, expected "
                f"at most {MOST_GROWTH} times"
            )
    adding = [size for kind, size in steps["post_processor"] if kind != "ByteLevel"]
    if len(adding) > 1 or sum(adding) > MOST_ADDED:
        raise UserError(
            f"its post_processor has {len(adding)} steps that add {sum(adding)} tokens, expected "
            f"one that adds at most {MOST_ADDED}"
        )


# What each kind of step does to a text: how many times as long it may get, or, of a post_processor,
# how many tokens it adds. A function checks the step's own values, and raises UserError.
_Step = float | Callable[[Mapping[str, Any]], float]


def _steps(part: str, values: Any, depth: int = 0) -> Iterator[tuple[str, float]]:
    """The kind of each step of a part, and what it does."""
    if values is None:
        return
    inner, known = _PARTS[part]
    kind = values.get("type") if isinstance(values, dict) else None
    if kind == "Sequence" and depth < 4 and isinstance(values.get(inner), list):
        for each in values[inner]:
            yield from _steps(part, each, depth + 1)
    elif isinstance(kind, str) and kind in known:
        step = known[kind]
        yield kind, step(values) if callable(step) else step
    else:
        named = shown(kind if isinstance(kind, str) else values, 80)
        raise UserError(f"its {part} is {named}, expected one of Sequence, {', '.join(known)}")


def _split(values: Mapping[str, Any], may_be_empty: bool = True) -> float:
    """Checks a pattern, which is a plain text or an expression."""
    pattern = values.get("pattern")
    kind, text = _only(pattern)
    if kind not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise UserError(f"pattern={shown(pattern, 80)}, expected a String or a Regex")
    if kind == "Regex":
        check_expression(text, may_be_empty)
    return 1


def _replaced(values: Mapping[str, Any]) -> float:
    # tokenizers loses count of characters where an expression matches between two of them.
    _split(values, may_be_empty=False)
    kind, text = _only(values["pattern"])
    size = len(_short(values, "content"))
    return max(1.0, size / len(text) if kind == "String" else size)


def _short(values: Mapping[str, Any], name: str) -> str:
    if not isinstance(text := values.get(name), str) or len(text) > 200:
        raise UserError(f"{name}={shown(text, 40)}, expected a short text")
    return text


def _charsmap(values: Mapping[str, Any]) -> float:
    """Checks a table of characters, a trie in an array and the texts that it leads to.

    Whatever the text, a step through the trie must stay in the array, and a leaf must be the place
    of a text. The package checks neither.

    Reference: https://github.com/s-yata/darts-clone
    """
    try:
        data = base64.b64decode(values.get("precompiled_charsmap") or "", validate=True)
        size = int.from_bytes(data[:4], "little")
        units, texts = np.frombuffer(data[4 : 4 + size], "<u4").astype(np.int64), data[4 + size :]
        texts.decode("utf-8")
    except (TypeError, ValueError, binascii.Error) as error:
        raise UserError(f"its precompiled_charsmap is damaged: {error}") from error
    followed = np.flatnonzero(units >> 31 == 0)
    if size != 4 * len(units) or not size or units[0] >> 31:
        raise UserError("its precompiled_charsmap is damaged: it has no trie")
    unit = units[followed]
    base = followed ^ ((unit >> 10) << ((unit & (1 << 9)) >> 6))
    if (base | 0xFF).max() >= len(units):
        raise UserError("its precompiled_charsmap is damaged: its trie leads out of the table")
    places = units[base[unit >> 8 & 1 == 1]] & (2**31 - 1)
    starts = np.frombuffer(texts + b"\0", np.uint8) & 0xC0 != 0x80  # where characters begin
    if len(places) and (places.max() > len(texts) or not starts[places].all()):
        raise UserError("its precompiled_charsmap is damaged: a leaf is not the place of a text")
    return max(map(len, texts.split(b"\0")), default=1) or 1


def _fixed_length(values: Mapping[str, Any]) -> float:
    if not _is_size(length := values.get("length", 5), 2**31) or length == 0:
        raise UserError(f"FixedLength has length={shown(length)}, expected at least 1")
    return 1


def _stripped(values: Mapping[str, Any]) -> float:
    # tokenizers counts below 0 in a token that is shorter than `stop`.
    if values.get("stop") != 0 or not _is_size(values.get("start"), 2**31):
        raise UserError(f"Strip has stop={shown(values.get('stop'))}, expected 0, and a start")
    return 1


def _template(values: Mapping[str, Any]) -> float:
    """Checks the templates of one text and of two; returns the larger number of tokens added."""
    tokens, most = values.get("special_tokens"), 0
    for name, texts in (("single", ["A"]), ("pair", ["A", "B"])):
        pieces = values.get(name)
        if not isinstance(pieces, list) or len(pieces) > MOST_STEPS:
            raise UserError(
                f"TemplateProcessing has {name}={shown(pieces, 80)}, expected a template"
            )
        found, added = [], 0
        for piece in pieces:
            kind, what = _only(piece)
            if not isinstance(what, dict) or not _is_size(what.get("type_id"), 255):
                raise UserError(f"TemplateProcessing has {shown(piece, 80)}, expected a type_id")
            if kind == "Sequence":
                found.append(what.get("id"))
            else:
                added += len(_special(tokens, what.get("id")))
        if sorted(map(str, found)) != texts:
            raise UserError(
                f"{name} of TemplateProcessing has the texts {shown(found)}, not {texts}"
            )
        most = max(most, added)
    return most


def _special(tokens: Any, name: Any) -> list[int]:
    """The ids of a special token of a template."""
    token = tokens.get(name) if isinstance(tokens, dict) and isinstance(name, str) else None
    ids, texts = (
        (token.get("ids"), token.get("tokens")) if isinstance(token, dict) else (None, None)
    )
    if not isinstance(ids, list) or not isinstance(texts, list) or len(ids) != len(texts):
        raise UserError(
            f"TemplateProcessing names the special token {shown(name, 80)}, whose ids and tokens "
            "are not in its special_tokens"
        )
    return ids


def _ends(number: int) -> Callable[[Mapping[str, Any]], float]:
    """A step that adds `number` tokens to a pair, of `cls` and `sep`."""

    def step(values: Mapping[str, Any]) -> float:
        for each in (values.get("cls"), values.get("sep")):
            if not isinstance(each, list) or [type(x) for x in each] != [str, int]:
                raise UserError(
                    f"{values['type']} has {shown(each, 80)}, expected a token and its id"
                )
        return number

    return step


def _ids(values: Any) -> Iterator[int]:
    """The ids that a checked post_processor adds to texts."""
    kind = values and values["type"]
    if kind == "Sequence":
        for each in values["processors"]:
            yield from _ids(each)
    elif kind in ("BertProcessing", "RobertaProcessing"):
        yield from (values["cls"][1], values["sep"][1])
    elif kind == "TemplateProcessing":
        for token in values["special_tokens"].values():
            yield from token["ids"]


def _only(value: Any) -> tuple[Any, Any]:
    """The key and the value of an object with one key."""
    return next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else ("", None)


def _is_size(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


_PARTS: Mapping[str, tuple[str, Mapping[str, _Step]]] = {
    "normalizer": (
        "normalizers",
        {
            **{"BertNormalizer": 3, "Strip": 1, "StripAccents": 1, "Lowercase": 2, "Nmt": 1},
            **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18, "ByteLevel": 4},
            **{"Precompiled": _charsmap, "Replace": _replaced},
            "Prepend": lambda values: 1.0 + len(_short(values, "prepend")),
        },
    ),
    "pre_tokenizer": (
        "pretokenizers",
        {
            **{"BertPreTokenizer": 1, "ByteLevel": 4, "CharDelimiterSplit": 1, "Digits": 1},
            **{"FixedLength": _fixed_length, "Metaspace": 2, "Punctuation": 1, "Split": _split},
            **{"UnicodeScripts": 1, "Whitespace": 1, "WhitespaceSplit": 1},
        },
    ),
    "post_processor": (
        "processors",
        {
            **{"BertProcessing": _ends(3), "ByteLevel": 0, "RobertaProcessing": _ends(4)},
            "TemplateProcessing": _template,
        },
    ),
    "decoder": (
        "decoders",
        {
            **{"BPEDecoder": 2, "ByteFallback": 1, "ByteLevel": 1, "CTC": 2, "Fuse": 1},
            **{"Metaspace": 1, "Replace": _replaced, "Strip": _stripped, "WordPiece": 2},
        },
    ),
}
