"""Launch settings: which row is taken on which card at which widths, and the user's file."""

import json
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from linearize.modeling import launches, tuned
from linearize.modeling.errors import LinearizeError
from linearize.modeling.launches import Launch, launch, no_room
from linearize.modeling.tuned import Ask, Row, listening, nearest, using

CPU, GPU = torch.device("cpu"), torch.device("cuda")
WIDE, NARROW, LAST = (
    Launch({"BLOCK": 128}, 8, 3, 150_000),
    Launch({"BLOCK": 64}, 4, 2, 90_000),
    Launch({"BLOCK": 32}, 4, 1, 60_000),
)
TUNED = Launch({"BLOCK": 96}, 4, 4, 80_000)


@pytest.fixture(autouse=True)
def invented(monkeypatch, tmp_path):
    """One kernel with three rows, no user's file, and no row of ours."""
    monkeypatch.setitem(launches.TABLE, "invented", [WIDE, NARROW, LAST])
    monkeypatch.setattr(tuned, "TUNED", [])
    monkeypatch.setenv("LINEARIZE_LAUNCHES", str(tmp_path / "launches.json"))
    tuned.forget_rows()
    yield tmp_path / "launches.json"
    tuned.forget_rows()


@pytest.fixture
def card(monkeypatch):
    """Pretend that the GPU is another one."""

    def become(name: str, kilobytes: int) -> None:
        properties = types.SimpleNamespace(shared_memory_per_block_optin=kilobytes * 1024)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        forget_cards()

    become("NVIDIA H100 80GB HBM3", 227)
    yield become
    forget_cards()


def forget_cards():
    launches.shared_memory.cache_clear()
    tuned.device_class.cache_clear()


def row(device="h100", launch=TUNED, kernel="invented", **fields):
    return Row(kernel, launch, device, **fields)


def measure(device="h100", launch=TUNED):
    """A row of ours more."""
    tuned.TUNED.append(row(device, launch))
    tuned.forget_rows()


def test_every_default_row_and_candidate_is_a_launch():
    for kernel, rows in [*launches.TABLE.items(), *launches.CANDIDATES.items()]:
        assert rows and all(isinstance(r, Launch) for r in rows), kernel
        assert all(r.blocks.keys() == rows[0].blocks.keys() for r in rows), kernel
    for kernel, rows in launches.CANDIDATES.items():
        assert kernel in launches.TABLE and rows[0] in launches.TABLE[kernel], kernel
        assert len(rows) <= 6, f"{kernel}: too many to time"
    assert all(r.kernel in launches.TABLE and r.date and r.versions for r in tuned.TUNED)


def test_the_tables_are_made_once():
    """A second definition would lose, unseen, what the first one holds."""
    lines = Path(launches.__file__).read_text().splitlines()
    for name in ("TABLE", "CANDIDATES"):
        assert sum(line.startswith((f"{name}:", f"{name} =")) for line in lines) == 1, name


def test_options_are_the_keywords_of_a_launch():
    assert WIDE.options == {"BLOCK": 128, "num_warps": 8, "num_stages": 3}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_class_of_device_is_its_name_without_memory_and_plug(name, expected):
    assert tuned.class_of(name) == expected


def test_the_first_row_that_fits_the_card_is_taken(card):
    assert launch("invented", CPU) == WIDE
    assert launch("invented", GPU) == WIDE
    card("NVIDIA GeForce RTX 4090", 99)
    assert launch("invented", GPU) == NARROW
    card("Tesla T4", 48)
    assert launch("invented", GPU) == LAST  # nothing fits; the least demanding is what can be tried


class OnGpu(NamedTuple):
    """Stands for a tensor of a GPU."""

    bytes: int = 2
    device: torch.device = GPU

    def element_size(self) -> int:
        return self.bytes


def test_a_card_without_the_room_runs_the_reference_and_says_so(card):
    assert {no_room(name, OnGpu(4)) for name in launches.LAUNCHES_OF} == {None}  # an H100 has it
    card("NVIDIA GeForce RTX 4090", 99)
    taken = {name for name in launches.LAUNCHES_OF if no_room(name, OnGpu()) is None}
    assert {"mapped_attention", "joint_step", "salient_step"} <= taken
    assert "averaged_attention" not in taken
    assert no_room("averaged_attention", OnGpu()) == (
        "its kernels take 160 KB of shared memory, and the GPU gives a program 99"
    )
    assert no_room("mapped_attention", OnGpu(4)) is not None  # fp32 takes twice as much
    card("NVIDIA A100-SXM4-80GB", 163)
    assert {no_room(name, OnGpu()) for name in launches.LAUNCHES_OF} == {None}
    assert no_room("convolved_attention", torch.zeros(1)) is None  # on a CPU something else stands against it


def test_fp32_takes_twice_the_memory(card):
    assert launch("invented", GPU, dtype=torch.bfloat16) == WIDE
    assert launch("invented", GPU, dtype=torch.float32) == NARROW


def test_a_measured_row_comes_before_the_defaults_on_its_card_and_those_it_serves(card):
    assert launch("invented", GPU) == WIDE
    measure("h200", LAST)
    assert launch("invented", GPU) == LAST  # an H100 has none of its own
    measure("h100")
    assert launch("invented", GPU) == TUNED
    card("NVIDIA H200", 227)
    assert launch("invented", GPU) == LAST
    tuned.TUNED.pop(0)
    tuned.forget_rows()
    assert (
        launch("invented", GPU) == WIDE
    )  # the defaults are an H200's: an H100's rows do not come before them
    card("NVIDIA A100-SXM4-80GB", 163)
    assert launch("invented", GPU) == WIDE
    assert launch("invented", CPU) == WIDE


def test_a_row_is_looked_for_once(card, monkeypatch):
    tuned.TUNED.append(row(K=128))
    asked = []
    monkeypatch.setattr(tuned, "nearest", lambda ask, room: asked.append(ask) or nearest(ask, room))
    for _ in range(3):
        assert launch("invented", GPU, K=64) == TUNED
        assert launch("invented", GPU, K=128) == TUNED
    assert [ask.K for ask in asked] == [64, 128]


def test_a_row_serves_what_asks_for_no_more_than_was_measured(card):
    tuned.TUNED += [
        row(K=64, V=64, F=64, dtype="bfloat16", launch=LAST),
        row(K=128, V=128, F=128, dtype="bfloat16"),
    ]
    bf16, fp32 = torch.bfloat16, torch.float32
    assert launch("invented", GPU, K=128, V=128, F=128, dtype=bf16) == TUNED  # exact
    assert launch("invented", GPU, K=96, V=96, F=96, dtype=bf16) == TUNED  # the nearest above
    assert (
        launch("invented", GPU, K=64, V=64, F=64, dtype=bf16) == LAST
    )  # exact, though the other would serve
    assert launch("invented", GPU, K=256, V=128, F=128, dtype=bf16) == WIDE  # nothing measured is as wide
    assert launch("invented", GPU, K=128, V=128, F=128, dtype=fp32) == NARROW  # nor as large
    assert launch("invented", GPU, K=128, V=128, F=128, dtype=torch.float16) == TUNED


def test_a_row_that_does_not_fit_or_is_of_another_version_is_passed_over(card):
    tuned.TUNED += [
        row(launch=Launch({"BLOCK": 256}, 8, 4, 240_000)),
        row(launch=Launch({"ROWS": 64}, 4, 2, 1000)),
        row(kernel="another"),
    ]
    assert launch("invented", GPU) == WIDE


def test_the_users_rows_come_before_ours(card, invented):
    tuned.TUNED.append(row(launch=LAST))
    tuned.write_rows(invented, [row(milliseconds=1.5, versions="torch 2", date="2026-11-25")])
    assert launch("invented", GPU) == TUNED


def test_writing_replaces_what_was_measured_at_the_same_and_keeps_the_rest(invented):
    tuned.write_rows(invented, [row(K=64), row(K=128)])
    tuned.write_rows(invented, [row(K=128, launch=LAST)])
    rows = tuned.read_rows(invented)
    assert [(r.K, r.launch) for r in rows] == [(64, TUNED), (128, LAST)]
    assert json.loads(invented.read_text())["format"] == 1
    assert [p.name for p in invented.parent.iterdir()] == [invented.name]  # nothing half-written beside it


def test_a_row_comes_back_as_it_was_written(invented):
    whole = row(
        K=64, V=128, F=256, dtype="float16", milliseconds=0.5, default_milliseconds=0.75, date="2026-11-25"
    )
    assert tuned.write_rows(invented, [whole]) == tuned.read_rows(invented) == [whole]


def good(**changes):
    tree = {
        "kernel": "invented",
        "device": "h100",
        "blocks": {"BLOCK": 64},
        "warps": 4,
        "stages": 2,
    } | changes
    return json.dumps({"format": 1, "rows": [{k: v for k, v in tree.items() if v is not None}]})


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{", "not a readable JSON file"),
        ("[]", "no list of rows"),
        ('{"format": 9, "rows": []}', "format 9 is not 1"),
        ('{"format": 1, "rows": [7]}', "row 0: 7 is no row"),
        (good(warps=None), "row 0: 'warps' is missing"),
        (good(kernel=None), "row 0: 'kernel' is missing"),
        (good(warps=3), "row 0: warps: 3 is impossible"),
        (good(stages="2"), "row 0: stages: '2' is impossible"),
        (good(blocks={"BLOCK": -1}), "row 0: BLOCK: -1 is impossible"),
        (good(blocks=[64]), r"row 0: blocks: \[64\] is no mapping"),
        (good(dtype="bf17"), "row 0: dtype: 'bf17' is unknown"),
        (good(K="wide"), "row 0: K: 'wide' is impossible"),
        (good(device=9), "row 0: device: 9 is no name"),
    ],
)
def test_a_malformed_file_is_one_line(card, invented, text, line):
    invented.write_text(text)
    with pytest.raises(LinearizeError, match=line) as error:
        launch("invented", GPU)
    assert str(error.value).startswith(str(invented)) and "\n" not in str(error.value)
    assert "linearize tune" in str(error.value)


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("LINEARIZE_LAUNCHES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.user_file() == tmp_path / "linearize" / "launches.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert tuned.user_file() == tmp_path / "me" / ".cache" / "linearize" / "launches.json"


def test_a_forced_setting_holds_inside_its_block_and_in_other_threads(card):
    import threading

    tuned.TUNED.append(row())
    seen = []
    with using("invented", LAST):
        with using("invented", NARROW):
            assert launch("invented", CPU) == NARROW
        thread = threading.Thread(target=lambda: seen.append(launch("invented", GPU)))
        thread.start()
        thread.join()
    assert seen == [LAST]
    assert launch("invented", CPU) == WIDE


def test_listening_hears_every_ask(card):
    with listening() as asks:
        launch("invented", GPU, K=128, dtype=torch.bfloat16)
        launch("invented", CPU)
    launch("invented", CPU)
    assert asks == [
        Ask("invented", "h100", 128, None, None, "bfloat16"),
        Ask("invented", "cpu", None, None, None, None),
    ]


def test_without_rows_nothing_is_nearest():
    assert nearest(Ask("invented", "h100", 64, 64, 64, "bfloat16"), 10**6) is None
