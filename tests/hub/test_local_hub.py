"""The Hub on loopback does what an unmodified huggingface_hub expects of the real one."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from local_hub import LocalHub
from local_hub.card import card_errors, card_warnings, metadata
from local_hub.protocol import Request, span
from local_hub.store import RefusedError

if TYPE_CHECKING:
    from hub_client import Client

ROOT = Path(__file__).parents[2]
CARD = b"---\nlicense: mit\nbase_model: some/base\nbase_model_relation: adapter\ntags: [lora]\n---\n# An adapter\n"


def noise(size: int, seed: int = 0) -> bytes:
    """Bytes that look like weights: the same each time, and different for each seed."""
    return random.Random(seed).randbytes(size)


def weights(size: int) -> bytes:
    """A safetensors file of one tensor of so many bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + noise(size)


def puts(hub: LocalHub) -> list[Request]:
    return [request for request in hub.log if request.method == "PUT"]


def commit_posts(hub: LocalHub) -> list[Request]:
    return [request for request in hub.log if "/commit/" in request.path]


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """A folder with these files in it."""
    for name, content in files.items():
        path = tmp_path / "upload" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "upload"


PUSH = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
api.create_repo("me/model", exist_ok=True)
folder = Path(sys.argv[1])
files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
def push(**kwargs):
    adds = [CommitOperationAdd(str(path.relative_to(folder)), path) for path in files]
    return api.create_commit("me/model", adds, commit_message="Push", num_threads=1, **kwargs)
"""


def ask(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """One request without a client's help."""
    request = urllib.request.Request(url, body, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


# Pushing


def test_create(hub: LocalHub, client: Client) -> None:
    """Repos are made public or private, once, and only in one's own namespace."""
    public, private, again, twice, foreign, name = client.python("""
from huggingface_hub import HfApi
api = HfApi()
answer = [
    str(api.create_repo("me/public")), str(api.create_repo("private", private=True)),
    str(api.create_repo("me/public", exist_ok=True)), error(api.create_repo, "me/public"),
    error(api.create_repo, "you/model"), api.whoami()["name"],
]""")
    assert public == again == f"{hub.url}/me/public"
    assert private == f"{hub.url}/me/private"
    assert twice[0] == foreign[0] == "HfHubHTTPError"
    assert "409" in twice[1]
    assert "403" in foreign[1]
    assert name == "me"
    assert {name: repo.private for name, repo in hub.store.repos.items()} == {"me/public": False, "me/private": True}


def test_push(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """Small and large files go into one commit; the large ones' bytes go to the storage, and no token with them."""
    files = {"README.md": CARD, "a/config.json": b"{}", "a/w.safetensors": noise(300_000), "x.bin": noise(1000)}
    url, oid = client.python(f"{PUSH}\ndone = push()\nanswer = [done.commit_url, done.oid]", folder_of(tmp_path, files))
    found = hub.files("me/model")
    found.pop(".gitattributes")
    assert {name: f.read_bytes() if isinstance(f, Path) else f for name, f in found.items()} == files
    assert [name for name, f in found.items() if isinstance(f, Path)] == ["a/w.safetensors", "x.bin"]
    assert [commit.title for commit in hub.commits("me/model")] == ["Push", "initial commit"]
    assert oid == hub.commits("me/model")[0].id
    assert url == f"{hub.url}/me/model/commit/{oid}"
    assert sorted(r.received_bytes for r in puts(hub)) == [1000, 300_000]
    assert not any(r.token_sent for r in puts(hub))
    assert len(commit_posts(hub)) == 1


def test_push_again(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """A push of what is there already sends nothing and makes no commit."""
    files = {"README.md": CARD, "w.safetensors": noise(1000)}
    before = hub.fill("me/model", files)
    oid = client.python(f"{PUSH}\nanswer = push().oid", folder_of(tmp_path, files))
    assert oid == before.id
    assert puts(hub) == commit_posts(hub) == []


def test_delete(hub: LocalHub, client: Client) -> None:
    """Files, folders and repos can be taken away."""
    hub.fill("me/model", {"a.txt": b"a", "sub/b.txt": b"b", "sub/deep/c.txt": b"c"})
    missing = client.python("""
from huggingface_hub import CommitOperationDelete, HfApi
api = HfApi()
gone = [CommitOperationDelete("a.txt"), CommitOperationDelete("sub/", is_folder=True)]
api.create_commit("me/model", gone, commit_message="Delete")
answer = error(api.delete_file, "a.txt", "me/model")
api.create_repo("me/other")
api.delete_repo("me/other")""")
    assert hub.files("me/model").keys() == {".gitattributes"}
    assert missing[0] == "RemoteEntryNotFoundError"
    assert hub.store.repos.keys() == {"me/model"}


def test_parent_commit(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """A push that expects another head than there is is refused, and changes nothing."""
    first = hub.fill("me/model", {"a.txt": b"a"})
    second = hub.fill("me/model", {"a.txt": b"b"})
    code = f"{PUSH}\nanswer = error(push, parent_commit='{first.id}'), error(push, parent_commit='{second.id[:7]}')"
    refused, taken = client.python(code, folder_of(tmp_path, {"new.txt": b"new"}))
    assert "A commit has happened since" in refused[1]
    assert taken is None
    assert [c.parent for c in hub.commits("me/model")][:2] == [second.id, first.id]


def test_branches_and_pull_requests(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """A commit to a branch or as a pull request leaves main alone, and each can be read by its name."""
    head = hub.fill("me/model", {"a.txt": b"main"})
    code = f"""{PUSH}
from huggingface_hub import hf_hub_download
api.create_branch("me/model", branch="try/1")
push(revision="try/1")
done = push(create_pr=True)
api.upload_file(path_or_fileobj=b"more", path_in_repo="more.txt", repo_id="me/model", revision="refs/pr/1")
read = lambda revision: Path(hf_hub_download("me/model", "a.txt", revision=revision)).read_text()
refs = api.list_repo_refs("me/model", include_pull_requests=True)
answer = {{
    "url": done.pr_url, "revision": done.pr_revision,
    "read": [read(r) for r in (None, "try/1", "refs/pr/1", "{head.id}")],
    "missing": error(read, "nowhere"),
    "names": [b.name for b in refs.branches] + [p.ref for p in refs.pull_requests],
}}"""
    told = client.python(code, folder_of(tmp_path, {"a.txt": b"changed"}))
    assert told["url"] == f"{hub.url}/me/model/discussions/1"
    assert told["revision"] == "refs/pr/1"
    assert told["read"] == ["main", "changed", "changed", "main"]
    assert told["missing"][0] == "RevisionNotFoundError"
    assert told["names"] == ["main", "try/1", "refs/pr/1"]
    assert hub.files("me/model", "refs/pr/1")["more.txt"] == b"more"


def test_others_may_only_ask(hub: LocalHub, client: Client, tmp_path: Path) -> None:
    """Whoever isn't the owner may open a pull request and nothing else; without a token one may not even that."""
    hub.fill("me/model", {"a.txt": b"a"})
    code = PUSH.replace('api.create_repo("me/model", exist_ok=True)', "")
    code += '\nanswer = error(push), error(push, create_pr=True), error(api.auth_check, "me/model", write=True)'
    folder = folder_of(tmp_path, {"w.bin": noise(100)})
    push, ask_for, check = client.python(code, folder, token="hf_other")
    assert "403" in push[1]
    assert "403" in check[1]
    assert ask_for is None
    assert hub.commits("me/model", "refs/pr/1")[0].author == "you"
    assert all("401" in told[1] for told in client.python(code, folder, token=""))


def test_card(hub: LocalHub, client: Client) -> None:
    """A model card that the Hub can read is pushed; one with an unknown licence is refused before anything is sent."""
    hub.fill("me/model", {"a.txt": b"a"})
    validated, pushed, committed, info = client.python(f"""
from huggingface_hub import HfApi, ModelCard
ModelCard({CARD.decode()!r}).push_to_hub("me/model")
bad = ModelCard("---\\nlicense: mine\\n---\\n")
upload = HfApi().upload_file
answer = [
    error(bad.validate), error(bad.push_to_hub, "me/model"),
    error(upload, path_or_fileobj=str(bad).encode(), path_in_repo="README.md", repo_id="me/model"),
    HfApi().model_info("me/model").card_data.to_dict(),
]""")
    assert validated[0] == pushed[0] == committed[0] == "ValueError"
    assert '- Error: "license" must be one of' in validated[1]
    assert 'Invalid metadata in README.md.\n- "license" must be one of' in committed[1]
    assert info == {"license": "mit", "base_model": "some/base", "base_model_relation": "adapter", "tags": ["lora"]}
    readme = hub.files("me/model")["README.md"]
    assert isinstance(readme, bytes)
    assert readme.endswith(b"# An adapter\n")
    assert len(commit_posts(hub)) == 1


@pytest.mark.parametrize(
    ("front", "error"),
    [
        ("license: apache-2.0", None),
        ("base_model: [a/b, gpt2]\nbase_model_relation: merge", None),
        ("- a\n- b", "mapping"),
        ("a: [", "bad YAML"),
        ("license: [mit]", '"license" must be a string'),
        ("license: Apache 2", '"license" must be one of'),
        ("base_model: /tmp/base", '"base_model" with value "/tmp/base"'),
        ("base_model: [a/b, ./c]", '"base_model" with value "./c"'),
        ("base_model: a/b/c", '"base_model" with value "a/b/c"'),
        ("base_model:", '"base_model" with value "None"'),
        ("base_model_relation: lora", '"base_model_relation" must be one of'),
        ("tags: lora", '"tags" must be an array'),
        ("tags: [1]", '"tags[0]" must be a string'),
    ],
)
def test_card_rules(front: str, error: str | None) -> None:
    """Each rule of the card says what is wrong, and one thing only."""
    found = card_errors(f"---\n{front}\n---\nwords")
    assert len(found) == (error is not None)
    assert not error or error in found[0]


def test_card_without_metadata() -> None:
    """A README without metadata is remarked on and taken."""
    for text in ("# words", "---\n\n---\n", ""):
        assert metadata(text) == {}
        assert card_errors(text) == []
        assert card_warnings(text) == ["empty or missing yaml metadata in repo card"]


# Dying halfway


@pytest.mark.parametrize("dies_in", ["object", "commit"])
def test_dying_halfway(hub: LocalHub, client: Client, tmp_path: Path, dies_in: str) -> None:
    """A push to a server that dies leaves nothing to see; the next one sends only what is missing."""
    files = {"README.md": CARD} | {f"{i}.safetensors": noise(200_000, seed=i) for i in range(3)}
    folder = folder_of(tmp_path, files)
    hub.fail_after(500_000 if dies_in == "object" else 600_001)
    name, words = client.python(f"{PUSH}\nanswer = error(push)", folder)
    assert name in ("RuntimeError", "ReadError", "RemoteProtocolError", "WriteError"), words
    assert hub.files("me/model").keys() == {".gitattributes"}
    whole = 2 if dies_in == "object" else 3
    assert {hashlib.sha256(files[f"{i}.safetensors"]).hexdigest() for i in range(whole)} < hub.objects()
    assert not list(hub.store.objects.glob("*.partial"))

    hub.recover()
    hub.log.clear()
    assert client.python(f"{PUSH}\nanswer = error(push)", folder) is None
    assert [r.received_bytes for r in puts(hub)] == [200_000] * (3 - whole)
    assert hub.files("me/model").keys() == {".gitattributes", *files}


def test_pull_resumes(hub: LocalHub, client: Client) -> None:
    """A pull that breaks off goes on where it stopped once the server is back; the client counts in steps of 10 MiB."""
    content = noise(12_000_000)
    hub.fill("me/model", {"w.bin": content})
    hub.fail_after(sent=11_000_000)

    def watch() -> None:
        while not hub.outage.down:
            time.sleep(0.001)
        hub.recover()

    threading.Thread(target=watch, daemon=True).start()
    path = client.python('from huggingface_hub import hf_hub_download\nanswer = hf_hub_download("me/model", "w.bin")')
    assert Path(path).read_bytes() == content
    assert [r.range for r in hub.log if r.method == "GET" and r.status] == [None, f"bytes={10 * 1024 * 1024}-"]


# Pulling


def test_pull(hub: LocalHub, client: Client) -> None:
    """A pull is the bytes that were pushed; with patterns, only the files that match are fetched."""
    files = {"README.md": CARD, "sub/config.json": b"{}", "w.safetensors": noise(300_000), "empty.txt": b""}
    hub.fill("me/model", files)
    code = 'from huggingface_hub import snapshot_download\nanswer = snapshot_download("me/model", allow_patterns={})'
    some = Path(client.python(code.format('["*.json"]')))
    assert [p.name for p in some.rglob("*") if p.is_file()] == ["config.json"]
    assert not any("w.safetensors" in r.path or "/cdn/" in r.path for r in hub.log)
    whole = Path(client.python(code.format(None)))
    assert {name: (whole / name).read_bytes() for name in files} == files
    assert [r.sent_bytes for r in hub.log if "/cdn/" in r.path] == [300_000]


def test_offline_afterwards(hub: LocalHub, client: Client) -> None:
    """What was fetched is there without the Hub, be it by wish or because nobody answers; the rest is said to be missing."""
    hub.fill("me/model", {"a.txt": b"a", "b.txt": b"b"})
    code = """
from huggingface_hub import hf_hub_download
answer = [Path(hf_hub_download("me/model", "a.txt")).read_text(), error(hf_hub_download, "me/model", "b.txt")]"""
    assert client.python(code.replace('"b.txt"', '"a.txt"')) == ["a", None]
    hub.log.clear()
    by_wish = client.python(code, HF_HUB_OFFLINE="1")
    assert hub.log == []
    hub.stop()
    by_need = client.python(code)
    assert by_wish[0] == by_need[0] == "a"
    assert by_wish[1][0] == by_need[1][0] == "LocalEntryNotFoundError"


def test_ranges(hub: LocalHub, client: Client) -> None:
    """Reading ten bytes through HfFileSystem fetches ten bytes, from wherever they lie in a large file or a small one."""
    large, small = noise(500_000), b"0123456789" * 10
    hub.fill("me/model", {"sub/w.safetensors": large, "a.txt": small})
    found = client.python("""
from huggingface_hub import HfFileSystem
fs = HfFileSystem()
def read(name, start):
    with fs.open(f"me/model/{name}", cache_type="none") as file:
        file.seek(start)
        return file.read(10).hex()
answer = [read("sub/w.safetensors", 0), read("sub/w.safetensors", 400_000), read("a.txt", 15)]
answer += [sorted(fs.find("me/model", detail=False)), fs.info("me/model/a.txt")["size"], fs.isdir("me/model/sub")]""")
    assert found[:3] == [part[start : start + 10].hex() for part, start in ((large, 0), (large, 400_000), (small, 15))]
    assert found[3:] == [["me/model/.gitattributes", "me/model/a.txt", "me/model/sub/w.safetensors"], 100, True]
    assert [r.sent_bytes for r in hub.log if r.status == 206] == [10, 10, 10]
    assert not any(r.token_sent for r in hub.log if "/cdn/" in r.path)


def test_only_headers(hub: LocalHub, client: Client) -> None:
    """What a safetensors file holds is learnt from its first 100 kB."""
    hub.fill("me/model", {"model.safetensors": weights(2_000_000)})
    shape = client.python("""
from huggingface_hub import get_safetensors_metadata
answer = get_safetensors_metadata("me/model").files_metadata["model.safetensors"].tensors["w"].shape""")
    assert shape == [2_000_000]
    assert [(r.range, r.sent_bytes) for r in hub.log if "/cdn/" in r.path] == [("bytes=0-100000", 100_001)]


def test_listing(hub: LocalHub, client: Client) -> None:
    """Sizes, hashes and folders can be had without the files, and of one path as of all."""
    content = noise(1000)
    hub.fill("me/model", {"sub/w.bin": content, "a.txt": b"a"})
    info, tree, some, missing = client.python("""
from huggingface_hub import HfApi
api = HfApi()
answer = [
    {s.rfilename: [s.size, s.lfs and s.lfs.sha256] for s in api.model_info("me/model", files_metadata=True).siblings},
    [e.path for e in api.list_repo_tree("me/model")], [e.path for e in api.get_paths_info("me/model", ["sub", "no"])],
    error(lambda: list(api.list_repo_tree("me/model", "nowhere"))),
]""")
    assert info["sub/w.bin"] == [1000, hashlib.sha256(content).hexdigest()]
    assert info["a.txt"] == [1, None]
    assert tree == ["sub", ".gitattributes", "a.txt"]
    assert some == ["sub"]
    assert missing[0] == "RemoteEntryNotFoundError"


# Who may


WHO = """
from huggingface_hub import HfApi, snapshot_download, hf_hub_download, repo_exists
names = ["me/model", "me/private", "me/gated", "me/nothing"]
answer = [(error(snapshot_download, name) or ["", ""]) for name in names]
answer.append(error(hf_hub_download, "me/model", "nothing.txt"))
"""


def test_who_may(hub: LocalHub, client: Client) -> None:
    """Private repos look like none to others, gated ones show themselves and refuse; a bad token opens nothing."""
    for name in ("model", "private", "gated"):
        hub.fill(f"me/{name}", {"a.txt": b"a"}, private=name == "private")

    def met(token: str) -> list[Any]:
        reader = type(client)(hub, client.home / (token or "none"))  # what lies in a cache is found without asking
        return reader.python(WHO, token=token)

    assert [e[0] for e in met("hf_local")] == ["", "", "", "RepositoryNotFoundError", "RemoteEntryNotFoundError"]
    other = met("hf_other")
    hidden = "RepositoryNotFoundError"
    assert [e[0] for e in other[:4]] == ["", hidden, "GatedRepoError", hidden]
    assert "403" in other[2][1]
    assert "you are not in the authorized list" in other[2][1]
    nobody = met("")
    assert [e[0] for e in nobody[:4]] == ["", hidden, "GatedRepoError", hidden]
    assert all("401" in e[1] for e in nobody[1:4])
    assert all("Invalid credentials in Authorization header" in e[1] for e in met("hf_wrong"))


# What no client does


def test_no_commit_without_its_objects(hub: LocalHub) -> None:
    """A commit that names a large file nobody sent is refused whole."""
    hub.fill("me/model", {"a.txt": b"a"})
    lines: list[dict[str, Any]] = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": "b.txt", "content": "Yg==", "encoding": "base64"}},
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": "0" * 64, "size": 1}},
    ]
    body = "\n".join(map(json.dumps, lines)).encode()
    url = f"{hub.url}/api/models/me/model/commit/main"
    status, words = ask(url, "POST", body, Authorization="Bearer hf_local")
    assert status == 400
    assert b"does not exist" in words
    assert hub.files("me/model").keys() == {".gitattributes", "a.txt"}


def test_storage_is_strict(hub: LocalHub) -> None:
    """The storage wants the Hub's own link, takes no token, and keeps no bytes but those that were announced."""
    content = noise(1000)
    sha256 = hashlib.sha256(content).hexdigest()
    link = hub.link("PUT", sha256, 1000)
    assert ask(link, "PUT", content, Authorization="Bearer hf_local")[0] == 400
    assert ask(link.split("?")[0], "PUT", content)[0] == 403
    assert ask(link, "GET")[0] == 403
    assert ask(link, "PUT", content[:-1])[0] == 400
    assert ask(link, "PUT", content[::-1])[0] == 400
    assert hub.objects() == set()
    assert ask(link, "PUT", content)[0] == 200
    assert ask(hub.link("GET", sha256, 1000)) == (200, content)
    assert ask(hub.link("GET", sha256, 1000), Range="bytes=1000-")[0] == 416


@pytest.mark.parametrize(
    ("asked", "found"),
    [("bytes=0-3", (0, 4)), ("bytes=7-", (7, 10)), ("bytes=-2", (8, 10)), ("bytes=5-99", (5, 10)), ("bytes=-99", (0, 10)), (None, (0, 10)), ("lines=1-2", (0, 10)), ("bytes=0-1,3-4", (0, 10))],
)  # fmt: skip
def test_span(asked: str | None, found: tuple[int, int]) -> None:
    """Every kind of range means what RFC 9110 says; one that isn't understood is not a range."""
    assert span(asked, 10) == found


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=-0", "bytes=5-4"])
def test_no_span(asked: str) -> None:
    """A range with nothing in it is refused, and the size told."""
    with pytest.raises(RefusedError, match=r"^Requested Range Not Satisfiable$") as refused:
        span(asked, 10)
    assert refused.value.status == 416
    assert refused.value.headers["Content_Range"] == "bytes */10"


def test_ids_follow_from_contents(tmp_path: Path) -> None:
    """The same commits on two Hubs have the same ids, and other contents others; a folder is taken up again as it was."""
    first, second = (LocalHub(tmp_path / name) for name in "ab")
    for hub in (first, second):
        hub.fill("me/model", {"a.txt": b"a"})
    ids = [[commit.id for commit in hub.commits("me/model")] for hub in (first, second)]
    assert ids[0] == ids[1]
    assert second.fill("me/model", {"b.txt": b"b"}).id != first.fill("me/model", {"b.txt": b"c"}).id
    assert LocalHub(tmp_path / "a").store.repos == first.store.repos


def test_from_the_command_line(tmp_path: Path) -> None:
    """It prints what to paste, serves, and ends quietly."""
    command = [sys.executable, ROOT / "tests/local_hub", "--folder", tmp_path]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stdout
        lines = [server.stdout.readline() for _ in range(2)]
        told = dict(word.split("=", 1) for line in lines for word in line.removeprefix("export ").split())
        status, words = ask(f"{told['HF_ENDPOINT']}/api/whoami-v2", Authorization=f"Bearer {told['HF_TOKEN']}")
        server.send_signal(signal.SIGINT)
        _, seen = server.communicate(timeout=300)
    finally:
        server.kill()
    assert server.returncode == 0
    assert "GET /api/whoami-v2" in seen
    assert "Traceback" not in seen
    assert status == 200
    assert json.loads(words)["name"] == "me"
    assert told.keys() == {"HF_ENDPOINT", "HF_TOKEN", "HF_HOME", "HF_HUB_DISABLE_XET"}
