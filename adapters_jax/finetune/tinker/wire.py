"""Bodies and answers as Tinker's client writes and reads them: protobuf, zstd and JSON.

The messages are those of the package `tinker`, whose client is the reference.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import zstandard
from google.protobuf.message import DecodeError
from tinker.proto import tinker_public_pb2 as pb

from adapters_jax.errors import UserError, shown
from adapters_jax.finetune.serving.choosing import Likely
from adapters_jax.finetune.tenants.requests import Passed, Row

PROTOBUF = "application/x-protobuf"
MOST_DATA = 8192  # of one request; the client sends at most 1,024
_KINDS = {pb.DTYPE_FLOAT32: "<f4", pb.DTYPE_INT64: "<i8", pb.DTYPE_INT32: "<i4"}
_NOTHING = -99999.0  # the client's log-probability where there is no token


class Sampled(NamedTuple):
    """A sampled sequence: why it ended, its tokens, their log-probabilities, the likeliest ones."""

    stop: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    top: tuple[np.ndarray, np.ndarray] | None


def unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """A body without its compression.

    Raises:
        UserError: it is not what its encoding says, or has more than `most` bytes.
    """
    if encoding in ("", "identity"):
        return data
    if encoding != "zstd":
        raise UserError(f"the body's encoding is {shown(encoding)}, expected zstd or none")
    try:
        # Only as much as is allowed is ever made of it, whatever it claims.
        with zstandard.ZstdDecompressor(max_window_size=2**23).stream_reader(
            io.BytesIO(data), read_across_frames=True
        ) as reader:
            whole = reader.read(most + 1)
    except zstandard.ZstdError as error:
        raise UserError(f"the body is no zstd: {error}") from None
    if len(whole) > most:
        raise UserError(f"the body has more than {most} bytes without its compression")
    return whole


def read_pass(data: bytes) -> Any:
    """The protobuf of a request for a forward pass, whose data are not read yet.

    Raises:
        UserError: the body does not parse, or has too many data.
    """
    message = pb.ForwardBackwardRequest()
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        raise UserError(f"the body is no ForwardBackwardRequest: {error}") from None
    if len(message.data) > MOST_DATA:  # each costs time, also an empty one
        raise UserError(f"the body has {len(message.data)} data, expected at most {MOST_DATA}")
    return message


def tokens_in(message: Any) -> int:
    """The number of tokens that the texts of a forward pass have."""
    chunks = (chunk for datum in message.data for chunk in datum.model_input)
    return sum(len(chunk.encoded_text.tokens) // 4 for chunk in chunks)


def rows_of(message: Any) -> list[Row]:
    """The rows of a forward pass; without weights, every token of a cross_entropy counts.

    Raises:
        UserError: a text has images or sound, or a tensor has not what its kind and shape say.
    """
    return [_row(f"datum {i}", datum, message.loss_fn) for i, datum in enumerate(message.data)]


def config_of(message: Any) -> dict[str, float]:
    """The settings of the loss.

    Raises:
        UserError: one of them is a text.
    """
    found = dict(message.loss_fn_config)
    for name, value in message.loss_fn_config_v2.items():
        if value.WhichOneof("value") == "text":
            raise UserError(f"{name}={shown(value.text)}: expected a number")
        found[name] = value.number
    return found


def _row(name: str, datum: Any, loss: str) -> Row:
    parts = list(datum.model_input)
    if any(chunk.WhichOneof("chunk") != "encoded_text" for chunk in parts):
        raise UserError(f"{name}: its input has images or sound, expected tokens")
    tokens = np.concatenate(
        [_numbers(f"{name}: tokens", chunk.encoded_text.tokens, "<i4") for chunk in parts]
        or [np.zeros(0, np.int32)]
    )
    values = {key: _tensor(f"{name}: {key}", x) for key, x in datum.loss_fn_inputs.items()}
    if "target_tokens" not in values:
        raise UserError(f"{name} lacks target_tokens")
    targets = values.pop("target_tokens")
    if loss == "cross_entropy":
        values.setdefault("weights", np.ones(targets.shape, np.float32))
    return Row(tokens, targets, values)


def _tensor(name: str, tensor: Any) -> np.ndarray:
    if tensor.HasField("sparse_csr"):
        raise UserError(f"{name} is sparse, expected one number for each token")
    if tensor.dtype not in _KINDS:
        raise UserError(f"{name}: its dtype is {tensor.dtype}, expected float32 or int64")
    array = _numbers(name, tensor.dense, _KINDS[tensor.dtype])
    shape = tuple(tensor.shape) or array.shape
    if len(shape) > 2 or any(n < 0 for n in shape) or math.prod(shape) != array.size:
        raise UserError(f"{name} has {array.size} numbers, expected those of {shown(list(shape))}")
    return array.reshape(shape)


def _numbers(name: str, data: bytes, kind: str) -> np.ndarray:
    if len(data) % np.dtype(kind).itemsize:
        raise UserError(f"{name}: {len(data)} bytes, which are no whole number of {kind}")
    return np.frombuffer(data, kind)


def passed(result: Passed) -> bytes:
    """The answer to a forward pass."""
    logprobs = [np.asarray(x, "<f4") for x in result.logprobs]
    ends = np.cumsum([0, *(x.nbytes for x in logprobs)])
    field = pb.BatchedTensor(
        data=b"".join(x.tobytes() for x in logprobs),
        offsets=ends.astype("<i8").tobytes(),
        dtype=pb.DTYPE_FLOAT32,
    )
    record = pb.ArrayRecord(type_tag="ArrayRecord", num_datums=len(logprobs))
    record.fields["logprobs"].CopyFrom(field)
    message = pb.ForwardBackwardOutput(loss_fn_output_type="ArrayRecord", loss_fn_outputs=[record])
    for name, value in result.metrics.items():
        message.metrics[name] = value
    return message.SerializeToString()


def sampled(
    sequences: Sequence[Sampled],
    given: np.ndarray | None,
    top: tuple[np.ndarray, np.ndarray] | None,
) -> bytes:
    """The answer to a request for samples.

    Args:
        given: the log-probabilities of the prompt's tokens, NaN where there is none; None if
            nobody asked.
        top: the likeliest tokens at each of them, and their log-probabilities.
    """
    message = pb.SampleResponse()
    for each in sequences:
        made = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if each.stop == "stop" else pb.STOP_REASON_LENGTH,
            tokens=np.asarray(each.tokens, "<i4").tobytes(),
            logprobs=np.asarray(each.logprobs, "<f4").tobytes(),
        )
        if each.top is not None:
            made.topk_sampled_logprobs.CopyFrom(_likely(*each.top))
    if given is not None:
        message.prompt_logprobs = given.astype("<f4").tobytes()
    if top is not None:
        message.topk_prompt_logprobs.CopyFrom(_likely(*top))
    return message.SerializeToString()


def _likely(ids: np.ndarray, logprobs: np.ndarray) -> Any:
    length, k = ids.shape
    data = ids.astype("<i4").tobytes(), logprobs.astype("<f4").tobytes()
    return pb.TopkLogprobs(token_ids=data[0], logprobs=data[1], k=k, length=length)


def likeliest(found: Sequence[Likely], k: int, before: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The `k` likeliest tokens at each position, and their log-probabilities: (n, k).

    Args:
        found: those of one position after another, or of several at a time.
        k: how many; further ones than there are have the client's mark of nothing.
        before: for how many positions before them there is nothing.
    """
    rows = [np.atleast_2d(each.ids)[:, :k] for each in found]
    own = [np.atleast_2d(each.logprobs)[:, :k] for each in found]
    n = before + sum(map(len, rows))
    ids, logprobs = np.zeros((n, k), np.int32), np.full((n, k), _NOTHING, np.float32)
    if found:
        width = rows[0].shape[1]  # a small vocabulary may have fewer
        ids[before:, :width], logprobs[before:, :width] = np.concatenate(rows), np.concatenate(own)
    return ids, logprobs
