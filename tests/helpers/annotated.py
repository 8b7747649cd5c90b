"""Rows of each task on an encoder that a tiny model of `helpers.tiny` learns in seconds."""

import json
import random

from helpers.tiny import BAD, FILLER, GOOD

KINDS = {**dict.fromkeys(GOOD, "plus"), **dict.fromkeys(BAD, "minus")}


def _write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def tagged(path, count=200):
    """A good or bad word is a span of its kind."""
    draw, rows = random.Random(0), []
    for _ in range(count):
        words = draw.choices((*GOOD, *BAD, *FILLER), k=6)
        tags = [f"B-{KINDS[word]}" if word in KINDS else "O" for word in words]
        rows.append({"tokens": words, "ner_tags": tags})
    return _write(path, rows)


def asked(path, count=240, missing=False):
    """The answer is the one good word of a context; some contexts may have none."""
    draw, rows = random.Random(1), []
    for i in range(count):
        words = draw.choices(FILLER, k=14)
        answers = {"text": [], "answer_start": []}
        if not (missing and i % 3 == 0):
            at = draw.randrange(14)
            words[at] = draw.choice(GOOD)
            start = len(" ".join(words[:at])) + (at > 0)
            answers = {"text": [words[at]], "answer_start": [start]}
        rows.append({"question": "the plot", "context": " ".join(words), "answers": answers})
    return _write(path, rows)


def labelled(path, count=240):
    """A text has the labels of the kinds of its words: none, one or both."""
    draw, rows = random.Random(2), []
    for _ in range(count):
        words = draw.choices(FILLER, k=2)
        for kind in (GOOD, BAD):
            if draw.random() < 0.5:
                words += [draw.choice(kind)]
        labels = sorted({KINDS[word] for word in words if word in KINDS})
        rows.append({"text": " ".join(words), "labels": labels})
    return _write(path, rows)


def chosen(path, count=240):
    """The right choice is the one with a good word."""
    draw, rows = random.Random(3), []
    for _ in range(count):
        right = draw.randrange(3)
        choices = [draw.choice(GOOD if i == right else BAD) for i in range(3)]
        texts = {f"choice{i}": f"very {word}" for i, word in enumerate(choices)}
        filler = " ".join(draw.choices(FILLER, k=3))
        rows.append({"premise": filler, **texts, "label": right})
    return _write(path, rows)
