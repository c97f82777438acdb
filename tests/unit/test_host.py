import psutil

from pipeline import host


def test_memory_is_what_the_kernel_has_without_a_group(monkeypatch):
    monkeypatch.setattr(host, "CGROUPS", ())
    assert abs(host.free_memory() - psutil.virtual_memory().available) < 2e9


def test_a_control_group_is_the_lower_limit(monkeypatch, tmp_path):
    limit, used = tmp_path / "max", tmp_path / "current"
    monkeypatch.setattr(host, "CGROUPS", ((str(limit), str(used), str(tmp_path / "stat")),))
    free = host.free_memory()
    limit.write_text("5000\n")
    used.write_text("2000\n")
    assert host.free_memory() == 3000
    used.write_text("9000\n")
    assert host.free_memory() == 0
    (tmp_path / "stat").write_text("cache 5\ninactive_file 4500\n")
    used.write_text("4900\n")
    assert host.free_memory() == 4600  # what the kernel would give up first is free
    limit.write_text("max\n")
    assert abs(host.free_memory() - free) < 2e9


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert abs(host.free_disk(tmp_path / "a" / "b") - host.free_disk(tmp_path)) < 1e9


def test_the_tightest_of_several_groups_counts(monkeypatch, tmp_path):
    pairs = []
    for name, allowed in (("two", 9000), ("one", 4000)):
        (tmp_path / name).write_text(f"{allowed}\n")
        (tmp_path / f"{name}.used").write_text("1000\n")
        pairs.append((str(tmp_path / name), str(tmp_path / f"{name}.used"), str(tmp_path / "absent")))
    for order in (pairs, pairs[::-1], [*pairs, (str(tmp_path / "absent"),) * 3]):
        monkeypatch.setattr(host, "CGROUPS", order)
        assert host.free_memory() == 3000


def test_sizes_are_shown_in_megabytes_below_a_gigabyte():
    assert [host.shown_bytes(count) for count in (0, 56_700_000, 999_000_000, 1e9, 1_260_000_000)] == [
        "0 MB",
        "57 MB",
        "999 MB",
        "1.0 GB",
        "1.3 GB",
    ]
