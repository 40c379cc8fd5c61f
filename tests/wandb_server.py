"""A server that answers W&B's client as W&B's own does, as far as a run needs it; and that can stall or fail.

    with WandbServer() as server:
        server.runs["abc"].history        rows of figures; also .config, .summary, .files and more
        server.mood = "stalls"            from now on: no request is answered; or "fails": status 500

The client's requests are the reference: GraphQL by the names of its operations, the file stream, uploads by PUT.
"""

import gzip
import json
import re
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ENTITY = "tester"


@dataclass
class Run:
    """A run as the server knows it."""

    project: str
    upserted: dict = field(default_factory=dict)  # what the client has said of it
    config: dict = field(default_factory=dict)
    history: list = field(default_factory=list)
    events: list = field(default_factory=list)
    summary: dict = field(default_factory=dict)
    files: set = field(default_factory=set)
    exit_code: int | None = None
    used: list = field(default_factory=list)  # artefacts

    def rows(self, name):
        """The values of a figure with their steps."""
        return [(row["step"], row[name]) for row in self.history if name in row]


@dataclass
class Artifact:
    """A version of an artefact."""

    name: str
    kind: str
    aliases: list
    metadata: dict
    run: str
    files: dict = field(default_factory=dict)
    state: str = "PENDING"


class WandbServer:
    """The server, on a free port of this machine, with all that it was told."""

    def __init__(self):
        self.runs, self.artifacts, self.views = {}, {}, []
        self.operations, self.unknown = [], []
        self.uploads = {}
        self.mood = "answers"
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"wandb": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *request: None  # a client that has gone
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self):
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self.mood = "closed"
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------------------- GraphQL

    def answer(self, name, variables, text):
        """The data of an operation; an unknown operation is noted, and its answer is empty."""
        self.operations.append(name)
        method = getattr(self, f"_{name}", None)
        if method is None:
            self.unknown.append((name, text))
            return {}
        return method(variables)

    def _Viewer(self, v):
        return {"viewer": {"id": "dTox", "entity": ENTITY, "username": ENTITY, "email": "tester@example.org",
                           "flags": "{}", "teams": {"edges": []}}}  # fmt: skip

    _GetDefaultEntity = _Viewer

    def _OrganizationCoreWeaveOrganizationID(self, v):
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _find(self, name):
        """The number of an artefact's newest version by `name:alias`, or None."""
        base, _, alias = name.rpartition("/")[2].partition(":")
        known = self.artifacts.items()
        found = [number for number, one in known if one.name == base and (not alias or alias in one.aliases)]
        return found[-1] if found else None

    def _project(self, name):
        return {"id": "cDox", "name": name, "entity": {"id": "ZTox", "name": ENTITY}}

    def _RunResumeStatus(self, v):
        run = self.runs.get(v["name"])
        if run is None:
            return {"model": self._project(v["project"]) | {"bucket": None}}
        bucket = {
            "id": v["name"], "name": v["name"], "displayName": run.upserted.get("displayName"), "logLineCount": 0,
            "historyLineCount": len(run.history), "eventsLineCount": len(run.events),
            "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]",
            "summaryMetrics": json.dumps(run.summary), "config": json.dumps(run.config),
            "tags": run.upserted.get("tags") or [], "notes": run.upserted.get("notes"),
            "wandbConfig": json.dumps({"t": {}}),
        }  # fmt: skip
        return {"model": self._project(run.project) | {"bucket": bucket}}

    def _UpsertBucket(self, v):
        known = v["name"] in self.runs
        run = self.runs.setdefault(v["name"], Run(v["project"]))
        run.upserted |= {key: value for key, value in v.items() if value is not None}
        if v.get("config"):
            run.config |= json.loads(v["config"])
        bucket = {"id": v["name"], "name": v["name"], "displayName": run.upserted.get("displayName"),
                  "description": None, "config": json.dumps(run.config), "sweepName": None,
                  "project": self._project(run.project), "historyLineCount": len(run.history)}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": not known}}

    def _CreateRunFiles(self, v):
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{v['run']}/{name}"} for name in v["files"]]
        return {"createRunFiles": {"runID": v["run"], "uploadHeaders": [], "files": files}}

    def _ArtifactType(self, v):
        found = self._find(v["name"])
        kind = None if found is None else {"artifactType": {"name": self.artifacts[found].kind}}
        return {"project": {"artifact": kind}}

    def _ServerFeaturesQuery(self, v):
        return {"serverInfo": {"features": []}}

    def _CreateArtifact(self, v):
        v = v["input"]
        number = f"artifact{len(self.artifacts)}"
        aliases = [alias["alias"] for alias in v.get("aliases") or []]
        metadata = json.loads(v.get("metadata") or "{}")
        self.artifacts[number] = Artifact(
            v["artifactCollectionName"], v["artifactTypeName"], aliases, metadata, v["runName"]
        )
        return {
            "createArtifact": {
                "artifact": {"id": number, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
            }
        }

    def _CreateArtifactManifest(self, v):
        number, name = v["artifactID"], v["name"]
        file = {"id": f"{number}/{name}", "uploadUrl": f"{self.url}/artifact/{number}/{name}", "uploadHeaders": []}
        return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{number}", "file": file}}}

    def _describe(self, number, project):
        """An artefact as the client asks for it."""
        found = self.artifacts[number]
        place = {"__typename": "ArtifactSequence", "name": found.name,
                 "project": self._project(project) | {"internalId": "1"}}  # fmt: skip
        return {
            "__typename": "Artifact", "id": number, "artifactSequence": place, "versionIndex": 0,
            "artifactType": {"name": found.kind}, "description": None, "metadata": json.dumps(found.metadata),
            "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None, "state": found.state,
            "size": 1, "digest": "d", "commitHash": "c", "fileCount": len(found.files),
            "createdAt": "2026-01-01T00:00:00", "updatedAt": None, "aliases": [],
        }  # fmt: skip

    def _ArtifactMembershipByName(self, v):
        number = self._find(v["name"])
        if number is None:
            return {"project": {"artifactCollectionMembership": None}}
        artifact = self._describe(number, v["project"])
        aliases = self.artifacts[number].aliases
        return {"project": {"artifactCollectionMembership": {
            "__typename": "ArtifactCollectionMembership", "id": "m", "versionIndex": 0,
            "createdAt": "2026-01-01T00:00:00", "artifactCollection": artifact["artifactSequence"],
            "aliases": [{"__typename": "ArtifactAlias", "id": alias, "alias": alias} for alias in aliases],
            "artifact": artifact,
        }}}  # fmt: skip

    def _CreateArtifactFiles(self, v):
        nodes = []
        for asked in v["input"]["artifactFiles"]:
            number, name = asked["artifactID"], asked["name"]
            nodes.append({"storagePath": f"store/{name}", "uploadUrl": f"{self.url}/artifact/{number}/{name}",
                          "uploadHeaders": [], "uploadMultipartUrls": None, "artifact": {"id": number}})  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": [{"node": node} for node in nodes]}}}

    def _CommitArtifact(self, v):
        self.artifacts[v["artifactID"]].state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": v["artifactID"], "digest": "d"}}}

    def _UseArtifact(self, v):
        self.runs[v["runName"]].used.append(self.artifacts[v["artifactID"]].name)
        return {"useArtifact": {"artifact": self._describe(v["artifactID"], v["projectName"])}}

    def _CreateProject(self, v):
        return {"result": {"project": None, "model": None, "inserted": True}}

    def _UpsertView2(self, v):
        self.views.append(v)
        return {"upsertView": {"view": {"id": "djox", "name": v["name"]}, "inserted": True}}

    # ------------------------------------------------------------------------------------------------- the file stream

    def stream(self, run_name, sent):
        """Take lines of a run's files."""
        run = self.runs[run_name]
        for name, part in sent.get("files", {}).items():
            lines = [json.loads(line) for line in part["content"] if name != "output.log"]
            if name == "wandb-summary.json":
                run.summary = lines[-1]
            elif name in ("wandb-history.jsonl", "wandb-events.jsonl"):
                kept = run.history if "history" in name else run.events
                kept[part["offset"] :] = lines
        if sent.get("complete"):
            run.exit_code = sent.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def upload(self, path, data):
        """Take the bytes of a file."""
        self.uploads[path] = data
        _, _, run, *name = path.split("/")
        if path.startswith("/upload/"):
            self.runs[run].files.add("/".join(name))
        return {}


class _Handler(BaseHTTPRequestHandler):
    """A request; one thread each."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Say nothing."""

    def _body(self):
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, value, status=200):
        data = json.dumps(value).encode()
        with suppress(OSError):  # the client may have gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _serve(self, answer):
        data = self._body()
        while self.wandb.mood == "stalls":
            time.sleep(0.05)
        if self.wandb.mood != "answers":
            self.close_connection = True
            self._reply({"errors": [{"message": "out of order"}]}, 500)
            return
        with self.wandb.lock:
            value = answer(data)
        self._reply(value)

    def do_GET(self):
        self._serve(lambda data: {})

    def do_PUT(self):
        self._serve(lambda data: self.wandb.upload(self.path, data))

    def do_POST(self):
        if self.path == "/graphql":
            self._serve(self._graphql)
        elif found := re.fullmatch(r"/files/[^/]+/(?:[^/]+/)?([^/]+)/file_stream", self.path):
            self._serve(lambda data: self.wandb.stream(found.group(1), json.loads(data)))
        else:  # telemetry
            self._serve(lambda data: {})

    def _graphql(self, data):
        asked = json.loads(data)
        name = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"]).group(1)
        return {"data": self.wandb.answer(name, asked.get("variables") or {}, asked["query"])}
