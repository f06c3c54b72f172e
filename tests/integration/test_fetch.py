"""`ltx-batch fetch` and checkpoints at the hub, against a hub of our own in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ltx_batch import RenderRequest, load_renderer
from ltx_batch.model.catalog import OFFICIAL as CATALOG
from ltx_batch.renderer import checkpoint_fingerprint
from tests.hub_server import COMMIT
from tests.official_file import PLAIN, write_official_file, write_official_upsampler
from tests.servers import hub_server
from tests.tiny_checkpoint import write_tiny_checkpoint

OFFICIAL, TEXT = "Lightricks/LTX-Video", "PixArt-alpha/PixArt-XL-2-1024-MS"
FILE = "ltxv-2b-0.9.8-distilled.safetensors"
UPSCALER = "ltxv-spatial-upscaler-0.9.8.safetensors"
REQUEST = RenderRequest(prompt="a", height=96, width=96, num_frames=9, seed=1)
FINGERPRINT = """
import json, sys
from ltx_batch.renderer import checkpoint_fingerprint, load_planner
from ltx_batch.request import RenderRequest
load_planner(sys.argv[1])(RenderRequest(prompt="a"))
print(json.dumps(checkpoint_fingerprint(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The official repositories in small, and one in diffusers' layout."""
    root = tmp_path_factory.mktemp("hub")
    tiny = write_tiny_checkpoint(root / "someone" / "tiny-ltx")
    for repo in (OFFICIAL, TEXT):
        (root / repo).mkdir(parents=True)
    write_official_file(tiny, root / OFFICIAL / FILE, PLAIN)
    write_official_upsampler(tiny, root / OFFICIAL / UPSCALER)
    (root / OFFICIAL / "ltx-video-2b-v0.9.5.license.txt").write_text("OpenRAIL-M")
    (root / OFFICIAL / "LTX-Video-Open-Weights-License-0.X.txt").write_text("LTXV Open Weights")
    card = {"license": "other", "license_name": "ltxv-open-weights", "license_link": "https://example.org/license"}
    (root / OFFICIAL / ".card.json").write_text(json.dumps(card))
    for folder in ("text_encoder", "tokenizer"):
        shutil.copytree(tiny / folder, root / TEXT / folder)
    return root


@pytest.fixture(scope="module")
def hub(repositories: Path) -> Iterator[str]:
    with hub_server(repositories) as endpoint:
        yield endpoint


class Machine:
    """Processes that share a cache of their own and see one hub, or none."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home, self.endpoint = home, endpoint

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hub"),
            "XDG_CACHE_HOME": str(self.home / "cache"),
            "HF_HUB_OFFLINE": "0",
        }
        return subprocess.run(
            [sys.executable, *command],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    def fetch(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "ltx_batch.cli", "fetch", *words)

    def parts(self) -> list[Path]:
        return sorted(self.home.rglob("*.part"))

    def become(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This process has the machine's cache, and no hub."""
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.home / "hub" / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def frames(checkpoint: str, pipeline_config: str | None = None) -> str:
    return load_renderer(checkpoint, pipeline_config=pipeline_config, device="cpu").render([REQUEST])[0].frames_sha256()


@pytest.fixture
def machine(tmp_path: Path, hub: str) -> Machine:
    return Machine(tmp_path, hub)


def requests(repositories: Path, file: str) -> list[int]:
    """Where each request for the file's bytes began; the log begins anew."""
    log = repositories / "requests.log"
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    log.unlink(missing_ok=True)
    return [int(start) for name, start in lines if name == file]


def test_official_names_are_fetched_and_render_without_the_hub(
    machine: Machine, repositories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = machine.fetch("ltxv-2b-0.9.8-distilled", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert "licence: other (ltxv-open-weights, https://example.org/license)" in done.stderr
    assert "ltx-video-2b-v0.9.5.license.txt\n" in done.stderr
    assert "LTX-Video-Open-Weights-License-0.X.txt   <- this one holds" in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["job"] == [
        "model:",
        "  checkpoint: ltxv-2b-0.9.8-distilled",
        "  pipeline_config: ltxv-2b-0.9.8-distilled",
        "# it also takes: ltx-batch fetch ltxv-spatial-upscaler-0.9.8 t5",
    ]
    (file,) = told["fetched"][0]["files"]
    assert file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()
    more = machine.fetch("ltxv-spatial-upscaler-0.9.8", "t5", "--yes")
    assert more.returncode == 0, more.stderr
    assert "upsampler: ltxv-spatial-upscaler-0.9.8" in more.stdout
    assert "it also takes" not in machine.fetch("ltxv-2b-0.9.8-distilled", "--yes").stdout
    machine.become(monkeypatch)
    name = "ltxv-2b-0.9.8-distilled"
    assert frames(name, name) == frames(str(repositories / "someone/tiny-ltx"), name)


def test_the_list_says_size_licence_and_what_each_is_without_a_network(tmp_path: Path) -> None:
    nowhere = Machine(tmp_path, "http://127.0.0.1:9")
    told = json.loads(nowhere.fetch("--json").stdout)["names"]
    assert set(told) == set(CATALOG)
    assert all(one["size_gb"] > 0 and one["licence"] and one["what"] for one in told.values())
    assert told["ltxv-13b-0.9.8-distilled-fp8"] == {
        "what": "13B model, distilled: few steps, two passes, fp8 file",
        "size_gb": 15.7,
        "licence": "LTX-Video Open Weights 0.X",
        "licence_file": "LTX-Video-Open-Weights-License-0.X.txt",
        "repo": OFFICIAL,
        "file": "ltxv-13b-0.9.8-distilled-fp8.safetensors",
        "folders": [],
    }
    lines = nowhere.fetch().stdout.splitlines()
    for name, one in told.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert all(text in line for text in (f"{one['size_gb']:.1f} GB", one["licence"], one["what"]))


def test_what_was_fetched_is_not_fetched_again(machine: Machine, repositories: Path) -> None:
    assert machine.fetch(f"{OFFICIAL}:{FILE}", "--yes").returncode == 0
    requests(repositories, FILE)
    again = machine.fetch(f"{OFFICIAL}@{COMMIT}:{FILE}")  # nothing to download, so nothing to ask
    assert again.returncode == 0, again.stderr
    assert "0.00 MB to download" in again.stderr
    assert requests(repositories, FILE) == []


def test_a_download_goes_on_where_it_broke_off(machine: Machine, repositories: Path) -> None:
    size = (repositories / OFFICIAL / FILE).stat().st_size
    step = size // 5
    requests(repositories, FILE)
    with hub_server(repositories, "--drop-after", str(step), "--refuse-after", "2") as shaky:
        broken = Machine(machine.home, shaky).fetch("ltxv-2b-0.9.8-distilled", "--yes")
    assert broken.returncode == 3
    assert f"of {size} bytes" in broken.stderr
    assert "the same command goes on from there" in broken.stderr
    (part,) = machine.parts()
    held = part.stat().st_size
    assert 0 < held < size
    starts = requests(repositories, FILE)
    assert starts[0] == 0
    assert starts[-1] == held  # this process had gone on, too
    with hub_server(repositories, "--drop-after", str(step)) as shaky:
        whole = Machine(machine.home, shaky).fetch("ltxv-2b-0.9.8-distilled", "--yes")
    assert whole.returncode == 0, whole.stderr
    starts = requests(repositories, FILE)
    assert starts[0] == held
    assert starts == sorted(starts)
    assert machine.parts() == []


def test_bytes_that_are_not_the_hubs_are_thrown_away(machine: Machine, repositories: Path, tmp_path: Path) -> None:
    assert machine.fetch("ltxv-2b-0.9.8-distilled", "--yes").returncode == 0
    other = tmp_path / "other"
    shutil.copytree(repositories / OFFICIAL, other / OFFICIAL)
    size = (other / OFFICIAL / FILE).stat().st_size
    with hub_server(other) as endpoint:
        machine = Machine(tmp_path / "fresh", endpoint)
        listed = machine.fetch("ltxv-spatial-upscaler-0.9.8", f"{OFFICIAL}:{FILE}")  # the server now knows the sha256
        assert "nobody is there to ask: add --yes" in listed.stderr
        (other / OFFICIAL / FILE).write_bytes(bytes(size))
        spoilt = machine.fetch("ltxv-2b-0.9.8-distilled", "--yes")
    assert spoilt.returncode == 3
    assert "and the hub says" in spoilt.stderr
    assert machine.parts() == []
    assert not list(machine.home.rglob(FILE))


def test_a_full_disk_is_told_before_anything_is_downloaded(repositories: Path, tmp_path: Path) -> None:
    requests(repositories, FILE)
    with hub_server(repositories, "--claim", f"{FILE}={10**17}") as endpoint:
        refused = Machine(tmp_path, endpoint).fetch("ltxv-2b-0.9.8-distilled", "--yes", "--json")
    assert refused.returncode == 2
    assert "make room, or set HF_HOME to another disk" in json.loads(refused.stdout.splitlines()[-1])["error"]
    assert requests(repositories, FILE) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/nothing", "the model hub does not give someone/nothing"),
        (f"{OFFICIAL}@nosuch:{FILE}", f"the model hub does not give {OFFICIAL}@nosuch"),
        (f"{OFFICIAL}:other.safetensors", f"{OFFICIAL} at {COMMIT} holds none of other.safetensors"),
        (OFFICIAL, f"{OFFICIAL} at {COMMIT} holds none of transformer/"),
        ("t6", "no weights at t6"),
        (".", "is here already, or at a URI"),
    ],
)
def test_what_cannot_be_fetched_is_told(machine: Machine, name: str, message: str) -> None:
    refused = machine.fetch(name, "--yes")
    assert refused.returncode == 2
    assert message in refused.stderr


def test_a_repository_is_fetched_whole_and_loads_by_its_name(
    machine: Machine, repositories: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = machine.fetch("someone/tiny-ltx", "--yes")
    assert done.returncode == 0, done.stderr
    assert "  checkpoint: someone/tiny-ltx" in done.stdout
    machine.become(monkeypatch)
    assert frames(f"someone/tiny-ltx@{COMMIT}") == frames(str(repositories / "someone/tiny-ltx"))


@pytest.mark.parametrize("name", ["someone/tiny-ltx", "ltxv-2b-0.9.8-distilled"])
def test_plan_and_fingerprint_need_no_weights_from_the_hub(machine: Machine, repositories: Path, name: str) -> None:
    requests(repositories, FILE)
    told = machine.run("-c", FINGERPRINT, name)
    assert told.returncode == 0, told.stderr
    tiny = str(repositories / "someone/tiny-ltx")
    place = tiny if name.startswith("someone") else str(repositories / OFFICIAL / FILE)
    assert json.loads(told.stdout.splitlines()[-1]) == checkpoint_fingerprint(place, text_encoder=tiny)
    assert not list(machine.home.rglob("*.safetensors"))
