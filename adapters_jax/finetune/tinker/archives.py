"""Runs and checkpoints as clients see them, and the files of checkpoints."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import time
from typing import Any

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from adapters_jax.errors import UserError
from adapters_jax.finetune.serving.guard import TRAINING
from adapters_jax.finetune.serving.requests import UnknownModelError
from adapters_jax.finetune.tinker import checkpoints
from adapters_jax.finetune.tinker.bodies import Reader, lora_in, number_in, owner_of, time_text
from adapters_jax.finetune.tinker.service import Service

_LINK = 3600.0  # seconds that a link to a file holds


class _Path(BaseModel):
    tinker_path: str


class _Until(BaseModel):
    ttl_seconds: int | None


class Archives:
    """The paths of runs and checkpoints, which the service has."""

    def __init__(self, service: Service, name: str, reader: Reader) -> None:
        self._do, self._name, self._reader = service, name, reader
        self._secret = secrets.token_bytes(32)

    def routes(self) -> list[Route]:
        """The paths."""
        runs = f"{TRAINING}training_runs"
        one, checkpoint = f"{runs}/{{run}}", f"{runs}/{{run}}/checkpoints/{{kind}}/{{name}}"
        return [
            Route(runs, self.runs),
            Route(one, self.run),
            Route(f"{one}/checkpoints", self.listed),
            Route(f"{TRAINING}checkpoints", self.listed),
            Route(f"{TRAINING}weights_info", self.weights_info, methods=["POST"]),
            Route(checkpoint, self.delete, methods=["DELETE"]),
            Route(f"{checkpoint}/ttl", self.expire, methods=["PUT"]),
            Route(f"{checkpoint}/archive", self.archive),
            Route(f"{checkpoint}/external_weights_urls", self.links),
            Route(f"{TRAINING}files/{{link}}/{{file}}", self.file),
        ]

    async def runs(self, request: Request) -> Response:
        """The models that are there, and those that have checkpoints."""
        owner = owner_of(request)
        live = [each.id for each in self._do.models.values() if each.owner == owner]
        saved = [each.model for each in self._do.checkpoints.of(owner)]
        names = list(dict.fromkeys([*saved, *live]))
        offset, limit = (number_in(request, *pair) for pair in (("offset", 0), ("limit", 20)))
        rows = [self._run(owner, name) for name in names[offset : offset + limit]]
        cursor = {"offset": offset, "limit": limit, "total_count": len(names)}
        return JSONResponse({"training_runs": rows, "cursor": cursor})

    async def run(self, request: Request) -> Response:
        """A model that is there, or has checkpoints."""
        return JSONResponse(self._run(owner_of(request), request.path_params["run"]))

    def _run(self, owner: str, name: str) -> dict[str, Any]:
        saved = self._do.checkpoints.of(owner, name)
        model = self._do.models.get(name)
        if model is None or model.owner != owner:
            if not saved:
                raise UnknownModelError(f"there is no training run {name!r}")
            about, asked_at = saved[-1].about, saved[-1].about["time"]
        else:
            about, asked_at = model.about, time_text(model.asked)

        def last(kind: str) -> Any:
            return next((each.shown() for each in reversed(saved) if each.kind == kind), None)

        return {
            "training_run_id": name,
            "base_model": self._name,
            "model_owner": owner,
            **lora_in(about),
            "last_request_time": asked_at,
            "last_checkpoint": last("weights"),
            "last_sampler_checkpoint": last("sampler_weights"),
            "user_metadata": about["metadata"] or None,
        }

    async def listed(self, request: Request) -> Response:
        """The checkpoints of a model, or of all."""
        found = self._do.checkpoints.of(owner_of(request), request.path_params.get("run"))
        rows = [each.shown() for each in found]
        if "run" in request.path_params:
            return JSONResponse({"checkpoints": rows})
        offset, limit = (number_in(request, *pair) for pair in (("offset", 0), ("limit", 100)))
        cursor = {"offset": offset, "limit": limit, "total_count": len(rows)}
        return JSONResponse({"checkpoints": rows[offset : offset + limit], "cursor": cursor})

    def _found(self, request: Request) -> checkpoints.Checkpoint:
        given = request.path_params
        path = f"tinker://{given['run']}/{given['kind']}/{given['name']}"
        return self._do.checkpoints.find(owner_of(request), path)

    async def weights_info(self, request: Request) -> Response:
        """What a model of a checkpoint needs."""
        body = await self._reader.read(_Path, request)
        about = self._do.checkpoints.find(owner_of(request), body.tinker_path).about
        more = {k: v for k, v in (about["lora"] or {}).items() if k.startswith("train_")}
        return JSONResponse({"base_model": self._name, **lora_in(about), **more})

    async def delete(self, request: Request) -> Response:
        """Removes a checkpoint."""
        await asyncio.to_thread(self._do.checkpoints.drop, self._found(request))
        return Response(status_code=204)

    async def expire(self, request: Request) -> Response:
        """Has a checkpoint removed some time from now, or never."""
        body = await self._reader.read(_Until, request)
        await asyncio.to_thread(self._do.checkpoints.expire, self._found(request), body.ttl_seconds)
        return Response(status_code=204)

    async def archive(self, request: Request) -> Response:
        """PEFT's files of a checkpoint, as tar.gz."""
        files = await self._do.aside(self._do.exported, self._found(request))
        data = await self._do.aside(checkpoints.packed, files)
        return Response(data, media_type="application/gzip")

    async def links(self, request: Request) -> Response:
        """Links to PEFT's files of a checkpoint, which need no key for an hour."""
        found = self._found(request)
        if found.kind != "external_weights":
            raise UserError(f"{found.path} has no files to download; save_weights_external does")
        until, root = time.time() + _LINK, str(request.base_url).rstrip("/")
        text = json.dumps([found.owner, found.path, int(until)]).encode().hex()
        link = f"{text}.{self._mark(text)}"
        urls = {path.name: f"{root}{TRAINING}files/{link}/{path.name}" for path in found.files()}
        return JSONResponse({"urls": urls, "expires": time_text(until)})

    def _mark(self, text: str) -> str:
        return hmac.new(self._secret, text.encode(), hashlib.sha256).hexdigest()

    async def file(self, request: Request) -> Response:
        """A file that a link names."""
        text, _, mark = request.path_params["link"].partition(".")
        # Anyone may send a link, so that nothing of it is read before its mark is right.
        right = hmac.compare_digest(self._mark(text).encode(), mark.encode())
        owner, path, until = json.loads(bytes.fromhex(text)) if right else ("", "", 0)
        if until < time.time():
            raise HTTPException(403, "the link is no more; ask for a new one")
        found = self._do.checkpoints.find(owner, path)
        file = next((x for x in found.files() if x.name == request.path_params["file"]), None)
        if file is None:
            raise UnknownModelError(f"{path} does not have this file")
        data = await asyncio.to_thread(file.read_bytes)
        return Response(data, media_type="application/octet-stream")
