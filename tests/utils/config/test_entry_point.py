"""The command line. Exit statuses and what is printed; paths of every kind arrive unchanged; multiruns; default run
folders; most in the test's own process, some as real processes.
"""

from pathlib import Path

import pytest
from hydra.errors import OverrideParseException

from tests.in_process import TINY, compose, configure, load_command, make_images, working_in
from tests.in_process import run_command as run_in_process
from utils.config.command_line import SPELLINGS, join_spaces, store_experiment
from utils.config.entry_point import entry_point, quote_paths
from utils.config.help import ROOT
from utils.errors import UserError
from utils.io.files import read_json
from utils.record.run_folder import default_run_dir

# One of each kind that Hydra's grammar refuses or reads as something else.
NAMES = [
    "a${b}c", "a\\${b}", "\\\\${oc.env:HOME}",
    "données", "データ", "with space", "a,b", "[x]", "{x}", "(x)", "a=b", "a&b", "a;b", "a:b", "a#b", "100%", "$HOME",
    "~x", "!x", "*?", "it's", "'", '"', 'say "hi"', "back\\slash", "end\\", "end\\\\", "a\\'b", "\\'", "x\\\\'y'\\",
    "null.png", "true", "1e3", "-x", "a  b", " x", "x ", "a|b", "<x>", "@x", "%20", "`x`",
]  # fmt: skip


@pytest.fixture
def start_command(tmp_path, monkeypatch):
    """Run a command with a body of the test's own in `tmp_path`; returns its exit status."""

    def go(body, *arguments):
        monkeypatch.setattr("sys.argv", ["predict.py", *arguments])
        with working_in(tmp_path), pytest.raises(SystemExit) as stop:
            entry_point("predict", load_command("predict").schema)(body)()
        return stop.value.code

    return go


PATHS = ["weights=w", "input=i", "output=o"]


# ---------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("names", [NAMES[start::14] for start in range(14)])
def test_paths_arrive_unchanged(names, start_command):
    seen = []
    first, second, third = names
    words = ["weights=w", f"thresholds={first}", f"input=a/{second}", f"output={third}/b"]
    assert start_command(lambda config, job: seen.append(config), *words) == 0
    assert (seen[0].thresholds, seen[0].input, seen[0].output) == (first, f"a/{second}", f"{third}/b")


def test_in_a_multirun_a_comma_separates_paths_but_not_in_the_name_of_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    schema = load_command("finetune").schema
    assert quote_paths(["run_dir=c,d", "run_dir=a,b", "-m"], schema) == ["run_dir=c,d", "run_dir='a,b'", "-m"]


# ------------------------------------------------------------------------------------------------------------- statuses


def test_a_missing_package_is_status_2_and_named_with_what_installs_it(start_command, capsys):
    def body(config, job):
        raise ModuleNotFoundError("No module named 'nicegui.ui'", name="nicegui.ui")

    assert start_command(body, *PATHS) == 2
    said = capsys.readouterr().err
    assert "nicegui" in said and "make install-view" in said and "Traceback" not in said


def test_a_defect_is_status_1_with_its_traceback(start_command, capsys):
    assert start_command(lambda config, job: 1 // 0, *PATHS) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("ZeroDivisionError: ")


def test_another_rank_shows_only_what_it_may_be_alone_with(start_command, capsys, monkeypatch):
    def body(config, job):
        raise UserError("runtime.device: rank 1 wants GPU 1\nand more")

    monkeypatch.setenv("RANK", "1")
    assert start_command(body, *PATHS, "top=x") == 2 and capsys.readouterr().err == ""
    assert start_command(body, *PATHS) == 2
    assert capsys.readouterr().err == "[rank 1] predict.py: runtime.device: rank 1 wants GPU 1\n"


def test_cfg_job_prints_the_configuration_and_runs_nothing(start_command, capsys):
    assert start_command(lambda config, job: 1 // 0, *PATHS[:1], "--cfg", "job", *PATHS[1:]) == 0
    printed = capsys.readouterr()
    assert (
        "\nweights: w\ninput: i\noutput: o\nsort: null\nsort_by: copy\nform: null\nexisting: null\n" in printed.out
        and printed.err == ""
    )


# ------------------------------------------------------------------------------------------------------------ multiruns


def test_only_training_sweeps(start_command, capsys):
    assert start_command(lambda config, job: 1 // 0, *PATHS, "top=1,2", "--multirun") == 2
    assert "  --multirun: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- real scripts


def test_a_run_folder_of_any_name_is_found_again(tmp_path, monkeypatch):
    name = "données, [a=b] & 'q' \"d\" \\"
    make_images(tmp_path / name)
    arguments = [*TINY, f"data.root={name}", f"run_dir=runs/{name}"]
    assert run_in_process("finetune", arguments, tmp_path, monkeypatch) == 0
    assert run_in_process("evaluate", [f"run_dir=runs/{name}", "runtime.device=cpu"], tmp_path, monkeypatch) == 0
    found = [f"weights=runs/{name}", f"input={name}/val", f"output=runs/{name}/found.csv"]
    assert run_in_process("predict", found, tmp_path, monkeypatch) == 0
    assert read_json(tmp_path / "runs" / name / "metrics.json")["samples"] == 4
    assert len((tmp_path / "runs" / name / "found.csv").read_text().splitlines()) == 1 + 4


# -------------------------------------------------------------------------------------------------- default run folders


def folder_of(*overrides):
    config, job = configure("finetune", list(overrides))
    return str(default_run_dir(config.model_dump(mode="json"), job))


def test_a_recipe_finds_its_folder_again_and_another_recipe_gets_another():
    plain = folder_of()
    assert plain.startswith("outputs/finetune/convnextv2_atto-glyphs-") and len(plain.rpartition("-")[2]) == 8
    assert folder_of() == plain
    free = ("loop.total_steps=7", "loop.micro_batch_size=1", "resume=x", "runtime.workers=3", "tracking.samples=true")
    assert folder_of(*free) == plain
    bound = ("seed=1", "optim.lr=0.1", "runtime.precision=bf16", "loop.batch_size=4", "init_from=x")
    assert len({plain, *map(folder_of, bound)}) == 6
    assert folder_of("model=convnextv2_tiny").startswith("outputs/finetune/convnextv2_tiny-glyphs-")
    assert folder_of("run_dir=a/b") == "a/b"


@pytest.mark.parametrize(
    "words, data",
    [
        (["data.root=PATH"], "image_folder"),
        (["data=glyphs", "data.root=PATH"], "glyphs"),
        (["experiment=glyphs/best", "data.root=PATH"], "glyphs"),
        ([], "glyphs"),
    ],
)
def test_a_folder_is_of_the_users_own_images(words, data):
    values, job = compose("train", words)
    assert values.data.name == job.choices["data"] == data


@pytest.mark.parametrize(
    "script, typed, read",
    [
        ("train", "{here}", "data.root={here}"),
        ("train", "data.root = {here}", "data.root={here}"),
        ("train", "data.root= ~", "data.root={home}"),
        ("train", "data.root={here} epochs=3", "data.root={here} loop.total_epochs=3"),
        ("predict", "run_dir={here} {here} output=x.csv", "weights={here} input={here} output=x.csv"),
        ("evaluate", "run_dir={here} input={here}", "job.run_dir={here} data.root={here}"),
        ("export", "{here} format=onnx", "run_dir={here} format=onnx"),
        ("evaluate", "{run}", "job.run_dir={run}"),
        ("prepare", "manifest data.root={here}", "job=manifest data.root={here}"),
        ("predict", "{run} {here} output=x.csv", "weights={run} input={here} output=x.csv"),
    ],
)
def test_what_people_type_first_is_understood(script, typed, read, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    places = {"here": tmp_path, "run": tmp_path / "run", "home": Path.home()}
    found, plain = (configure(script, join_spaces(words.format(**places).split()))[0] for words in (typed, read))
    assert found == plain


def test_a_word_beside_a_path_is_no_other_path():
    with pytest.raises(OverrideParseException):
        compose("prepare", ["photographs", "data.root=photos"])


def test_each_word_that_is_read_as_another_has_its_line_on_the_page():
    page = (ROOT / "docs/configuration.md").read_text("utf-8")
    lines = [spell.__doc__.splitlines()[0].removesuffix(".") for spell in (*SPELLINGS, store_experiment)]
    assert all(f"| {line} |" in page for line in lines)
