"""Rows with annotations: tags of tokens, answers in contexts, sets of labels, choices.

Each function reads one file. What is wrong with its rows is listed in one `DataError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.finetune.data.files import DataError, FilePath, Line, Rows, place, refuse
from adapters_jax.finetune.data.readers import read_file
from adapters_jax.finetune.data.tables import Table, cell, choose_columns, choose_values

_BIO = re.compile(r"O|[BI]-.+")


def words_of(rows: Rows, tokens: str) -> tuple[list[list[str]], list[Line]]:
    """Takes the tokens of each row: a list, or a text that is split at spaces.

    Raises:
        DataError: the file cannot be used, or a row has no tokens, a blank one or one with a space.
    """
    values, lines = choose_values(rows, [tokens])
    words = [_items(value) for (value,) in values]
    _refuse(
        rows,
        lines,
        [not row or any(word.split() != [word] for word in row) for row in words],
        f"no {tokens}, or a blank one or one with a space; expected the tokens of a text",
    )
    return words, lines


def read_tagged(path: FilePath | Rows, tokens: str, tags: str, spans: bool) -> Table:
    """Reads tokens with their tags.

    Args:
        path: the file, or its rows.
        tokens: the column of the tokens, a list or a text that is split at spaces.
        tags: the column of the tags, as many in the same form.
        spans: whether the tags mark spans, and so must be in BIO.

    Returns:
        Rows with the text `(tokens with spaces between, None)`; a label is the list of tags.

    Raises:
        DataError: the file cannot be used, a row has another number of tags than of tokens, or a
            tag is not in BIO.

    Example:
        >>> rows = Rows(["tokens", "tags"], [(1, [["In", "Rio"], ["O", "B-place"]])])
        >>> table = read_tagged(rows, "tokens", "tags", spans=True)
        >>> table.texts, table.labels
        ([('In Rio', None)], [['O', 'B-place']])
    """
    rows = read_file(path)
    words, lines = words_of(rows, tokens)
    values, _ = choose_values(rows, [tags])
    labels = [_items(value) for (value,) in values]
    uneven = [
        f"{place(line)} has {len(row)} tokens and {len(found)} tags"
        for line, row, found in zip(lines, words, labels, strict=True)
        if len(row) != len(found)
    ]
    expected = f"; expected a tag in {tags!r} for each token in {tokens!r}"
    refuse(rows.path, uneven, "", expected)
    wrong = {
        tag: line
        for line, row in reversed([*zip(lines, labels, strict=True)])
        for tag in row
        if spans and not _BIO.fullmatch(tag)
    }
    refuse(
        rows.path,
        [f"{tag!r} ({place(line)})" for tag, line in sorted(wrong.items())],
        "not in BIO: ",
        "; expected O, B-kind for the first token of a span and I-kind for its others; for tags "
        "that mark no spans write --metrics accuracy",
    )
    return Table([(" ".join(row), None) for row in words], labels, (), rows.path, lines)


def read_answers(path: FilePath | Rows, question: str, context: str, answers: str) -> Table:
    """Reads questions with their answers in contexts.

    Args:
        path: the file, or its rows.
        question: the column of the question.
        context: the column of the context.
        answers: the column of the answers: a mapping of lists `text` and `answer_start`, as
            SQuAD's; a list of texts; or a text. It may be empty, for a question without an answer.

    Returns:
        Rows with the texts `(question, context)`; a label is the list of `(start, text)`.

    Raises:
        DataError: the file cannot be used, or an answer is not in its context.

    Example:
        >>> rows = Rows(["q", "c", "a"], [(1, ["Who?", "It was Ann.", {"text": ["Ann"]}])])
        >>> read_answers(rows, "q", "c", "a").labels
        [[(7, 'Ann')]]
    """
    rows = read_file(path)
    texts, lines = choose_columns(rows, [question, context])
    values, _ = choose_values(rows, [answers])
    labels, wrong = [], []
    for line, (_, inside), (value,) in zip(lines, texts, values, strict=True):
        found = [_placed(inside, text, start) for text, start in _starts(value)]
        labels.append([(start, text) for start, text in found if start >= 0])
        wrong += [f"{text!r} ({place(line)})" for start, text in found if start < 0]
    refuse(
        rows.path,
        wrong,
        "not in their context where answer_start says: ",
        "; expected a part of the context, letter by letter; leave answer_start out to search it",
    )
    return Table([(q, c) for q, c in texts], labels, (), rows.path, lines)


def read_label_sets(path: FilePath | Rows, text: str, labels: str, separator: str | None) -> Table:
    """Reads texts with sets of labels.

    Args:
        path: the file, or its rows.
        text: the column of the text.
        labels: the column of the labels: a list, which may be empty, or a text.
        separator: splits labels that are a text; None if they are lists.

    Returns:
        Rows with the text `(text, None)`; a label is the tuple of labels.

    Raises:
        DataError: the file cannot be used, there are texts of labels and no separator, a label is
            blank or a list, or all rows have 0 or 1 for each label.

    Example:
        >>> rows = Rows(["text", "labels"], [(2, ["A joy", "good|short"]), (3, ["Bad", ""])])
        >>> read_label_sets(rows, "text", "labels", "|").labels
        [('good', 'short'), ()]
    """
    rows = read_file(path)
    cells, _ = choose_columns(rows, [text])
    values, lines = choose_values(rows, [labels])
    texts = [place(n) for n, (value,) in zip(lines, values, strict=True) if isinstance(value, str)]
    if separator is None:
        shown = next((value for (value,) in values if isinstance(value, str)), "")
        after = (
            f", such as {shown!r}; say what separates the labels of a row: --label-separator '|'"
        )
        refuse(rows.path, texts, f"{labels!r} is a text in ", after)
    found = [_items(value, separator) for (value,) in values]
    blank = [isinstance(value, Mapping) for (value,) in values]
    blank = [wrong or not all(row) for wrong, row in zip(blank, found, strict=True)]
    _refuse(rows, lines, blank, f"{labels!r} has a label without a name; expected a list of names")
    even = len(found) > 1 and len({*map(len, found)}) == 1 < len(found[0])
    if even and {"0", "1", "0.0", "1.0", "false", "true"} >= {
        name for row in found for name in row
    }:
        raise DataError(
            f"{rows.path}: {labels!r} has 0 or 1 for each of {len(found[0])} labels, as "
            f"{found[0]} ({place(lines[0])}); expected the names of the labels that a text has"
        )
    sets = [tuple(dict.fromkeys(row)) for row in found]
    return Table([(each, None) for (each,) in cells], sets, (), rows.path, lines)


def read_choices(
    path: FilePath | Rows, texts: Sequence[str], choices: Sequence[str], label: str
) -> Table:
    """Reads rows with several choices, one of them right.

    Args:
        path: the file, or its rows.
        texts: the columns of what the choices continue.
        choices: the columns of the choices.
        label: the column of the right one: its number from 0 on, the name of its column, or its
            text, the same in all rows.

    Returns:
        Rows with the texts, joined by spaces, and the choices; a label is the number of the right
        choice.

    Raises:
        DataError: the file cannot be used, or a label names none of the choices.

    Example:
        >>> rows = Rows(["text", "a", "b", "label"], [(2, ["It rains.", "wet", "dry", 0])])
        >>> table = read_choices(rows, ["text"], ["a", "b"], "label")
        >>> table.texts, table.labels
        ([('It rains.', 'wet', 'dry')], [0])
    """
    rows = read_file(path)
    cells, lines = choose_columns(rows, [*texts, *choices, label])
    asked = [(" ".join(row[: len(texts)]), *row[len(texts) : -1]) for row in cells]
    numbers = [*map(str, range(len(choices)))]
    # One reading for all rows: the text of a choice may be the number of another one.
    readings = [
        [
            own.index(right) if right in own else -1
            for (*_, right), row in zip(cells, asked, strict=True)
            for own in (list(row[1:]) if names is None else names,)
        ]
        for names in (numbers, [*choices], None)
    ]
    found = min(readings, key=lambda each: each.count(-1))
    wrong = [
        f"{row[-1]!r} ({place(n)})" for n, row, i in zip(lines, cells, found, strict=True) if i < 0
    ]
    refuse(
        rows.path,
        wrong,
        "no choice: ",
        f"; expected in {label!r} a number from 0 to {len(choices) - 1}, one of "
        f"{', '.join(choices)}, or the right one's text",
    )
    return Table(asked, found, (), rows.path, lines)


def _items(value: Any, separator: str | None = None) -> list[str]:
    """The items of a list, or of a text that is split; None has none."""
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else cell(value).split(separator)
    return [text for text in (cell(item).strip(" ") for item in items) if text or separator is None]


def _starts(answers: Any) -> list[tuple[str, int | None]]:
    """The answers of a row with where they start in the context, None if that is not given."""
    starts: list[Any] = []
    if isinstance(answers, Mapping) and "text" in answers:
        texts, starts = _listed(answers["text"]), _listed(answers.get("answer_start"))
    else:
        texts = _listed(answers)
    starts = starts or [None] * len(texts)
    whole = len(starts) == len(texts)
    return list(zip(map(str, texts), starts if whole else [-1] * len(texts), strict=True))


def _listed(value: Any) -> list[Any]:
    """A list as it is, and a single value as a list; None and "" have none."""
    if isinstance(value, list | tuple):
        return list(value)
    return [] if value is None or value == "" else [value]


def _placed(context: str, text: str, start: Any) -> tuple[int, str]:
    """Where an answer starts, without the space around it; -1 if it is not there, or is empty."""
    bare = text.strip()
    if start is None:
        return (context.find(bare) if bare else -1), bare
    whole = isinstance(start, int) and start >= 0
    there = whole and bare and context[start : start + len(text)] == text
    return (start + text.index(bare) if there else -1), bare


def _refuse(rows: Rows, lines: Sequence[Line], wrong: Sequence[Any], what: str) -> None:
    found = [place(line) for line, is_wrong in zip(lines, wrong, strict=True) if is_wrong]
    refuse(rows.path, found, "", f": {what}")
