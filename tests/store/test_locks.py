"""Who may write into a store beside whom."""

import pytest

from hf_ensemble.errors import StoreLockedError
from hf_ensemble.store import exclusive_writers


@pytest.mark.parametrize("name", ["store", "store [1] *"])
@pytest.mark.parametrize(
    ("first", "second", "goes"),
    [
        (None, None, False),
        (None, (0, 2), False),
        ((0, 2), None, False),
        ((0, 2), (1, 3), False),
        ((0, 2), (1, 2), True),
    ],
)
def test_parts_of_one_count_alone_are_written_beside_each_other(tmp_path, name, first, second, goes):
    folders = [tmp_path / name]
    with exclusive_writers(folders, first):
        if goes:
            with exclusive_writers(folders, second):
                pass
        else:
            with pytest.raises(StoreLockedError), exclusive_writers(folders, second):
                pass
    with exclusive_writers(folders, second):
        pass
