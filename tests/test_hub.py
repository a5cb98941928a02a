"""Names of the Hugging Face hub: cache, offline mode, downloads from a server of our own, errors."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from megatron_slm.analysis.losses import checkpoints_in
from megatron_slm.convert.source import open_model
from megatron_slm.data.tokenizers.registry import build_tokenizer
from megatron_slm.errors import ConfigError
from megatron_slm.hub import cached_folder, is_hub_name, local_path
from megatron_slm.operations.preflight.files import fingerprints
from megatron_slm.planning.planned_run import architecture_at
from tests.support.hub_models import save_model_and_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_and_tokenizer(tmp_path_factory.mktemp("hub") / "model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def put(cache: Path, name: str, model: Path, *patterns: str) -> Path:
    """Put a model into a cache as the hub's library would."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text(COMMIT)
    for file in model.iterdir():
        if any(fnmatch(file.name, pattern) for pattern in patterns or ("*",)):
            (snapshot / file.name).write_bytes(file.read_bytes())
    return snapshot


def test_a_cached_model_is_opened_by_name_without_a_network(cache: Path, model: Path) -> None:
    snapshot = put(cache, "org/tiny", model)
    for name in ("org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"):
        assert local_path(name, field="--init-from") == snapshot
        assert (
            open_model(name, field="--init-from").content_sha256() == open_model(str(model), field="x").content_sha256()
        )
    assert build_tokenizer("HuggingFaceTokenizer", "org/tiny").fingerprint() == (
        build_tokenizer("HuggingFaceTokenizer", model).fingerprint()
    )
    (listed,) = checkpoints_in(["org/tiny"])
    assert (listed.label, listed.path) == ("tiny", str(snapshot))


def test_a_path_that_exists_is_never_a_name(cache: Path, model: Path) -> None:
    put(cache, "org/tiny", model)
    Path("org/tiny").mkdir(parents=True)
    assert not is_hub_name("org/tiny")
    assert local_path("org/tiny", field="--init-from") == Path("org/tiny")


@pytest.mark.parametrize(
    "path", ["/absent/tiny", "./org/tiny", "../tiny", "tiny", "org/tiny/more", "a b/c", "org/", "s3://x/y"]
)
def test_other_paths_are_no_names(cache: Path, path: str) -> None:
    assert not is_hub_name(path)


def test_a_model_that_is_not_cached_is_refused_offline(cache: Path, model: Path) -> None:
    fix = r"Fix: check the path, or download .*: hf download org/tiny --local-dir models/tiny$"
    with pytest.raises(
        ConfigError, match=rf"^--init-from is 'org/tiny': must be a local path, .*HF_HUB_OFFLINE.*{fix}"
    ):
        open_model("org/tiny", field="--init-from")
    put(cache, "org/tiny", model, "*.json")  # as left by a download of the configuration alone
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        open_model("org/tiny", field="--init-from")
    with pytest.raises(ConfigError, match=r"hf download org/tiny --revision v2 --local-dir"):
        build_tokenizer("HuggingFaceTokenizer", "org/tiny@v2")
    assert build_tokenizer("HuggingFaceTokenizer", "org/tiny").vocab_size > 3
    assert architecture_at("org/tiny", "--init-from").num_layers > 0


def test_missing_shards_make_a_cached_model_incomplete(cache: Path, model: Path) -> None:
    snapshot = put(cache, "org/tiny", model)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1.safetensors").touch()
    assert cached_folder("org/tiny") is None
    (snapshot / "model-2.safetensors").touch()
    assert cached_folder("org/tiny") == snapshot


def test_preflight_compares_the_cached_folders(cache: Path, model: Path) -> None:
    from megatron_slm.api.runs import make_config

    config = make_config(objective="clm", train_iters=1, init_from="org/tiny", tokenizer_model="org/other")
    assert {value for name, value in fingerprints(config).items() if name.startswith(("--init", "--tok"))} == {None}
    put(cache, "org/tiny", model)
    put(cache, "org/other", model, "tokenizer*")
    assert None not in {value for name, value in fingerprints(config).items() if name.startswith(("--init", "--tok"))}


# ---- downloads, from a server of our own ----


class Hub(http.server.BaseHTTPRequestHandler):
    """Enough of the hub's interface for `snapshot_download`."""

    repos: dict[str, Path]
    asked: list[str]

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        words = path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        name = "/".join(words[2:4] if api else words[:2])
        if name == "org/private":
            return self._answer(403, X_Error_Code="GatedRepo")
        if name not in self.repos:
            return self._answer(404, X_Error_Code="RepoNotFound")
        if "absent" in words:
            return self._answer(404, X_Error_Code="RevisionNotFound")
        files = sorted(self.repos[name].iterdir())
        if api and words[4] == "tree":
            tree: list[dict[str, Any]] = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self._etag(file)}
                for file in files
            ]
            return self._answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if api:
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            return self._answer(200, json.dumps(info).encode(), Content_Type="application/json")
        file = self.repos[name] / words[-1]
        return self._answer(200, file.read_bytes(), ETag=f'"{self._etag(file)}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    @staticmethod
    def _etag(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, model: Path) -> Iterator[str]:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in model.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"pickle")
    with_pickle = tmp_path / "served"
    with_pickle.mkdir()
    for file in model.iterdir():
        (with_pickle / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training_args.pt"):
        (with_pickle / name).write_bytes(b"x")
    Hub.repos, Hub.asked = {"org/tiny": with_pickle, "org/pickled": pickled}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_address[1]}"
        served.shutdown()
        thread.join()


_OPEN = """
import sys
from megatron_slm.errors import SlmError
from megatron_slm.hub import local_path
for name in sys.argv[1:]:
    try:
        print(local_path(name, field="--init-from"))
    except SlmError as error:
        print(type(error).__name__, error)
"""


def _open(endpoint: str, home: Path, *names: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-c", _OPEN, *names]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=True, cwd=Path.cwd())
    return done.stdout.splitlines()


def test_a_download_takes_the_safetensors_and_no_pickle(server: str, tmp_path: Path, model: Path) -> None:
    found, pickled, absent, revision, gated = _open(
        server, tmp_path / "home", "org/tiny", "org/pickled", "org/absent", "org/tiny@absent", "org/private"
    )
    assert {file.name for file in Path(found).iterdir()} == {
        file.name for file in model.iterdir()
    }  # neither pickles nor weights of another format
    assert "ConfigError --init-from is 'org/pickled': must have a config.json and safetensors weights" in pickled
    assert f"ConfigError --init-from is 'org/absent': must be a local path, or an existing model of {server}" in absent
    assert "an existing revision of" in revision
    assert "must be a model that you may read. Fix: accept its terms" in gated
    asked = len(Hub.asked)
    assert _open(server, tmp_path / "home", "org/tiny") == [found]
    assert len(Hub.asked) == asked, "a cached model needs no network"


def test_a_hub_that_cannot_be_reached_is_named(tmp_path: Path) -> None:
    (line,) = _open("http://127.0.0.1:9", tmp_path / "home", "org/tiny")
    assert line.startswith(
        "ServiceError --init-from is 'org/tiny': must be a local path, or a model that can be downloaded"
    )
    assert "http://127.0.0.1:9" in line
    assert line.endswith("hf download org/tiny --local-dir models/tiny")
