"""The `hyspark` command itself, `hyspark path` and `hyspark doctor`."""
import argparse
import configparser
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_hyspark import __version__
from nnunetv2_hyspark.cli import doctor, main, path
from nnunetv2_hyspark.cli.device import pick_device

REPOSITORY = Path(__file__).resolve().parents[2]
WELL = {
    "torch": {"version": "2.8.0", "built_for_cuda": "12.8", "devices": ["a GPU"]},
    "timm": {"version": "1.0"},
    "nnunetv2": {"hook": True, "trainer": "nnunetv2_hyspark.trainers.t", "planner": "nnunetv2_hyspark.planners.p"},
}


@pytest.mark.parametrize("arguments", [["--help"], ["path"]])
def test_light_commands_import_nothing_heavy(arguments):
    script = (
        "import sys\nfrom nnunetv2_hyspark.cli.main import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'nnunetv2', 'SimpleITK', 'matplotlib', 'scipy') if name in sys.modules])\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=REPOSITORY
    )
    assert finished.stdout.splitlines()[-1] == "[]"


def test_command_names():
    assert [main.command_name(name) for name in ("demo", "plan_finetune", "import_weights")] == [
        "demo",
        "plan-finetune",
        "import",
    ]


def test_every_module_of_a_command_is_listed():
    folder = Path(main.__file__).parent
    commands = {file.stem for file in folder.glob("*.py") if "def add_parser(" in file.read_text("utf-8")}
    assert commands <= set(main._MODULES)


def test_path_is_the_folder_of_the_stub(capsys):
    assert main.main(["path"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "hyspark_trainers.py").is_file()


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main.main(["--version"])
    assert __version__ in capsys.readouterr().out


@pytest.fixture
def failing(monkeypatch):
    """Makes `hyspark path` raise an error."""

    def make(error: BaseException) -> None:
        def run(_: argparse.Namespace) -> None:
            raise error

        monkeypatch.setattr(path, "run", run)

    return make


def test_user_errors_are_one_sentence(failing, capsys):
    failing(FileNotFoundError(2, "No such file or directory", "missing.nii.gz"))
    assert main.main(["path"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("hyspark: error: missing.nii.gz: No such file or directory")
    assert line.count("\n") == 1


def test_an_error_of_ours_is_printed_as_it_is(capsys):
    error = ValueError("the mask ratio is 2;\nexpected 0 to 1.")
    code = compile("def run(_): raise error", "ours.py", "exec")
    scope = {"__name__": "nnunetv2_hyspark.somewhere", "error": error}
    exec(code, scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path, "run", scope["run"])
        assert main.main(["path"]) == 2
    assert capsys.readouterr().err == "hyspark: error: the mask ratio is 2; expected 0 to 1.\n"


def test_an_error_of_others_says_where_it_came_from(failing, capsys):
    failing(RuntimeError("CUDA out of memory"))
    assert main.main(["path"]) == 2
    assert "--debug" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--debug", "path"], ["path", "--debug"]])
def test_debug_shows_the_traceback(failing, arguments):
    failing(ValueError("wrong"))
    with pytest.raises(ValueError, match="wrong"):
        main.main(arguments)


@pytest.mark.parametrize("error", [KeyError("bug"), NotImplementedError(), RecursionError()])
def test_bugs_are_not_hidden(failing, error):
    failing(error)
    with pytest.raises(type(error)):
        main.main(["path"])


def test_interrupted(failing):
    failing(KeyboardInterrupt())
    assert main.main(["path"]) == 130


@pytest.mark.parametrize(
    "command",
    [
        ["benchmark"],
        ["demo", "--folder", "DEMO"],
        ["reconstruct", "none.pth", "none.nii.gz", "--out", "a.png"],
    ],
)
def test_a_gpu_that_is_not_there_is_missed_in_a_sentence(monkeypatch, capsys, tmp_path, command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = tmp_path / "demo"
    assert main.main([str(folder) if word == "DEMO" else word for word in command] + ["--device", "cuda"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("hyspark: error: --device is cuda, but torch ") and line.count("\n") == 1
    assert "finds no GPU; give --device cpu" in line
    assert not folder.exists()


@pytest.mark.parametrize("has_gpu", [False, True])
def test_auto_takes_a_gpu_if_there_is_one(monkeypatch, has_gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    assert pick_device("auto") == ("cuda" if has_gpu else "cpu")
    assert pick_device("cpu") == "cpu"


def test_wrong_use():
    with pytest.raises(SystemExit, match="2"):
        main.main(["no-such-command"])


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """A machine on which the doctor finds nothing wrong; returns a function that changes the answers of nnU-Net."""
    for name in list(doctor.os.environ):
        if name.startswith("nnUNet_"):
            monkeypatch.delenv(name)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(doctor, "_installed_version", lambda *names: "2.8.0")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_check_shared_memory", lambda report: None)

    def answers(warnings: tuple[str, ...] = (), **changed: dict) -> None:
        answer = {name: {**WELL[name], **changed.get(name, {})} for name in WELL}
        monkeypatch.setattr(doctor, "_ask_in_a_new_process", lambda: (answer, list(warnings)))

    answers()
    return answers


def test_doctor_advises_extras_that_exist_and_are_used():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = set(setup["options.extras_require"]) - {"test"}
    assert set(doctor._EXTRAS) == extras == {"tensorboard"}


def test_doctor_finds_a_healthy_machine_all_right(healthy, capsys):
    assert main.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "all right"


def test_doctor_as_json(healthy, capsys):
    assert main.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["all_right"]
    assert report["discovery"]["start-up hook"] == "active"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ({"torch": {"version": "2.9.1"}}, "nnU-Net excludes"),
        ({"torch": {"error": "OSError: libcudart"}}, "libcudart"),
        ({"timm": {"error": "RuntimeError: operator torchvision::nms does not exist"}}, "pip install --upgrade"),
        ({"nnunetv2": {"error": "ModuleNotFoundError"}}, "nnU-Net itself cannot be imported"),
        ({"nnunetv2": {"search_error": "TypeError"}}, "TypeError"),
        ({"nnunetv2": {"hook": False, "trainer": None, "planner": None}}, "trainer and planner"),
        ({"nnunetv2": {"planner": None}}, "does not find the planner of HySparK"),
        ({"warnings": ("x cannot be imported (ImportError: y)",)}, "ImportError: y"),
    ],
)
def test_doctor_says_what_is_wrong(healthy, capsys, answer, words):
    healthy(**answer)
    assert main.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert words in out
    assert "1. " in out
    assert "all right" not in out


def test_doctor_accepts_the_fallback_folder(healthy, capsys, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(path.external_trainers_folder()))
    healthy(nnunetv2={"hook": False, "planner": None})
    assert main.main(["doctor"]) == 0
    assert "through nnUNet_extTrainer" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [REPOSITORY / "trainers", REPOSITORY / "no_such_folder"])
def test_doctor_warns_of_a_wrong_external_folder(healthy, monkeypatch, capsys, folder):
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    assert main.main(["doctor"]) == 1
    assert f"nnUNet_extTrainer names {folder}" in capsys.readouterr().out


def test_doctor_names_folders_that_are_not_set_or_not_there(healthy, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "missing"))
    assert main.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "nnUNet_raw is not set" in out
    assert f"mkdir -p {tmp_path / 'missing'}" in out


def test_doctor_names_the_variable_that_switches_the_hook_off(healthy, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_hyspark_disable", "1")
    healthy(nnunetv2={"trainer": None, "planner": None})
    assert main.main(["doctor"]) == 1
    assert "unset nnUNet_hyspark_disable" in capsys.readouterr().out


def test_doctor_notices_the_nnunet_of_another_environment(healthy, monkeypatch, capsys, tmp_path):
    command = tmp_path / "nnUNetv2_train"
    command.write_text("#!/somewhere/else/bin/python3.11\n")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(command) if name == "nnUNetv2_train" else None)
    assert main.main(["doctor"]) == 1
    assert "/somewhere/else/bin/python3.11" in capsys.readouterr().out
