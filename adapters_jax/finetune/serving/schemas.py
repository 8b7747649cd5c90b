"""The bodies of requests, in OpenAI's form, and the OpenAPI description of the server."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

from adapters_jax.errors import UserError, shortened
from adapters_jax.finetune.serving.choosing import TOP
from adapters_jax.finetune.serving.conversing import Body, Message, ResponseFormat, Tool
from adapters_jax.texts import parse_json

MOST_STOPS, LONGEST_STOP = 16, 200
MOST_ANSWERS = 256  # to one request
MOST_MESSAGES = 4096  # each is several tokens, and templates take time
LOWEST_TEMPERATURE = 0.01  # below, logits would overflow; 0 is greedy
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
_Id = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]
_Bias = Annotated[float, Field(ge=-100, le=100)]


class StreamOptions(Body):
    """What a stream has beside its pieces."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class _Generation(Body):
    """What completions and conversations have in common."""

    model: str = Field(max_length=200, description="the base, or an adapter")
    max_tokens: int | None = Field(
        None, ge=1, description="by default 128, or what there is room for"
    )
    temperature: float = Field(1.0, ge=0, le=2, description="0 is greedy; others from 0.01 on")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=2**31 - 1, description="0 is all tokens")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="by default a random one")
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(
        1, ge=1, le=128, description="answers to each prompt; seeds count up from `seed`"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: dict[_Id, _Bias] = Field({}, max_length=1024)
    user: str | None = Field(None, max_length=200, description="is not used")
    safety_identifier: str | None = Field(None, max_length=200, description="is not used")
    prompt_cache_key: str | None = Field(None, max_length=200, description="is not used")
    # Clients send these, and mean no more than they would by leaving them out.
    store: Literal[False] = False
    metadata: dict[str, str] = Field({}, max_length=0)
    service_tier: Literal["auto", "default"] = "auto"

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


# A list's first problem is enough: to tell all of them takes seconds of the loop of all requests.
_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_Several = Annotated[
    Annotated[list[str], Field(fail_fast=True)] | Annotated[list[_Ids], Field(fail_fast=True)],
    Field(min_length=1, max_length=MOST_ANSWERS),
]


class CompletionRequest(_Generation):
    """Prompts to go on with; with the adapter of a run they are formatted as in its training."""

    prompt: str | _Ids | _Several
    max_tokens: int | None = Field(
        None, ge=0, le=2**31 - 1, description="0 needs echo; by default 128, or the room left"
    )
    echo: bool = Field(False, description="the prompt's text and log-probabilities are in front")
    best_of: int | None = Field(None, description="n, or null")
    logprobs: int | None = Field(
        None, ge=0, le=TOP, description="of tokens, and that many of the likeliest ones"
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return [*self.prompt]  # type: ignore[list-item]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.best_of not in (None, self.n):
            raise ValueError(
                f"best_of: {self.best_of}, expected n ({self.n}) or null, since every answer that "
                "is made is returned"
            )
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0, expected at least 1 unless echo is true")
        if len(self.prompts) * self.n > MOST_ANSWERS:
            raise ValueError(
                f"{len(self.prompts)} prompts with n = {self.n}, expected at most {MOST_ANSWERS} "
                "answers to a request"
            )
        return self

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are wanted at each position; None for no log-probabilities."""
        return self.logprobs


def _few(messages: Any) -> Any:
    if isinstance(messages, list) and len(messages) > MOST_MESSAGES:
        raise ValueError(f"{len(messages)} messages, expected at most {MOST_MESSAGES}")
    return messages


class ChatRequest(_Generation):
    """A conversation to answer."""

    # Counted before any is read, whose errors would take as long as the messages.
    messages: Annotated[list[Message], BeforeValidator(_few)] = Field(
        min_length=1, max_length=MOST_MESSAGES
    )
    tools: list[Tool] = Field([], max_length=128)
    tool_choice: Any = Field("auto", description="none or auto")
    response_format: ResponseFormat = Field(ResponseFormat(type="text"))
    parallel_tool_calls: bool = Field(True, description="false returns the first call alone")
    modalities: list[Literal["text"]] = Field(["text"], fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="as max_tokens")
    logprobs: bool = Field(False, description="of new tokens; not in streams")
    top_logprobs: int = Field(0, ge=0, le=TOP, description="also this many of the likeliest tokens")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tool_choice not in ("none", "auto"):
            raise ValueError("tool_choice: expected none or auto, since no call can be forced")
        return self

    @property
    def likeliest(self) -> int | None:
        """How many likeliest tokens are wanted at each position; None for no log-probabilities."""
        return self.top_logprobs if self.logprobs else None


class PredictRequest(Body):
    """Texts to label, or pairs of texts."""

    model: str = Field(max_length=200)
    texts: list[str | Annotated[list[str], Field(min_length=2, max_length=2)]] = Field(
        min_length=1, max_length=64
    )


_B = TypeVar("_B", bound=BaseModel)


def parsed(kind: type[_B], data: bytes) -> _B:
    """A request's body.

    Raises:
        UserError: it is no JSON, or has another form; the message has every problem.

    Example:
        >>> parsed(PredictRequest, b'{"model": "a", "texts": ["x"], "top": 1}')
        Traceback (most recent call last):
        adapters_jax.errors.UserError: the body: top: Extra inputs are not permitted
    """
    try:
        values = parse_json(data.decode("utf-8"))  # pydantic's takes the last of equal keys
        if not isinstance(values, dict):
            raise UserError(f"it is a {type(values).__name__}, expected an object")
        body = kind.model_validate(values)
    except ValidationError as error:
        found = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_input=False)
        ]
        message = "; ".join(each.removeprefix(": ") for each in found)
        raise UserError(f"the body: {shortened(message, 600)}") from None
    except ValueError as error:
        what = "the body" if isinstance(error, UserError) else "the body is no JSON"
        raise UserError(f"{what}: {shortened(str(error), 600)}") from None
    temperature = getattr(body, "temperature", 0.0)
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise UserError(
            f"the body: temperature: {temperature:g}, expected 0 (greedy) or at least "
            f"{LOWEST_TEMPERATURE}"
        )
    return body


class Problem(BaseModel):
    """What an answer says that was not given."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(BaseModel):
    """The answer to a request that was not done."""

    error: Problem


_FAILURES = {
    "400": "the request has another form, or cannot be done",
    "401": "the API key is missing or another one",
    "403": "the request comes from a page of another host",
    "404": "the adapter or the path does not exist",
    "408": "the request or its answer took too long",
    "409": "there is no room for a further adapter",
    "413": "the body is too large",
    "415": "the body is of another type",
    "429": "too many requests are waiting; come again after the seconds of Retry-After",
    "503": "the server is compiling, or shutting down",
    "507": "the server's disk is full, or cannot be written",
}


def openapi(version: str, routes: Sequence[Any]) -> dict[str, Any]:
    """The OpenAPI description of a server; what a path does is in its docstring."""
    schemas: dict[str, Any] = {}

    def of(kind: type[BaseModel]) -> dict[str, Any]:
        schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[kind.__name__] = schema
        return {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}

    failures = {status: {"description": x, "content": of(Error)} for status, x in _FAILURES.items()}
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {
        "type": "object",
        "required": ["files"],
        "properties": {"files": {"type": "array", "items": file}},
    }
    bodies = {
        "/v1/completions": of(CompletionRequest),
        "/v1/chat/completions": of(ChatRequest),
        "/v1/adapters/{name}": {"multipart/form-data": {"schema": files}},
        "/predict": of(PredictRequest),
    }
    paths: dict[str, Any] = {}
    for route in routes:
        path = route.path.replace(":path", "")
        schema = {"type": "string", **({"pattern": NAME} if path in bodies else {})}
        name = {"name": "name", "in": "path", "required": True, "schema": schema}
        methods = paths.setdefault(path, {"parameters": [name]} if "{name}" in path else {})
        kind = "text/plain" if path == "/metrics" else "application/json"
        for method in route.methods - {"HEAD"}:
            done = {"description": "done", "content": {kind: {"schema": {}}}}
            made: dict[str, Any] = {"summary": route.endpoint.__doc__.partition(".")[0]}
            made["responses"] = {"200": done, **failures}
            if method in ("POST", "PUT"):
                made["requestBody"] = {"required": True, "content": bodies[path]}
            if method == "PUT":
                added = {"description": "added", "content": {"application/json": {}}}
                made["responses"]["201"] = added
            methods[method.lower()] = made
    key = {"type": "http", "scheme": "bearer"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "adapters-jax serve", "version": version},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": key}},
    }


def matches_name(name: str) -> bool:
    """Whether an adapter may have a name."""
    return re.fullmatch(NAME, name) is not None
