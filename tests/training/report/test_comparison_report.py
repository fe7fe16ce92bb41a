from __future__ import annotations

from training.report.comparison_report import Line, row_name


def test_rows_of_the_picture_differ_even_if_their_titles_begin_alike() -> None:
    title = "network.layers=" + " ".join(f"conv{number}(32)" for number in range(40))
    lines = [Line(f"{title} {end}", version, 0.9, (0.8, 1.0), None, 1.0, 1.0, 1, 1) for version, end in enumerate("ab")]
    names = [row_name(line) for line in lines]
    assert names[0] != names[1] and names[0].startswith("version 0: network.layers=conv0(32)")
    assert all(name.count("\n") == 2 and " … " in name for name in names)
    assert [name[-12:] for name in names] == ["conv39(32) a", "conv39(32) b"]
