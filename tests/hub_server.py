"""A Hub on this machine: what huggingface_hub's own client needs to create, upload, list and download a model.

Repositories, branches, preupload, LFS batches with the basic transfer, NDJSON commits, resolve with redirects and
the X-Repo-Commit and X-Linked headers, trees and model info. It checks what it is sent: hashes, sizes, tokens,
the card's metadata.
"""

import base64
import hashlib
import json
import threading
import urllib.parse
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import yaml

TOKEN, READER = "hf_writes", "hf_reads"
LFS_SIZE = 100_000  # larger files and all weights are large


@dataclass
class Repository:
    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def files(self, revision):
        commit = self.branches.get(revision, revision)
        return commit, self.commits.get(commit)


class Exchange(NamedTuple):
    """One request: bytes sent with it and bytes of the answer; status 0 where the connection was cut."""

    method: str
    path: str
    status: int
    sent: int
    answered: int


class Hub(ThreadingHTTPServer):
    """The state of the server, and what it was asked: ``log`` holds every request with its answer."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[Exchange] = []
        self.sent: list[str] = []
        """sha256 of every large file whose upload was finished."""
        self.drop = None
        """sha256 of a large file whose upload breaks off half-way."""
        self.conflict = 0  # the status that refuses commits; none
        """Whether every commit meets another one."""

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self):
        """Large files are on another host, whose redirects are not the Hub's own."""
        return f"http://localhost:{self.server_port}"

    def handle_error(self, request, client_address):
        """A connection that was cut on purpose is no news."""


@contextmanager
def serving():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def is_large(path, size):
    return size > LFS_SIZE or path.endswith(".safetensors")


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self, status, tree=None, body=None, **headers):
        body = json.dumps(tree).encode() if body is None else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.note(status, 0 if self.command == "HEAD" else len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def note(self, status, answered):
        """What comes behind a question mark may be a signature."""
        sent = int(self.headers.get("Content-Length") or 0)
        self.server.log.append(Exchange(self.command, self.path.partition("?")[0], status, sent, answered))

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message)

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def may_write(self):
        if self.token() == TOKEN:
            return True
        if self.token() == READER:
            self.refuse(403, "Forbidden", "You don't have the rights to write here")
        else:
            self.refuse(401, "", "Invalid username or password.")
        return False

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        if parts[0] == "cdn":
            return self.answer(200, body=self.server.stored[parts[1]])
        if parts[:2] == ["api", "models"]:
            repo_id, rest = "/".join(parts[2:4]), parts[4:]
        else:
            repo_id, rest = "/".join(parts[:2]), parts[2:]
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and self.token() not in (TOKEN, READER)):
            return self.refuse(404 if self.token() else 401, "RepoNotFound", "Repository not found")
        if rest[:1] == ["resolve"]:
            return self.resolve(repository, rest[1], "/".join(rest[2:]))
        commit, files = repository.files(rest[1] if len(rest) > 1 else "main")
        if files is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if rest[:1] == ["tree"]:
            return self.answer(200, [self.entry(name, content) for name, content in files.items()])
        names = [{"rfilename": name} for name in files]
        info = {"id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private, "tags": []}
        data = metadata(files.get("README.md", b""))
        return self.answer(200, info | {"siblings": names, "cardData": data})

    def entry(self, name, content):
        made = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
        if is_large(name, len(content)):
            made["lfs"] = {
                "oid": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "pointerSize": 130,
            }
        return made

    def resolve(self, repository, revision, name):
        commit, files = repository.files(revision)
        if files is None:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if name not in files:
            return self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        content = files[name]
        if not is_large(name, len(content)):
            return self.answer(200, body=content, ETag=f'"{git_oid(content)}"', X_Repo_Commit=commit)
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": str(len(content))}
        return self.answer(
            302, {}, Location=f"{self.server.storage}/cdn/{digest}", X_Repo_Commit=commit, **linked
        )

    def do_PUT(self):
        digest, length = self.path.partition("?")[0].split("/")[2], int(self.headers["Content-Length"])
        if digest == self.server.drop:
            self.rfile.read(length // 2)
            self.note(0, 0)
            self.close_connection = True
            self.connection.close()
            return
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != digest:
            return self.answer(400, {"error": "other bytes than were announced"})
        self.server.stored[digest] = content
        self.server.sent.append(digest)
        self.answer(200, {})

    def do_POST(self):
        url, sent = urllib.parse.urlsplit(self.path).path, self.body()
        if not self.may_write():
            return
        if url == "/api/repos/create":
            return self.create(json.loads(sent))
        if url == "/api/validate-yaml":
            return self.validate(json.loads(sent)["content"])
        if url.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(sent)["objects"])
        if url.startswith("/verify/"):
            asked = json.loads(sent)
            there = self.server.stored.get(asked["oid"])
            return self.answer(200 if there is not None and len(there) == asked["size"] else 404, {})
        parts = [urllib.parse.unquote(part) for part in url.strip("/").split("/")]
        repository, verb = self.server.repositories["/".join(parts[2:4])], parts[4]
        if verb == "branch":
            if parts[5] in repository.branches:
                return self.refuse(409, "", "Reference already exists")
            repository.branches[parts[5]] = repository.branches["main"]
            return self.answer(201, {})
        if verb == "preupload":
            _, files = repository.files(parts[5])
            asked = json.loads(sent)["files"]
            return self.answer(200, {"files": [self.mode(file, files) for file in asked]})
        return self.commit("/".join(parts[2:4]), repository, parts[5], sent)

    def create(self, asked):
        repo_id = f"{asked['organization']}/{asked['name']}"
        if repo_id in self.server.repositories:
            told = {"error": "You already created this model repo", "url": f"{self.server.url}/{repo_id}"}
            return self.answer(409, told)
        self.server.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return self.answer(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def validate(self, content):
        found = metadata(content.encode())
        errors = [] if found.get("pipeline_tag") else [{"message": "no pipeline_tag"}]
        for model in found.get("model-index", []):
            for result in model["results"]:
                if not {"task", "dataset", "metrics"} <= result.keys():
                    errors.append({"message": "model-index: incomplete result"})
        return self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def mode(self, file, files):
        mode = "lfs" if is_large(file["path"], file["size"]) else "regular"
        there = files.get(file["path"])
        oid = None
        if there is not None:
            oid = hashlib.sha256(there).hexdigest() if mode == "lfs" else git_oid(there)
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, objects):
        answers = []
        for asked in objects:
            made = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.stored:
                upload = {"href": f"{self.server.storage}/lfs/{asked['oid']}?signature=secret"}
                made["actions"] = {
                    "upload": upload,
                    "verify": {"href": f"{self.server.url}/verify/{asked['oid']}"},
                }
            answers.append(made)
        return self.answer(200, {"transfer": "basic", "objects": answers})

    def commit(self, repo_id, repository, revision, sent):
        if self.server.conflict:
            return self.refuse(self.server.conflict, "", "A commit has happened since. Please try again.")
        parent, files = repository.files(revision)
        files = dict(files)
        for line in sent.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = hashlib.sha1(parent.encode() + sent).hexdigest()
        repository.commits[commit], repository.branches[revision] = files, commit
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        return self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url})


def metadata(card):
    """The YAML at the head of a card."""
    parts = card.decode().split("---\n")
    return (yaml.safe_load(parts[1]) if len(parts) > 2 else None) or {}
