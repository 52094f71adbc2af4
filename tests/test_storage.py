"""Files that appear whole or not at all, and directories whose files can be trusted."""

import hashlib
import os
from pathlib import Path

import pytest

from flux_lora.errors import SettingsError
from flux_lora.storage import (
    RESERVE_SHARE,
    free_bytes,
    private_directory,
    replacing,
    sha256_of,
    trusted_bytes,
    write_whole,
)

NOBODY = 65534


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def belongs_to(path: Path, user: int, group: int | None = None) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a file to another user takes root")
    os.chown(path, user, user if group is None else group, follow_symlinks=False)


def test_digest(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 10**6)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(b"abc" * 10**6).hexdigest()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    write_whole(tmp_path / "x", b"before")

    def interrupted() -> None:
        with replacing(tmp_path / "x") as unfinished:
            unfinished.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
    write_whole(tmp_path / "x", b"after")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"after"]


def test_a_reserve_of_the_disk_is_not_free(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    reserve = min(512 * 2**20, disk.f_blocks * disk.f_frsize // RESERVE_SHARE)
    assert free_bytes(tmp_path) == pytest.approx(disk.f_bavail * disk.f_frsize - reserve, abs=2**30)
    assert reserve > 0


def test_a_directory_is_made_for_this_user_alone(tmp_path: Path) -> None:
    assert mode(private_directory(tmp_path / "a" / "b", "X")) == 0o700


@pytest.mark.parametrize("before", [0o755, 0o750, 0o711, 0o775])
def test_an_own_directory_is_closed_to_others(tmp_path: Path, before: int) -> None:
    """Also one that the user's own group may write to, as is usual where each user has one."""
    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(before)
    if folder.stat().st_gid != folder.stat().st_uid and before & 0o020:
        pytest.skip("this user's group has another number")
    assert mode(private_directory(folder, "X")) == 0o700


@pytest.mark.parametrize("lax", [0o777, 0o702, 0o1777])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: Path, lax: int) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    folder.chmod(lax)
    with pytest.raises(SettingsError, match=f"^FLUX_X: others may write to {folder}, .* `chmod 700 {folder}`"):
        private_directory(folder, "FLUX_X")
    assert mode(folder) == lax


def test_a_directory_of_a_shared_group_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    belongs_to(folder, 0, NOBODY)
    folder.chmod(0o770)
    with pytest.raises(SettingsError, match="others may write to"):
        private_directory(folder, "FLUX_X")


def test_another_users_directory_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir(mode=0o700)
    belongs_to(folder, NOBODY)
    with pytest.raises(SettingsError, match=f"^FLUX_X: {folder} belongs to another user"):
        private_directory(folder, "FLUX_X")
    assert mode(private_directory(folder / "own", "FLUX_X")) == 0o700


def test_another_users_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "mine").symlink_to("a")
    (tmp_path / "theirs").symlink_to("a")
    belongs_to(tmp_path / "theirs", NOBODY)
    private_directory(tmp_path / "mine", "FLUX_X")
    with pytest.raises(SettingsError, match="belongs to another user"):
        private_directory(tmp_path / "theirs", "FLUX_X")


def test_another_users_file_is_not_read(tmp_path: Path) -> None:
    folder = private_directory(tmp_path / "a", "X")
    (folder / "x").write_bytes(b"code")
    assert trusted_bytes(folder / "x", "FLUX_X") == b"code"
    belongs_to(folder / "x", NOBODY)
    with pytest.raises(SettingsError, match=f"^FLUX_X: {folder}/x belongs to another user. Remove it"):
        trusted_bytes(folder / "x", "FLUX_X")


def test_what_is_no_directory_stays_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        private_directory(tmp_path / "file", "X")
