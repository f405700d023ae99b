"""Tables as they stand in a log file: cells are text, columns are aligned."""

from pretrain.display import tables


def test_the_first_column_is_aligned_left_and_all_others_right():
    rows = [("corpus", "tokens", "all"), ("en", "1,000", "1"), ("chinese", "7", "")]
    assert tables.aligned(rows) == [
        "corpus   tokens  all",
        "en        1,000    1",
        "chinese       7",
    ]


def test_cells_are_text_and_not_markup(capsys):
    tables.show(("[b]", "n"), [("[unused1]", "1"), None, ("x", "23")], title="[red]title")
    said = capsys.readouterr().out
    assert "[red]title" in said and "┃ [b]       ┃" in said and "│ [unused1] │  1 │" in said
    assert said.count("├") == 1, "a line where a row is None"


def test_without_a_frame_a_row_is_one_line_and_is_cut_off(capsys):
    tables.show(("name", "n"), [("x" * 300, "1"), ("y", "22")], framed=False)
    head, long, short = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "n"] and short.split()[0] == "y"
    assert len(long) <= tables.LOG_COLUMNS and "x…" in long
