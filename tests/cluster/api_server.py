"""As much of the Kubernetes API over HTTP as `kubectl` needs for our objects; for tests only.

Discovery, OpenAPI v3, get, list, create, merge patch, delete and pod logs, in memory. Objects are
validated by the function that the test hands in; what a controller would do, the test does.
"""

import json
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = {
    "/api/v1": [("configmaps", "ConfigMap"), ("pods", "Pod")],
    "/apis/jobset.x-k8s.io/v1alpha2": [("jobsets", "JobSet")],
    "/apis/ray.io/v1": [("rayjobs", "RayJob")],
}
Validate = Callable[[dict[str, Any]], None]


class ApiServer:
    """Serves `http://127.0.0.1:<port>`; `objects` is keyed by (plural, namespace, name)."""

    def __init__(self, validate: Validate) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.requests: list[str] = []
        server, self.validate, self.count = self, validate, 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._run(server.get)

            def do_POST(self) -> None:
                self._run(server.create)

            def do_PATCH(self) -> None:
                self._run(server.patch)

            def do_DELETE(self) -> None:
                self._run(server.delete)

            def log_message(self, *_arguments: Any) -> None:
                pass

            def _run(self, verb: Callable[..., tuple[int, Any]]) -> None:
                url = urllib.parse.urlsplit(self.path)
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                server.requests.append(f"{self.command} {url.path}")
                code, answer = verb(url.path, dict(urllib.parse.parse_qsl(url.query)), body)
                text = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(code)
                kind = "text/plain" if isinstance(answer, str) else "application/json"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def get(self, path: str, query: dict[str, str], _body: Any) -> tuple[int, Any]:
        if path in _DISCOVERY:
            return 200, _DISCOVERY[path]
        if path.startswith("/openapi/v3"):
            return 200, _openapi(path.removeprefix("/openapi/v3"))
        if "/namespaces/" not in path:
            return _failure(404, "NotFound", path)
        plural, namespace, name, rest = _place(path)
        if rest == "log":
            return 200, self.logs[name]
        if name:
            found = self.objects.get((plural, namespace, name))
            return (200, found) if found else _failure(404, "NotFound", f'{plural} "{name}"')
        wanted = query.get("labelSelector", "")
        only = query.get("fieldSelector", "").removeprefix("metadata.name=")
        items = [
            item
            for (kind, space, key), item in self.objects.items()
            if (kind, space) == (plural, namespace) and only in ("", key) and _matches(item, wanted)
        ]
        group = path.partition("/namespaces/")[0]
        listed = {"kind": f"{dict(KINDS[group])[plural]}List", "metadata": {}, "items": items}
        return 200, {"apiVersion": group.removeprefix("/apis/").removeprefix("/api/"), **listed}

    def create(self, path: str, _query: Any, body: dict[str, Any]) -> tuple[int, Any]:
        plural, namespace, _name, _rest = _place(path)
        return self._keep(plural, namespace, body, 201)

    def patch(self, path: str, _query: Any, body: dict[str, Any]) -> tuple[int, Any]:
        plural, namespace, name, _rest = _place(path)
        return self._keep(plural, namespace, _merge(self.objects[plural, namespace, name], body))

    def delete(self, path: str, _query: Any, _body: Any) -> tuple[int, Any]:
        plural, namespace, name, _rest = _place(path)
        found = self.objects.pop((plural, namespace, name), None)
        if found is None:
            return _failure(404, "NotFound", f'{plural} "{name}"')
        details = {"name": name, "kind": plural, "uid": found["metadata"]["uid"]}
        return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details}

    def _keep(
        self, plural: str, namespace: str, body: dict[str, Any], code: int = 200
    ) -> tuple[int, Any]:
        try:
            self.validate(body)
        except Exception as error:
            return _failure(422, "Invalid", str(error).splitlines()[0])
        self.count += 1
        body["metadata"].setdefault("uid", f"uid-{self.count}")
        self.objects[plural, namespace, body["metadata"]["name"]] = body
        return code, body


def _place(path: str) -> tuple[str, str, str, str]:
    """(plural, namespace, name, subresource) of a path; "" for what it does not have."""
    parts = [*path.partition("/namespaces/")[2].split("/"), "", ""]
    return parts[1], parts[0], parts[2], parts[3]


def _matches(item: dict[str, Any], selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    pairs = [pair.split("=") for pair in selector.split(",") if pair]
    return all(labels.get(name) == value for name, value in pairs)


def _merge(old: Any, new: Any) -> Any:
    """JSON merge patch (RFC 7386)."""
    if not isinstance(new, dict):
        return new
    merged = dict(old) if isinstance(old, dict) else {}
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged


def _failure(code: int, reason: str, message: str) -> tuple[int, Any]:
    words = {"status": "Failure", "reason": reason, "message": message, "code": code}
    return code, {"kind": "Status", "apiVersion": "v1", **words}


def _discovery() -> dict[str, Any]:
    groups = []
    pages: dict[str, Any] = {"/api": {"kind": "APIVersions", "versions": ["v1"]}}
    for path, kinds in KINDS.items():
        version = path.removeprefix("/apis/").removeprefix("/api/")
        pages[path] = {
            "kind": "APIResourceList",
            "groupVersion": version,
            "resources": [
                {
                    "name": plural,
                    "singularName": kind.lower(),
                    "namespaced": True,
                    "kind": kind,
                    "verbs": ["create", "delete", "get", "list", "patch", "watch"],
                }
                for plural, kind in kinds
            ],
        }
        if path.startswith("/apis/"):
            group, _, number = version.partition("/")
            entry = {"groupVersion": version, "version": number}
            groups.append({"name": group, "versions": [entry], "preferredVersion": entry})
    pages["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    pages["/version"] = {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
    return pages


def _openapi(path: str) -> dict[str, Any]:
    """Tells kubectl that the server validates fields itself (`fieldValidation`)."""
    if not path:
        return {"paths": {key[1:]: {"serverRelativeURL": f"/openapi/v3{key}"} for key in KINDS}}
    group, _, version = path.removeprefix("/apis/").removeprefix("/api/").rpartition("/")
    paths = {}
    for plural, kind in KINDS[path]:
        operation = {
            "parameters": [{"name": "fieldValidation", "in": "query"}],
            "x-kubernetes-group-version-kind": {"group": group, "version": version, "kind": kind},
        }
        paths[f"{path}/namespaces/{{namespace}}/{plural}/{{name}}"] = {"patch": operation}
    return {"openapi": "3.0.0", "paths": paths}


_DISCOVERY = _discovery()
