"""Uploading a folder, to a server on this machine that answers as the hub does."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import hesse
from helpers import IDS, CommandLine, compress
from hesse.errors import CheckpointError, OptionError, OutputError

FolderOf = Callable[[str], Path]
REPOSITORY = "owner/name"


class Hub:
    """What the hub received: requests by method and path, and the files of commits by branch."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, Any]] = []
        self.files: dict[str, dict[str, bytes]] = {}
        self.refused = False


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.split("?")[0]
            answer: Any = {}
            if path.endswith("/repos/create"):
                answer = {"url": f"{constants.ENDPOINT}/{REPOSITORY}"}
            elif "/preupload/" in path:
                asked = json.loads(body)["files"]
                answer = {
                    "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
                }
            elif "/commit/" in path:
                lines = [json.loads(line)["value"] for line in body.splitlines() if b'"file"' in line[:20]]
                files = hub.files.setdefault(path.rpartition("/")[2], {})
                files |= {line["path"]: base64.b64decode(line["content"]) for line in lines}
                answer = {"commitUrl": f"{constants.ENDPOINT}/{REPOSITORY}/commit/1", "commitOid": "1"}
            hub.requests.append((path, body))
            text = json.dumps(answer).encode()
            self.send_response(403 if hub.refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def out(half_folder: FolderOf, tmp_path: Path) -> Path:
    compress(half_folder("llama"), tmp_path / "out", method="rtn", bits=4, group_size=32)
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_uploaded_whole(hub: Hub, out: Path, hesse_command: CommandLine) -> None:
    before = contents(out)
    (out / ".cache").mkdir()
    (out / ".cache" / "note").write_text("not ours", encoding="utf-8")
    ran = hesse_command("push", out, REPOSITORY, "--private", "--revision", "4bit", "--json")
    assert ran.code == 0, ran.stderr
    assert hub.files == {"4bit": before}
    assert {"README.md", "config.json", "model.safetensors", "hesse-report.json"} <= set(before)
    created = json.loads(next(body for path, body in hub.requests if path.endswith("/repos/create")))
    assert (created["name"], created["organization"]) == ("name", "owner")
    assert created.get("private") or created.get("visibility") == "private"
    assert f"/api/models/{REPOSITORY}/branch/4bit" in [path for path, _ in hub.requests]
    report = json.loads(ran.stdout)
    assert (report["verb"], report["repository"], report["revision"]) == ("push", REPOSITORY, "4bit")
    assert report["files"] == sorted(before)
    assert report["url"].endswith("/commit/1")


def test_the_branch_is_main_and_the_repository_public_unless_asked(hub: Hub, out: Path) -> None:
    assert hesse.push(out, REPOSITORY).report.revision == "main"
    assert set(hub.files) == {"main"}
    created = json.loads(next(body for path, body in hub.requests if path.endswith("/repos/create")))
    assert not created.get("private")
    assert not any("/branch/" in path for path, _ in hub.requests)


def test_an_adapter_is_uploaded(hub: Hub, out: Path, half_folder: FolderOf, tmp_path: Path) -> None:
    hesse.repair(half_folder("llama"), out, tmp_path / "adapter", rank=2, data=IDS)
    hesse.push(tmp_path / "adapter", REPOSITORY)
    assert hub.files["main"] == contents(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"is not complete: adapter_model.safetensors is missing"):
        hesse.push(tmp_path / "adapter", REPOSITORY)


def test_what_is_not_complete_is_refused_before_anything_is_sent(hub: Hub, out: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / ".out.unfinished"
    unfinished.mkdir()
    for folder, message in ((tmp_path / "none", "is not a folder"), (unfinished, "is the work of an unfinished run")):
        with pytest.raises(CheckpointError, match=message):
            hesse.push(folder, REPOSITORY)
    for repository in ("name", "a/b/c", "../x", "https://x/y"):
        with pytest.raises(OptionError, match="is not a repository: give an id such as owner/name"):
            hesse.push(out, repository)
    (tmp_path / "secret").write_text("secret", encoding="utf-8")
    (out / "link.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"link.txt is a link to .*secret, outside of the folder"):
        hesse.push(out, REPOSITORY)
    (out / "link.txt").unlink()
    (out / "model.safetensors").rename(out / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError):
        hesse.push(out, REPOSITORY)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}),
        encoding="utf-8",
    )
    with pytest.raises(CheckpointError):
        hesse.push(out, REPOSITORY)
    assert hub.requests == []


def test_a_refusal_of_the_hub_is_one_line(hub: Hub, out: Path, hesse_command: CommandLine) -> None:
    hub.refused = True
    ran = hesse_command("push", out, REPOSITORY)
    assert ran.code == 1
    assert f"cannot be pushed to {REPOSITORY}" in ran.error
    with pytest.raises(OutputError, match="403"):
        hesse.push(out, REPOSITORY)
