"""All tests are run by the test command, whatever lane they are in."""

from pathlib import Path

from tests.lanes import LANES, ROOT


def test_lanes_name_what_is_there_and_nothing_twice() -> None:
    named = [path for lane in LANES for path in lane]
    assert len(set(named)) == len(named)
    assert not [path for path in named if not (ROOT / path).exists()]
    above = {str(parent) for path in named for parent in Path(path).parents}
    assert not above & set(named)
