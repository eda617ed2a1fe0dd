"""A folder in the place of the Hugging Face Hub."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError


def hub_in_folder(root: Path, monkeypatch: pytest.MonkeyPatch, *callers: str) -> list[tuple[str, Any]]:
    """Make timm and other callers read and write a folder instead of the Hub. Each repository is a folder in it.

    Args:
        root: Folder in the place of the Hub.
        monkeypatch: Fixture of the test that calls.
        callers: Modules other than timm's that use an `HfApi`.

    Returns:
        A list that grows with each call: ("create", whether the repository is private), ("folder", names in it).
    """
    calls: list[tuple[str, Any]] = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", private))
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, filename, revision):
            return (root / repo_id / filename).is_file()

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            (root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, repo_id, folder_path, revision=None, create_pr=False, commit_message=None):
            calls.append(("folder", sorted(path.name for path in Path(folder_path).iterdir())))
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, revision=None, cache_dir=None):
        if not (root / repo_id / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(root / repo_id / filename)

    for module in ("timm.models._hub", *callers):
        monkeypatch.setattr(f"{module}.HfApi", Api)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    return calls
