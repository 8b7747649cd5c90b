"""A Hugging Face Hub of one thread: what huggingface_hub asks to make, fill and read a repository.

Its answers are those of https://huggingface.co/docs/hub/api, for small files.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_right"


class Store(ThreadingHTTPServer):
    """The server, with all that was uploaded.

    `repos` has for each id whether it is private, the commits by branch, and the files by commit.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.cards, self.asked = {}, [], []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def add(self, repo, private=False):
        """Makes a repository."""
        self.repos[repo] = {"private": private, "branches": {}, "commits": {}}
        self.commit(repo, "main", {})

    def commit(self, repo, branch, files, sha=None):
        """Puts a tree of files at the end of a branch; gives the commit."""
        repo = self.repos[repo]
        sha = sha or hashlib.sha1(repr((len(repo["commits"]), sorted(files))).encode()).hexdigest()
        repo["commits"][sha], repo["branches"][branch] = files, sha
        return sha

    def files(self, repo, revision="main"):
        """The files of a repository at a branch or commit."""
        repo = self.repos[repo]
        return repo["commits"][repo["branches"].get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Logs nothing."""

    def answer(self, status, value=None, data=None, **headers):
        body = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        for name, header in headers.items():
            self.send_header(name.replace("_", "-"), header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def do_GET(self):
        path = urlsplit(self.path).path
        self.server.asked.append(unquote(path))
        about = r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/(.+?))?/?"
        found = re.fullmatch(about, path)
        if found:
            return self.about(*(group and unquote(group) for group in found.groups()))
        found = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not found:
            return self.refuse(404, "", "Not found")
        repo, revision, name = map(unquote, found.groups())
        commit = self.server.repos[repo]["branches"].get(revision, revision)
        data = self.server.files(repo, commit).get(name)
        if data is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        etag = hashlib.sha1(data).hexdigest()
        return self.answer(200, data=data, ETag=f'"{etag}"', X_Repo_Commit=commit)

    do_HEAD = do_GET

    def about(self, repo, kind, revision):
        if repo not in self.server.repos:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        there = self.server.repos[repo]
        sha = there["branches"].get(revision or "main", revision)
        if sha not in there["commits"]:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        files = there["commits"][sha]
        if kind == "tree":
            oids = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
            return self.answer(
                200,
                [
                    {"type": "file", "path": name, "size": len(data), "oid": oids[name]}
                    for name, data in files.items()
                ],
            )
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repo, "sha": sha, "private": there["private"], "siblings": siblings}
        return self.answer(200, {**about, "tags": [], "downloads": 0, "likes": 0})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(urlsplit(self.path).path)
        if path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            url = f"{self.server.endpoint}/{repo}"
            if asked["organization"] != "me":
                return self.refuse(403, "", f"You have no rights under {asked['organization']}")
            if repo in self.server.repos:
                return self.answer(409, {"error": "it is there", "url": url})
            private = asked.get("private") or asked.get("visibility") == "private"
            self.server.add(repo, bool(private))
            return self.answer(200, {"url": url, "id": repo})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(branch|preupload|commit)/(.+)", path)
        repo, kind, branch = found.groups()
        if kind == "branch":
            self.server.commit(repo, branch, dict(self.server.files(repo)))
            return self.answer(200, {})
        if kind == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self.answer(200, {"files": [{"path": p, **modes} for p in paths]})
        files = dict(self.server.files(repo, branch))
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        sha = self.server.commit(repo, branch, files)
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        return self.answer(200, {"success": True, "commitUrl": url, "commitOid": sha})


def forget_connections():
    """Those of huggingface_hub, old or new; the old one's keep what offline meant."""
    from huggingface_hub import utils

    for name in ("reset_sessions", "close_session"):
        getattr(utils, name, lambda: None)()


@contextlib.contextmanager
def serving(monkeypatch, cache):
    """A Hub that huggingface_hub takes for the real one, with an empty cache and a token."""
    from huggingface_hub import constants, file_download

    server = Store()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    resolve = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    for module in (constants, file_download):  # old ones have a copy there
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", resolve, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    forget_connections()
    try:
        yield server
    finally:
        forget_connections()
        server.shutdown()
        thread.join()
        server.server_close()
