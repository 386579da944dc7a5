"""`ls`, `verify` and `clear` on a folder with real objects."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clilab import TOKENS, Run, Shelf, fill, parsed

from lmcache.errors import ConfigError


def test_ls_counts_objects_tokens_and_bytes_by_namespace(run: Run, shelf: Shelf) -> None:
    listed = parsed(run("ls", "--path", shelf.folder, "--json"))
    size = shelf.file(0).stat().st_size
    assert listed["total"] == {"namespaces": 2, "objects": 5, "tokens": 5 * TOKENS, "bytes": 5 * size}
    first = listed["namespaces"][0]
    assert (first["namespace"], first["objects"], first["chunks"], first["bytes"]) == ("aa" * 32, 3, 3, 3 * size)
    assert 0 <= first["newest_s"] <= first["oldest_s"]
    shown = run("ls", "--path", shelf.folder)
    assert "aaaaaaaaaaaaaaaa" in shown.stdout
    assert "5 objects, 80 tokens" in shown.stdout


def test_ls_counts_a_chunk_of_several_ranks_once(run: Run, shelf: Shelf) -> None:
    file = shelf.file(0)
    os.link(file, file.with_name(file.name.replace(".H0-2.", ".H2-4.")))
    total = parsed(run("ls", "--path", shelf.folder, "--json"))["total"]
    assert (total["objects"], total["tokens"]) == (6, 5 * TOKENS)


def test_ls_leaves_out_what_is_not_ours_and_changes_nothing(run: Run, shelf: Shelf) -> None:
    (shelf.file(0).parent / "notes.txt").write_text("x")
    (shelf.folder / "objects/zz").mkdir()
    before = sorted((p, p.stat().st_mtime_ns) for p in shelf.folder.rglob("*"))
    assert parsed(run("ls", "--path", shelf.folder, "--json"))["total"]["objects"] == 5
    assert sorted((p, p.stat().st_mtime_ns) for p in shelf.folder.rglob("*")) == before


def test_ls_of_an_empty_folder_is_zero_not_an_error(run: Run, tmp_path: Path) -> None:
    assert parsed(run("ls", "--path", tmp_path, "--json"))["total"]["objects"] == 0
    assert "0 objects" in run("ls", "--path", tmp_path).stdout
    assert list(tmp_path.iterdir()) == []


def test_all_commands_find_the_folder_of_our_own_where_others_may_write(run: Run, tmp_path: Path) -> None:
    mount, own = tmp_path / "mount", tmp_path / "mount" / f"lmcache-{os.geteuid()}"
    mount.mkdir()
    mount.chmod(0o1777)
    result = run("ls", "--path", mount)
    assert isinstance(result.exception, ConfigError)
    assert str(own) in str(result.exception)
    fill(own)
    for command in (["ls"], ["verify"], ["clear", "--yes"]):
        assert parsed(run(*command, "--path", mount, "--json"))["path"] == str(own)
    assert not list(own.rglob("*.safetensors"))
    assert any(str(own) in f["detail"] for f in parsed(run("doctor", "--quick", "--path", mount, "--json"))["findings"])


def test_the_configured_folder_is_the_default(run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("ls")
    assert isinstance(result.exception, ConfigError)
    monkeypatch.setenv("LMCACHE_DISK_PATH", str(shelf.folder))
    assert parsed(run("ls", "--json"))["path"] == str(shelf.folder)


def test_verify_finds_a_healthy_folder_healthy(run: Run, shelf: Shelf) -> None:
    result = run("verify", "--path", shelf.folder, "--json")
    verdict = parsed(result)
    assert result.exit_code == 0
    assert (verdict["ok"], verdict["checked"], verdict["bad"]) == (True, 5, [])
    assert verdict["bytes"] == 5 * shelf.file(0).stat().st_size
    assert "5 files" in run("verify", "--path", shelf.folder).stdout


def _flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_verify_names_every_damaged_file_and_the_damage(run: Run, shelf: Shelf) -> None:
    shelf.file(4).write_bytes(shelf.file(0).read_bytes())  # another object's intact bytes under this name
    _flip(shelf.file(0), 4096 + 77)  # in the payload
    _flip(shelf.file(1), 200)  # in the header
    shelf.file(2).write_bytes(shelf.file(2).read_bytes()[:-4096])
    shelf.file(3).write_bytes(b"")
    result = run("verify", "--path", shelf.folder, "--json")
    verdict = parsed(result)
    assert result.exit_code == 1
    assert (verdict["ok"], verdict["checked"], verdict["deleted"]) == (False, 5, 0)
    reasons = {problem["file"]: problem["reason"] for problem in verdict["bad"]}
    assert set(reasons) == {str(shelf.file(i)) for i in range(5)}
    assert "checksum" in reasons[str(shelf.file(0))]
    assert "header is damaged" in reasons[str(shelf.file(1))]
    assert "bytes" in reasons[str(shelf.file(2))]
    assert "0 bytes" in reasons[str(shelf.file(3))]
    assert "holds chunk" in reasons[str(shelf.file(4))]
    assert f"bad: {shelf.file(0)}: segment" in run("verify", "--path", shelf.folder).stdout


def test_verify_deletes_only_what_is_bad_and_only_when_told(run: Run, shelf: Shelf) -> None:
    _flip(shelf.file(1), 5000)
    assert run("verify", "--path", shelf.folder).exit_code == 1
    assert shelf.file(1).exists()
    result = run("verify", "--path", shelf.folder, "--delete-bad", "--json")
    assert result.exit_code == 1
    assert parsed(result)["deleted"] == 1
    assert [shelf.file(i).exists() for i in range(5)] == [True, False, True, True, True]
    assert run("verify", "--path", shelf.folder, "--delete-bad").exit_code == 0


def test_verify_leaves_files_of_a_newer_format_alone(run: Run, shelf: Shelf) -> None:
    for index in range(5):
        data = shelf.file(index).read_bytes()
        assert data.count(rb"\"format\":1,") == 1
        shelf.file(index).write_bytes(data.replace(rb"\"format\":1,", rb"\"format\":9,"))
    result = run("verify", "--path", shelf.folder, "--delete-bad", "--json")
    verdict = parsed(result)
    assert (result.exit_code, verdict["bad"], len(verdict["newer"]), verdict["deleted"]) == (0, [], 5, 0)
    assert all(shelf.file(i).exists() for i in range(5))
    assert "5 of a newer format" in run("verify", "--path", shelf.folder).stdout


def test_verify_tells_unreadable_from_damaged(run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, id: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("lmcache.format.file.verify_file", broken)
    result = run("verify", "--path", shelf.folder, "--delete-bad", "--json")
    verdict = parsed(result)
    assert (result.exit_code, verdict["bad"], len(verdict["unreadable"])) == (1, [], 5)
    assert verdict["unreadable"][0]["reason"] == "Input/output error"
    assert shelf.file(0).exists()


def test_verify_leaves_out_a_file_that_is_evicted_meanwhile(
    run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(path: str, id: object) -> None:
        raise FileNotFoundError(path)

    monkeypatch.setattr("lmcache.format.file.verify_file", gone)
    result = run("verify", "--path", shelf.folder, "--json")
    assert (result.exit_code, parsed(result)["checked"]) == (0, 0)


def test_clear_empties_everything_once_confirmed(run: Run, shelf: Shelf) -> None:
    asked = run("clear", "--path", shelf.folder, input="n\n")
    assert asked.exit_code != 0
    assert "5 objects" in asked.stdout
    assert shelf.file(0).exists()
    assert run("clear", "--path", shelf.folder, input="y\n").exit_code == 0
    assert not any(shelf.file(i).exists() for i in range(5))


def test_clear_with_json_needs_yes_and_says_what_went(run: Run, shelf: Shelf) -> None:
    assert isinstance(run("clear", "--path", shelf.folder, "--json").exception, ConfigError)
    assert shelf.file(0).exists()
    cleared = parsed(run("clear", "--path", shelf.folder, "--json", "--yes"))
    assert (cleared["removed"], cleared["namespaces"]) == (5, ["aa" * 32, "bb" * 32])
    assert parsed(run("clear", "--path", shelf.folder, "--json", "--yes"))["removed"] == 0


def test_clear_of_a_namespace_leaves_the_others(run: Run, shelf: Shelf) -> None:
    result = run("clear", "--path", shelf.folder, "--namespace", "AAAA", "--yes")
    assert "removed 3 objects" in result.stdout
    assert [shelf.file(i).exists() for i in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize("prefix", ["", "cc", "xyz"])
def test_clear_refuses_a_namespace_that_does_not_fit_exactly_one(run: Run, shelf: Shelf, prefix: str) -> None:
    result = run("clear", "--path", shelf.folder, "--namespace", prefix, "--yes")
    assert isinstance(result.exception, ConfigError)
    assert "there are: aaaaaaaaaaaaaaaa, bbbbbbbbbbbbbbbb" in str(result.exception)
    assert all(shelf.file(i).exists() for i in range(5))


def test_clear_makes_no_cache_out_of_another_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("x")
    assert run("clear", "--path", tmp_path, "--yes").exit_code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("name", ["kv[prod]", "kv[", "kv[/old]", "kv[red]x[/]", "kv:fire:", "k" * 100])
def test_folders_are_shown_as_they_are_called(run: Run, tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / name).folder
    for command in (["ls"], ["verify"], ["clear", "--yes"], ["doctor", "--quick"]):
        shown = run(*command, "--path", folder, env={"COLUMNS": "400" if command[0] == "doctor" else "40"})
        assert shown.exit_code == 0, shown
        assert str(folder) in shown.stdout or command == ["verify"]
    assert parsed(run("ls", "--path", folder, "--json"))["total"]["objects"] == 0


def test_a_damaged_files_name_is_shown_in_full(run: Run, tmp_path: Path) -> None:
    shelf = fill(tmp_path / "kv[/old]")
    _flip(shelf.file(0), 4096 + 77)
    assert f"bad: {shelf.file(0)}: " in run("verify", "--path", shelf.folder, env={"COLUMNS": "40"}).stdout


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["clear", "--yes"]])
def test_an_empty_path_is_no_path(run: Run, shelf: Shelf, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.chdir(shelf.folder)
    for text in ("", " ", "$UNSET"):
        result = run(*command, "--path", text)
        assert isinstance(result.exception, ConfigError)
    assert all(shelf.file(i).exists() for i in range(5))


def test_figures_are_never_cut_off(run: Run, shelf: Shelf) -> None:
    wide = run("ls", "--path", shelf.folder, env={"COLUMNS": "200"}).stdout
    assert run("ls", "--path", shelf.folder, env={"COLUMNS": "20"}).stdout.split() == wide.split()
    assert "…" not in wide


def test_clear_that_is_not_confirmed_removes_nothing_and_could_not_run(run: Run, shelf: Shelf) -> None:
    for answer in ("", "n\n"):
        result = run("clear", "--path", shelf.folder, input=answer)
        assert result.exit_code == 2
        assert "nothing was removed" in result.stderr
    assert all(shelf.file(i).exists() for i in range(5))
    assert run("clear", "--path", shelf.folder, input="y\n").exit_code == 0
    assert not shelf.file(0).exists()
