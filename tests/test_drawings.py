"""The drawings: those in the repository are what the script makes now, and say what the tables say."""
import shutil

import matplotlib
import pytest
from conftest import ROOT

from appendix import command, drawings


def test_the_drawings_are_up_to_date_and_named(tmp_path):
    """Byte for byte, where the library that draws is the one that is asked for."""
    made = drawings.write(tmp_path)
    assert len(made) == 3
    for path in made:
        kept = ROOT / "appendix" / "drawings" / path.name
        assert f"appendix/drawings/{path.name}" in (ROOT / "README.md").read_text()
        assert path.name in (ROOT / "appendix" / "course.md").read_text()
        assert any(str(kept.relative_to(ROOT)) in chapter.read_text() for chapter in ROOT.glob("0*.py"))
        if f"matplotlib=={matplotlib.__version__}" in (ROOT / "requirements.txt").read_text():
            assert path.read_bytes() == kept.read_bytes()
    drawings.write(tmp_path)  # ours may be written again


def test_offsets_are_distances_of_places():
    """In the drawing's own numbers: where a worker's own block begins, less where the other one does."""
    blocks, views, offset = drawings.example()
    for worker, view in views.items():
        assert view[0] == "history" and view[-1] == worker
        place = {name: sum(blocks[other].length for other in view[:view.index(name)]) for name in view}
        assert {name: offset(name, worker) for name in view} == {
            name: place[worker] - place[name] for name in view}


def test_nobodys_file_is_overwritten(tmp_path, capsys):
    """One sentence, and exit code 2."""
    (tmp_path / "turned_query.svg").write_text("mine")
    assert command.one_sentence(lambda: drawings.main([str(tmp_path)])) == 2
    assert "turned_query.svg" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["turned_query.svg"]
    shutil.rmtree(tmp_path)
    assert command.one_sentence(lambda: drawings.main([str(tmp_path)])) == 2
    with pytest.raises(SystemExit, match="2"):
        drawings.main([])
